"""PEFT's folder: `adapter_config.json` beside `adapter_model.safetensors`, read to and written from the in-memory form.

Keys: ``base_model.model.<module>.lora_A.weight``, ``.lora_B.weight``, ``.lora_magnitude_vector`` (DoRA), ``.ia3_l``; what
trains in full stands under its plain name. The scale is in the config alone: alpha/r, alpha/√r with `use_rslora`, by
`rank_pattern` and `alpha_pattern` where they match. A part of a fused layer is written as an equal LoRA on the whole. How
pictures are drawn (trigger, clip_skip, noise levels) is in the header of the weights, as in other files; PEFT leaves it alone.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from visionlora.atomic import replace_file
from visionlora.errors import AdapterFileError
from visionlora.formats.container import PEFT_CONFIG, Contents, open_file
from visionlora.formats.families import family_of
from visionlora.formats.header import drawing_metadata, in_order, info_in, unshared
from visionlora.formats.names import in_transformers, with_text_model
from visionlora.formats.parts import check_finite, check_used, split_key, take_modules
from visionlora.formats.whole import whole_layers
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.arithmetic import weight_shape
from visionlora.lora.handle import TEXT_ENCODERS
from visionlora.lora.targets import UNCALLED

WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."
READABLE = ("LORA", "ADALORA", "LOHA", "LOKR", "VERA", "IA3")
VARIANTS = {"use_bdlora": "BD-LoRA", "kasa_config": "KaSA", "monteclora_config": "MonteCLoRA"}
"""Kinds of LoRA that hold something else, by the entry of the config that says so."""
COMPONENT_OF = {"UNet2DConditionModel": "unet", **TEXT_ENCODERS}
"""Parts of a pipeline by the class that a config names (`auto_mapping.base_model_class`)."""
CONVOLUTION = re.compile(r"(?<!pw)conv[^.]*$")
"""What convolutions are called in all models; ConvNeXt's `pwconv1` is linear."""
FLAT = "its file has the inputs and the kernel of the convolution in one, and does not tell the kernel"
CHANGING_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Starts (`init_lora_weights`) for which PEFT takes the first B·A off the base weights, or replaces them, on every load."""


def is_folder(path: Path) -> bool:
    """Whether a folder is one of PEFT's."""
    return (path / PEFT_CONFIG).is_file()


def lacks_its_scale(contents: Contents) -> bool:
    """Whether a file is the weights of such a folder, which say nothing of their scale.

    Raises:
        AdapterFileError: when it is, and the config does not lie beside it.
    """
    keys = contents.tensors.keys()
    if not keys or "lora_adapter_metadata" in contents.metadata or not all(k.startswith("base_model.") for k in keys):
        return False
    if not is_folder(contents.path.parent):
        raise AdapterFileError(
            f"{contents.path} holds PEFT's weights, and its scale is in {PEFT_CONFIG} alone: put that file beside it."
        )
    return True


# ----------------------------------------------------------------------------------------------------------------- read


def read(
    folder: Path, component: str | None = None, allow_partial: bool = False, weights: Path | None = None
) -> Adapter:
    """Reads a folder; every tensor is used or the folder is refused.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors (or .bin).
        component: the part of a pipeline that the adapter is for; told by the config or the names when not given.
        allow_partial: leave out tensors that nothing here takes.
        weights: the file, when it has another name.

    Raises:
        AdapterFileError: when a file is missing or broken, the method cannot be read, or a tensor fits nothing.
    """
    config = config_in(folder)
    contents = open_file(weights_in(folder, weights))
    tensors, values = without_saved(contents.tensors, config)
    modules, unused = modules_of(folder, tensors, config)
    check_finite(folder, values)
    check_used(folder, unused, bool(modules or values), allow_partial)
    found = sorted({name.split(".", 1)[0] for name in modules}) or ["model"]
    modules |= {f"{found[0]}.{n}": m for n, m in values.items()}
    component = component or COMPONENT_OF.get(str((config.get("auto_mapping") or {}).get("base_model_class")))
    if component is not None:
        modules = {f"{component}.{with_text_model(component, n.partition('.')[2])}": m for n, m in modules.items()}
    info: dict[str, Any] = {**info_in(contents.metadata), "method": config["peft_type"].lower()}
    if config["peft_type"] == "ADALORA":
        modules = with_kernels(modules)
        flat = [n for n, m in modules.items() if len(m.shape() or ()) == 2 and CONVOLUTION.search(n)]
        if flat:
            info["odd_layers"] = {n.partition(".")[2]: FLAT for n in flat}
    if base := config.get("base_model_name_or_path"):
        info["base"] = {"id": base}
    return Adapter(modules, info, format="peft", metadata=contents.metadata, unused=tuple(unused))


def config_in(folder: Path) -> dict[str, Any]:
    """The config of a folder; `alpha` and `peft_type` are in every one.

    Raises:
        AdapterFileError: when it cannot be read, or says that the weights are of a kind that is not read here.
    """
    try:
        config = dict(json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8")))
        config["alpha"] = float(config.get("lora_alpha") or config.get("alpha") or 0)
        config["modules_to_save"] = tuple(config.get("modules_to_save") or ())
    except (OSError, ValueError, TypeError) as e:
        raise AdapterFileError(
            f"{folder / PEFT_CONFIG} cannot be read ({e}). Copy or download the folder again."
        ) from None
    config["peft_type"] = str(config.get("peft_type"))
    if config["peft_type"] not in READABLE:
        raise AdapterFileError(f"{folder} holds PEFT's {config['peft_type']}; {', '.join(READABLE)} are read.")
    check_start(folder, config.get("init_lora_weights"))
    if variant := next((title for entry, title in VARIANTS.items() if config.get(entry)), None):
        raise AdapterFileError(f"{folder} holds PEFT's {variant}, which visionlora does not read.")
    return config


def weights_in(folder: Path, weights: Path | None) -> Path:
    """The file of the weights, which may be named; raises AdapterFileError where there is none."""
    named = (weights,) if weights is not None else (folder / WEIGHTS, folder / "adapter_model.bin")
    for file in named:
        if file.is_file():
            return file
    raise AdapterFileError(f"{folder} has no {WEIGHTS}: copy the whole folder that PEFT saved.")


def without_saved(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, AdapterModule]]:
    """The tensors of the method, and by layer what PEFT has saved as it is."""
    rest: dict[str, Tensor] = {}
    values: dict[str, AdapterModule] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        plain = split_key(name) in (None, (name.removesuffix(".weight"), "weight"))
        if plain and is_saved(name, config["modules_to_save"], config):
            values[name.replace(".base_layer.", ".")] = AdapterModule("full", {"value": tensor}, 1.0)
        else:
            rest[name] = tensor
    return rest, values


def modules_of(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, AdapterModule], list[str]]:
    """The layers by the rules of the config's method, and the keys that fit none.

    Raises:
        AdapterFileError: when PEFT would apply something else than the factors say, or a part of a layer is missing.
    """
    kind, alpha = config["peft_type"], config["alpha"]
    if kind == "LORA":
        check_pairs(folder, tensors)
    if kind == "VERA":
        tensors = with_projections(folder, tensors)
    if kind == "ADALORA":
        tensors, alpha = divided_by_start(tensors, float(config.get("init_r") or 0)), max(alpha, 0.0)

    def alpha_of(component: str, path: str, rank: int) -> float:
        return rank if kind == "VERA" else effective_alpha(config, path, rank, alpha)

    modules, unused = take_modules(folder, tensors, alpha_of)
    if kind == "VERA":
        modules = {n: first_columns(m) for n, m in modules.items()}
    if kind == "IA3":
        modules = {n: on_its_side(n, m, config.get("feedforward_modules")) for n, m in modules.items()}
    if kind == "LOKR":
        modules = {n: scaled_when_full(n, m, config, alpha) for n, m in modules.items()}
    return modules, unused


def is_saved(name: str, saved: Iterable[str], config: Mapping[str, Any]) -> bool:
    """PEFT's rules for a parameter that it saves as it is: in a module whose name ends so, or a bias that trains too."""
    parts = name.split(".")[:-1]
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    trains = str(config.get("bias") or "none") != "none" and name.endswith(".bias")
    return trains or any(path.endswith(tuple(saved)) for path in paths)


def check_pairs(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises AdapterFileError for factors whose product is not what PEFT applies.

    PEFT (0.21) adds the product on the output of packed attention twice.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if ".base_layer.out_proj." in name:
            raise AdapterFileError(
                f"{folder} adapts {name.partition('.base_layer.')[0]!r}, torch's packed attention, where PEFT applies another "
                "product than that of its factors; visionlora does not read it. Train it without that layer, or here."
            )
        layer, slot = split_key(name) or ("", "")
        layers.setdefault(layer, {})[slot] = tensor
    for layer, own in layers.items():
        down, up = own.get("down"), own.get("up")
        if down is None or up is None or min(down.dim(), up.dim()) < 3 or up.shape[1] == len(down):
            continue
        raise AdapterFileError(
            f"{folder} adapts {layer!r}, a convolution in groups, where PEFT's two factors act group by group; "
            "visionlora reads factors of the whole. Train it without that layer."
        )


def check_start(where: Path, start: Any) -> None:
    """Refuses an adapter that means another base than the one it names.

    Raises:
        AdapterFileError: saying how to save it so that it means the base as it is.
    """
    if isinstance(start, str) and start.lower().startswith(CHANGING_THE_BASE):
        raise AdapterFileError(
            f"{where} was started by {start!r}, for which PEFT changes the base weights whenever it loads the adapter: on the "
            "base as it is it would do something else. Save it again by save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…), as PEFT's documentation shows."
        )


def divided_by_start(tensors: Mapping[str, Tensor], start: float) -> dict[str, Tensor]:
    """PEFT's AdaLoRA saves the rows that are left, and divides by the rank at the start; a layer may have none left."""
    found = {}
    for key, tensor in tensors.items():
        layer, slot = split_key(key) or ("", "")
        if slot in ("down", "up", "diagonal") and not tensor.numel():
            continue
        found[key] = tensor
        if slot == "diagonal" and start:
            found[layer + ".ranknum"] = torch.tensor(start)
    return found


def with_kernels(modules: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
    """PEFT's AdaLoRA has inputs and kernel in one; in Stable Diffusion's UNets the names of the layers tell the kernel."""
    family = family_of({n: m.flat_shape for n, m in modules.items()})
    found = {}
    for name, m in modules.items():
        shape = weight_shape(name, [m])
        if (
            shape is not None
            and family is not None
            and family.name == "sd1"
            and name.endswith((".proj_in", ".proj_out"))
        ):
            shape = *shape[:2], 1, 1
        found[name] = m if shape is None else m.fitted(shape)
    return found


def on_its_side(name: str, module: AdapterModule, inputs: Any) -> AdapterModule:
    """PEFT's rule for (IA)³: the config says which layers have it on their input; of convolutions the shape does not tell."""
    path = name.partition(".")[2]
    if module.kind != "ia3" or inputs is None:
        return module
    found = re.fullmatch(inputs, path) is not None if isinstance(inputs, str) else path.endswith(tuple(inputs))
    return replace(module, options={**module.options, "on_input": found})


def first_columns(module: AdapterModule) -> AdapterModule:
    """PEFT's shared A is as wide as the widest layer, whose width the file does not say of the others."""
    return replace(module, options={"columns": "first"})


def scaled_when_full(name: str, module: AdapterModule, config: Mapping[str, Any], alpha: float) -> AdapterModule:
    """PEFT scales a LoKr of two full matrices too, by alpha/r of the config; LyCORIS, whose form is used here, does not."""
    if module.rank:
        return module
    path = name.partition(".")[2]
    rank = float(by_pattern(config.get("rank_pattern") or {}, path, config["r"]))
    scale = float(by_pattern(config.get("alpha_pattern") or {}, path, alpha)) / rank
    return replace(module, tensors={**module.tensors, "lokr_w1": module.tensors["lokr_w1"] * scale})


def with_projections(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's VeRA as LoRA: of the shared B each layer takes the first rows, and later, when it is known, its columns of A.

    Raises:
        AdapterFileError: when the folder was saved without the shared pair.
    """
    down, up = (tensors.get(PREFIX.removesuffix("model.") + n) for n in ("vera_A", "vera_B"))
    if down is None or up is None:
        raise AdapterFileError(
            f"{folder} holds PEFT's VeRA without its shared projections: save it again with save_projection=True."
        )
    found = {}
    layers = {k.rpartition(".vera_lambda_")[0] for k in tensors if ".vera_lambda_" in k}
    for layer in layers:
        b, d = (tensors.get(f"{layer}.vera_lambda_{n}") for n in "bd")
        if b is None or d is None or len(d) != len(down) or len(b) > len(up):
            raise AdapterFileError(f"{folder} holds half an adapter for {layer!r}, or one of another rank.")
        found[layer + ".lora_A"] = down * d[:, None]
        found[layer + ".lora_B"] = up[: len(b)] * b[:, None]
    rest = {k: t for k, t in tensors.items() if ".vera_lambda_" not in k and not k.endswith((".vera_A", ".vera_B"))}
    return {**found, **rest}


def effective_alpha(config: Mapping[str, Any], path: str, rank: int, default: float) -> float:
    """The alpha with which alpha/rank is the scaling that PEFT uses for a module."""
    alpha = float(by_pattern(config.get("alpha_pattern") or {}, path, default))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def by_pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first key that is a regular expression for the end of the name, on a dot boundary."""
    for key, value in pattern.items():
        if any(re.match(rf"(.*\.)?({key})$", name) for name in (path, path.removeprefix("text_model."))):
            return value
    return default


# ---------------------------------------------------------------------------------------------------------------- write


def write(adapter: Adapter, folder: Path, component: str = "") -> None:
    """Writes a folder that `PeftModel.from_pretrained` loads.

    Args:
        adapter: of one component, or with the component named.
        folder: made when it is not there.
        component: which part of the adapter.

    Raises:
        AdapterFileError: when PEFT cannot hold the adapter, saying what and why, or the folder cannot be written.
    """
    if not component and len(adapter.components) != 1:
        raise AdapterFileError(
            f"A PEFT folder holds one part; this adapter has {', '.join(adapter.components)}: write one of them "
            f"(convert --component {adapter.components[0]})."
        )
    component = component or adapter.components[0]
    modules = whole_layers(adapter, component, "PEFT")
    modules = {in_transformers(component, n): m for n, m in modules.items()}
    check_held(adapter, modules)
    kinds = {m.kind for m in modules.values()} - {"full"}
    if not kinds:
        raise AdapterFileError(
            "A PEFT folder holds at least one adapted layer; this adapter has a head, or whole parameters, alone. "
            "visionlora's own format keeps it, and `visionlora export --to state-dict` writes the whole model."
        )
    if len(kinds) > 1 or not kinds <= {"lora", "dora", "ia3"}:
        raise AdapterFileError(
            f"A PEFT folder holds one of lora, dora and ia3; this adapter holds {', '.join(sorted(kinds))}. "
            "visionlora's own format keeps it."
        )
    config = {**described(modules, kinds), "base_model_name_or_path": (adapter.info.get("base") or {}).get("id")}
    if component.startswith("text_encoder"):  # of other parts the names tell
        kind = next(k for k, c in COMPONENT_OF.items() if c == component)
        config["auto_mapping"] = {"base_model_class": kind, "parent_library": "transformers.models.clip.modeling_clip"}
    tensors = unshared({PREFIX + key: t for name, m in modules.items() for key, t in keyed(name, m).items()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt", **drawing_metadata(adapter)}  # for which the config has no place
        replace_file(folder / WEIGHTS, in_order(save_tensors(tensors, metadata)))
        replace_file(folder / PEFT_CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    except OSError as e:
        raise AdapterFileError(f"The folder {folder} cannot be written: {e.strerror or e}. Choose another.") from None


def check_held(adapter: Adapter, modules: Mapping[str, AdapterModule]) -> None:
    """Raises AdapterFileError for what PEFT would take for something else, or would lose."""
    if adapter.embeddings:
        raise AdapterFileError(
            f"A PEFT folder cannot hold the vectors of {', '.join(adapter.embeddings)}. Formats visionlora and kohya keep them."
        )
    for name, m in modules.items():
        if why := unheard(name, m, adapter.odd_layers):
            raise AdapterFileError(
                f"PEFT would take the adapter of {name} and do something else with it, or nothing: {why}. visionlora's own "
                "format keeps it, and `visionlora export --to state-dict` writes the whole model."
            )
        layer, _, parameter = name.rpartition(".")
        if m.kind == "full" and (not layer or (parameter == "bias" and f"{layer}.weight" not in modules)):
            raise AdapterFileError(
                f"PEFT saves whole modules, and the adapter changes the parameter {name} alone. Train its module "
                "(train=…), or keep it in visionlora's own format."
            )
        if m.kind in ("lora", "dora") and m.options:
            what = (
                "a shared matrix of unknown width" if m.kind == "lora" else "a DoRA by columns, or of another product"
            )
        elif m.kind == "ia3" and (m.options.get("relative") or not m.options.get("bias", True)):
            what = "an (IA)³ that leaves biases alone"
        else:
            continue
        raise AdapterFileError(f"A PEFT folder cannot hold {name}: {what}. Formats visionlora and kohya keep it.")


def unheard(name: str, module: AdapterModule, odd: Mapping[str, str]) -> str | None:
    """Why PEFT's adapter of a layer would not do what this one does, or None."""
    if module.kind == "full":
        return None
    if name.endswith("self_attention.out_proj"):  # torchvision's, in files that do not say
        return UNCALLED
    # Parts of a fused layer were joined, and the whole is as odd as they are.
    why = next((why for n, why in odd.items() if n == name or n.rpartition(".")[0] == name), None)
    return None if module.kind == "ia3" and why != UNCALLED else why  # which acts on what goes in or comes out


def described(modules: Mapping[str, AdapterModule], kinds: set[str]) -> dict[str, Any]:
    """adapter_config.json."""
    adapted = {n: m for n, m in modules.items() if m.kind != "full"}
    saved = sorted({n.rpartition(".")[0] for n, m in modules.items() if m.kind == "full"})
    shared = {
        "task_type": None,
        "inference_mode": True,
        "target_modules": sorted(adapted),
        "modules_to_save": saved or None,
    }
    if kinds == {"ia3"}:
        inputs: list[str] | str = sorted(n for n, m in adapted.items() if m.options.get("on_input"))
        if any(
            n.endswith(tuple(inputs)) for n in adapted if n not in inputs
        ):  # a list is of ends, a text of whole names
            inputs = "|".join(map(re.escape, inputs))
        return {**shared, "peft_type": "IA3", "feedforward_modules": inputs, "fan_in_fan_out": False}
    rank = Counter(m.rank for m in adapted.values()).most_common(1)[0][0]
    alpha = Counter(m.alpha for m in adapted.values()).most_common(1)[0][0]
    return {
        **shared,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "rank_pattern": {pattern(n, adapted): m.rank for n, m in adapted.items() if m.rank != rank},
        "alpha_pattern": {pattern(n, adapted): m.alpha for n, m in adapted.items() if m.alpha != alpha},
        "use_dora": kinds == {"dora"},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def pattern(name: str, adapted: Iterable[str]) -> str:
    """A layer's name as a key of PEFT's patterns, which are for the ends of names, and here for this name alone."""
    return ("^" if any(n.endswith("." + name) for n in adapted) else "") + re.escape(name)


def keyed(name: str, module: AdapterModule) -> dict[str, Tensor]:
    """The tensors of one module under PEFT's names and in its shapes."""
    if module.kind == "full":
        return {name: module.tensors["value"]}
    if module.kind == "ia3":
        vector, spatial = module.tensors["vector"], int(module.options.get("spatial", 0))
        by_columns = spatial or module.options.get("on_input")
        return {name + ".ia3_l": vector.view(1, -1, *(1,) * spatial) if by_columns else vector.view(-1, 1)}
    found = {f"{name}.lora_A.weight": module.tensors["lora_A"], f"{name}.lora_B.weight": module.tensors["lora_B"]}
    if "magnitude" in module.tensors:
        spatial = module.tensors["lora_A"].dim() - 2
        magnitude = module.tensors["magnitude"]
        found[name + ".lora_magnitude_vector"] = magnitude.view(1, -1, *(1,) * spatial) if spatial else magnitude
    return found
