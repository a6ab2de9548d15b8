"""What is refused while adapters are on a model: saving what is neither the base nor theirs, loading what would be undone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from visionlora.errors import ConfigError

if TYPE_CHECKING:
    from visionlora.lora.in_full import Changed


@dataclass
class Guard:
    """Hangs on a model while adapters are on it, and is copied with both."""

    hook: RemovableHandle
    names: list[str] = field(default_factory=list)
    """Of the adapters; those on other layers of the model may share one."""


def uncompiled(part: Any) -> Any:
    """What a compiled model was compiled from, which a pipeline saves in its place; anything else as it is."""
    return getattr(part, "_orig_mod", part)


def guard(model: nn.Module, name: str) -> None:
    """Refuses to save a model, and to load into what adapters have changed, while this one is on it."""
    model = uncompiled(model)
    if "_guard" not in vars(model):
        vars(model)["_guard"] = Guard(model.register_load_state_dict_pre_hook(check_loading))
        refuse_saving(model)
    vars(model)["_guard"].names.append(name)


def unguard(model: nn.Module, name: str) -> None:
    """Undoes `guard` for one adapter; without any the model is as before."""
    model = uncompiled(model)
    there: Guard = vars(model)["_guard"]
    there.names.remove(name)
    if not there.names:
        there.hook.remove()
        del vars(model)["_guard"]
        allow_saving(model)


def adapters_on(target: Any) -> list[str]:
    """The names of the adapters on a model, or on the parts of a pipeline."""
    parts = (
        [target] if isinstance(target, nn.Module) else [p for p in vars(target).values() if isinstance(p, nn.Module)]
    )
    guards = [vars(uncompiled(p)).get("_guard") for p in parts]
    return list(dict.fromkeys(name for found in guards if found is not None for name in found.names))


def refuse_saving(target: Any) -> None:
    """Makes `save_pretrained` of a model or pipeline an error while there are adapters on it.

    It would write ΔW into the base where they are merged, and names that no other program knows where they are not.
    `state_dict` is left as it is: offloading reads it.
    """
    if hasattr(target := uncompiled(target), "save_pretrained"):
        vars(target)["save_pretrained"] = partial(save_pretrained, target)


def allow_saving(target: Any) -> None:
    """As before `refuse_saving`, unless other adapters are still there."""
    if not adapters_on(target := uncompiled(target)):
        vars(target).pop("save_pretrained", None)


def save_pretrained(target: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of that of a model or pipeline, and of their copies."""
    if not (names := adapters_on(target)):
        return type(target).save_pretrained(target, *args, **kwargs)
    place = args[0] if args else kwargs.get("save_directory")
    folder = Path(place) if isinstance(place, (str, Path)) and isinstance(target, nn.Module) else None
    if folder and BY_LOOPS in kwargs and not any(written_anew(m) for m in target.modules()):
        return save_checkpoint(target, folder, kwargs[BY_LOOPS], kwargs.get("is_main_process", True))
    raise ConfigError(
        f"Adapters are on this {type(target).__name__} ({', '.join(names)}): what it would save is neither the base nor a "
        "model that other programs read. For the base take them off first (mix.detach(), handle.eject()); for an adapter "
        "that trains call handle.save(path); for a model with them in its weights use vl.bake or vl.export with their files."
        + (left_behind(folder) if folder else "")
    )


def left_behind(folder: Path) -> str:
    """A sentence on what a pipeline has written before the part that this folder was for; empty where it has not.

    A pipeline writes one part after the other, and cannot be asked before where it does not know of the adapter.
    """
    written = [n for n in ("text_encoder", "text_encoder_2", "tokenizer", "vae") if (folder.parent / n).is_dir()]
    if not written or (folder.parent / "model_index.json").exists():
        return ""
    return f" What {folder.parent} holds by now ({', '.join(written)}) is no whole model."


BY_LOOPS = "state_dict"
"""What the Trainer of transformers, and loops written with accelerate, say when they save a model, and others do not."""
CHECKPOINT = "model.safetensors"
"""From which the Trainer goes on."""


def save_checkpoint(model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None, is_main_process: bool) -> None:
    """Writes what a training loop goes on from, as the Trainer does for a model that is not transformers'.

    `save_pretrained` may respell the names of a model, and by others the Trainer finds nothing again.

    Args:
        model: that trains, with adapters on it that are in no weights.
        folder: of the checkpoint; without a config it is none of a model that others would open without the adapters.
        state: what is to be written; all of the model where it is not given.
        is_main_process: whether this process is to write.
    """
    warnings.warn(
        f"Adapters are on this {type(model).__name__} ({', '.join(adapters_on(model))}): its checkpoints hold what training "
        "goes on from (trainer.train(resume_from_checkpoint=…), with the same adapters on), no model that from_pretrained "
        "opens. For the adapter call handle.save(path).",
        stacklevel=3,
    )
    if is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(on_their_own(model.state_dict() if state is None else state), folder / CHECKPOINT, {"format": "pt"})


def on_their_own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which none shares memory with another, as safetensors wants them."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, t in tensors.items():
        place = t.untyped_storage().data_ptr()
        found[name] = t.detach().clone() if place in taken else t.detach().contiguous()
        taken.add(place)
    return found


def check_loading(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuses values for what adapters have changed: torch calls it with all that a module and those in it are to load.

    Raises:
        ConfigError: for what is written anew from its original when adapters change or go.
    """
    for path, inner in module.named_modules(prefix=prefix.removesuffix("."), remove_duplicate=False):
        for name, how in written_anew(inner).items():
            if (lost := f"{path}.{name}" if path else name) in state_dict:
                around = f" Some of what is around {prefix[:-1]} may be loaded by now." if prefix else ""
                raise ConfigError(
                    f"Adapters are {how[0]} {lost}, and what is loaded there would be gone with them: take them {how[1]}, "
                    f"load, and put them on again.{around}"
                )


MERGED = "merged into", "out first (mix.detach(), handle.unmerge())"
CHANGED = "in the values of", "off first (mix.detach(), handle.eject())"


def written_anew(module: nn.Module) -> dict[str, tuple[str, str]]:
    """The parameters of a module that adapters have written, with the words for how, and for how they are taken out.

    One that trains in full is what is loaded from then on.
    """
    found = dict.fromkeys(vars(module).get("originals", ()), MERGED)
    changed: dict[str, Changed] = vars(module).get("_changed", {})
    return found | {n: CHANGED for n, c in changed.items() if n not in found and not all(p.in_place for p in c.parts)}
