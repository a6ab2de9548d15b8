"""How an adapter came to be, as far as its header says: ours, or the `ss_*` entries that kohya's trainers and others write.

`ss_tag_frequency` is the only place where most files on the web name what they were captioned with, and so the words that call
them: folder of pictures -> tag -> in how many captions it is. What a header has in another form than expected is left out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visionlora.lora.adapter import Adapter

ENTRIES = {
    "pictures": "ss_num_train_images", "steps": "ss_steps", "epochs": "ss_epoch", "batch": "ss_total_batch_size",
    "resolution": "ss_resolution", "learning_rate": "ss_learning_rate", "unet_lr": "ss_unet_lr",
    "text_encoder_lr": "ss_text_encoder_lr", "optimizer": "ss_optimizer", "lr_scheduler": "ss_lr_scheduler",
    "min_snr_gamma": "ss_min_snr_gamma", "noise_offset": "ss_noise_offset", "clip_skip": "ss_clip_skip", "seed": "ss_seed",
    "model": "ss_sd_model_name", "comment": "ss_training_comment",
}  # fmt: skip
"""What is said, by our word for it, and kohya's."""


@dataclass(frozen=True)
class History:
    """What a header tells."""

    trained: Mapping[str, str]
    """Settings of the training, by our words for them."""
    tags: Mapping[str, int]
    """In how many captions each tag was, the most frequent first."""
    classes: tuple[str, ...]
    """Of a classifier."""


def history_of(adapter: Adapter) -> History:
    """What the header of an adapter tells.

    Args:
        adapter: read from a file.
    """
    own, metadata = _mapping(adapter.info.get("training")), adapter.metadata
    trained: dict[str, str] = {}
    for word, entry in ENTRIES.items():
        value = own.get(word, metadata.get(entry))
        if value not in (None, "", "None") and isinstance(value, (str, int, float)):
            trained[word] = f"{value:g}" if isinstance(value, float) else str(value)
    if "pictures" not in own and (count := pictures_in(metadata)):
        trained["pictures"] = str(count)
    if "optimizer" in trained:  # kohya has the module and the arguments too
        trained["optimizer"] = trained["optimizer"].partition("(")[0].rpartition(".")[2]
    if size := re.fullmatch(r"\((\d+), ?(\d+)\)", trained.get("resolution", "")):
        trained["resolution"] = f"{size[1]}x{size[2]}"
    if trained.get("model") == _mapping(adapter.info.get("base")).get("id"):
        trained.pop("model", None)  # said already
    if start := own.get("start_from"):
        trained["start_from"] = str(start)
    if merged := _mapping(adapter.info.get("merged")):
        scales = merged.get("scales")
        named = (
            " and ".join(f"{s:g}" for s in scales if isinstance(s, (int, float))) if isinstance(scales, list) else ""
        )
        trained["merged"] = f"{merged.get('method')} at {named}" if named else str(merged.get("method"))
    classes = _mapping(adapter.info.get("classifier")).get("classes")
    return History(trained, tags_in(metadata), tuple(map(str, classes)) if isinstance(classes, list) else ())


def tags_in(metadata: Mapping[str, str]) -> dict[str, int]:
    """The tags of all folders of pictures, the most frequent first; none where the entry is missing or broken.

    >>> tags_in({"ss_tag_frequency": '{"10_dog": {" sks dog": 4, "red": 1}, "cat": {"red": 5}}'})
    {'red': 6, 'sks dog': 4}
    """
    found: Counter[str] = Counter()
    for tags in _json(metadata.get("ss_tag_frequency")).values():
        for tag, count in _mapping(tags).items():
            if isinstance(count, int) and count > 0 and tag.strip():
                found[tag.strip()] += count
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def pictures_in(metadata: Mapping[str, str]) -> int:
    """How many pictures kohya's folders held; its `ss_num_train_images` counts each as often as it was repeated."""
    counts = [_mapping(folder).get("img_count") for folder in _json(metadata.get("ss_dataset_dirs")).values()]
    return sum(count for count in counts if isinstance(count, int))


def _json(text: str | None) -> Mapping[str, Any]:
    try:
        return _mapping(json.loads(text or "{}"))
    except (ValueError, RecursionError):
        return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
