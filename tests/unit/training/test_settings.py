"""What a run says of its settings before it begins."""

from dataclasses import asdict

import pytest

from visionlora.config import ClassifyConfig, TrainSDConfig
from visionlora.errors import ConfigError
from visionlora.training.settings import left_aside, targets_of


def test_what_a_method_without_layers_leaves_aside_is_said() -> None:
    given = {"images": "x", "method": "full", "targets": "attn.q"}
    assert left_aside(TrainSDConfig(**given)) == (
        "Method full trains every parameter, so this is left aside: targets=attn.q.",
    )
    (line,) = left_aside(ClassifyConfig(**{**given, "method": "linear-probe", "rank": 4}))
    assert "the head alone" in line and line.endswith("targets=attn.q, rank=4.")
    assert targets_of(TrainSDConfig(**given)) == "every parameter"
    again = TrainSDConfig(**asdict(TrainSDConfig(images="x", method="full")))
    assert left_aside(again) == left_aside(TrainSDConfig(images="x", targets="attn.q")) == ()
    with pytest.raises(ConfigError, match="rank is 'auto'; method full has no ranks that could be spread"):
        TrainSDConfig(**given, rank="auto")
