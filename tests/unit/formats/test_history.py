"""What headers tell of a training."""

import pytest
import torch

from visionlora.formats.history import History, history_of, pictures_in, tags_in
from visionlora.lora.adapter import Adapter, AdapterModule


def adapter(info: dict, metadata: dict | None = None) -> Adapter:
    return Adapter(
        {"unet.a": AdapterModule.lora(torch.ones(1, 2), torch.ones(2, 1), 1.0)}, info, metadata=metadata or {}
    )


def test_our_own_words_come_first() -> None:
    training = {"steps": 300, "learning_rate": 1e-4, "resolution": 64, "pictures": 5, "start_from": "a.safetensors"}
    given = adapter(
        {"base": {"id": "emoji-64"}, "training": training},
        {"ss_steps": "7", "ss_seed": "0", "ss_sd_model_name": "emoji-64", "ss_dataset_dirs": '{"a": {"img_count": 9}}'},
    )
    assert history_of(given).trained == {
        "pictures": "5", "steps": "300", "resolution": "64", "learning_rate": "0.0001", "seed": "0",
        "start_from": "a.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize(
    "broken", ["", "{", "[1]", '{"a": 1}', '{"a": {"b": "c"}}', '{"a": {" ": 2}}', "null", "[" * 10**5]
)
def test_what_is_broken_is_left_out(broken: str) -> None:
    metadata = dict.fromkeys(("ss_tag_frequency", "ss_dataset_dirs"), broken)
    assert tags_in(metadata) == {} and pictures_in(metadata) == 0
    odd = {"training": "much", "merged": ["sum"], "classifier": {"classes": "cat"}, "base": None}
    assert history_of(adapter(odd, metadata)) == History({}, {}, ())
