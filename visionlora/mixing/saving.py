"""What a model saves of itself while the adapters of a mix are on it: the base, as if they were not there."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from visionlora.lora.adapted import AdaptedLayer


def base_alone(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook on `state_dict`, which `save_pretrained` saves: the base's own values, without the adapters' tensors.

    Otherwise what is saved would follow the mode: ΔW in the weights, or the base with names that no other program knows.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        path = f"{prefix}{name}." if name else prefix
        own = dict(module.originals) if isinstance(module, AdaptedLayer) else {}
        # What is changed in full is changed below what is merged, so its original is the base's.
        own |= {n: changed.original for n, changed in vars(module).get("_changed", {}).items()}
        for key, value in own.items():
            state[path + key] = value.detach()
        if isinstance(module, AdaptedLayer):
            for key in [k for k in state if k.startswith(f"{path}adapters.")]:
                del state[key]
    warnings.warn(
        f"Adapters of vl.attach are on this {type(model).__name__}, and what it saves is the base without them. For a model "
        "with them in its weights use `visionlora bake`; mix.detach() takes them off.",
        stacklevel=2,
    )
