"""The adapter's settings are checked at construction, all together."""

import pytest

from visionlora.errors import ConfigError
from visionlora.lora.config import AdapterConfig


def test_alpha_defaults_to_the_rank() -> None:
    assert AdapterConfig(rank=4).scaling == 1.0
    assert AdapterConfig(rank=4, alpha=8).scaling == 2.0


def test_targets_may_be_one_string_or_several() -> None:
    assert AdapterConfig(targets="attn.q, mlp").target_list == ("attn.q", "mlp")
    assert AdapterConfig(targets=("attn.q",)).target_list == ("attn.q",)


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        AdapterConfig(method="lroa", rank=0, alpha=-1, dropout=1.0, init="gausian", targets="")
    lines = str(caught.value).splitlines()
    assert lines[0] == "This adapter cannot be built:"
    assert len(lines) == 7
    assert "Did you mean 'lora'?" in lines[1]
    assert "Did you mean 'gaussian'?" in lines[5]
