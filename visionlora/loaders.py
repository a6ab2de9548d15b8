"""Adapter files -> models that use them."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from visionlora.config.choices import WEIGHT_SUFFIXES
from visionlora.diffusion.objective import zero_terminal
from visionlora.errors import AdapterFileError, ConfigError, nearest
from visionlora.formats import diffusers, kohya, native, peft
from visionlora.formats.families import context_width, family_of, family_of_unet, flat_shapes
from visionlora.formats.header import PIPELINE_PARTS, most_common
from visionlora.formats.parts import first_not_finite
from visionlora.formats.read import read
from visionlora.lora import arithmetic
from visionlora.lora.adapter import Adapter
from visionlora.lora.arithmetic import Progress, Result, Size
from visionlora.lora.combine import Options
from visionlora.lora.guards import refuse_saving
from visionlora.lora.handle import Handle
from visionlora.lora.inject import attach, inner_names
from visionlora.models.base import BaseModel, open_base
from visionlora.models.words import add_word

WRITERS: dict[str, Callable[[Adapter, Path], None]] = {
    "visionlora": native.write,
    "kohya": kohya.write,
    "diffusers": diffusers.write,
    "diffusers-folded": diffusers.write_folded,
    "peft": peft.write,
}
"""Formats that can be written; see the files of these names in `visionlora.formats`."""


def load_adapter(path: str | Path, allow_partial: bool = False) -> Adapter:
    """Reads an adapter of any known trainer: a file, a run folder, or a folder of PEFT's or diffusers'.

    The format is told by the content: ours, kohya's and LyCORIS' (LoCon, LoHa, LoKr, DoRA, full, norms, (IA)³, OFT, BOFT),
    all spellings of diffusers and PEFT, cloneofsimo's, and bundled embeddings. Every tensor is used or the file is refused.

    Args:
        path: of the file or folder.
        allow_partial: leave out tensors that nothing here takes; `Adapter.unused` lists them.

    Raises:
        AdapterFileError: see `visionlora.formats.read.read`.
    """
    return read(Path(path).expanduser(), allow_partial)


def adapter_of(given: Any) -> Adapter:
    """An adapter, or that of a result or of a file.

    Raises:
        ConfigError: when it is none of these.
        AdapterFileError: when a file cannot be read.
    """
    return load_adapter(given) if isinstance(given, (str, Path)) else arithmetic.adapter_of(given)


def merge_adapters(
    adapters: Sequence[Any], method: str = "sum", size: Size | None = None,
    options: Options | None = None, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """`visionlora.lora.arithmetic.merge_adapters`, of files too: each is an adapter, a result or a path, or a pair of one of
    these and its scale.
    """
    opened = [
        (adapter_of(given[0]), given[1]) if isinstance(given, (tuple, list)) and len(given) == 2 else adapter_of(given)
        for given in adapters
    ]
    return arithmetic.merge_adapters(opened, method, size, options, progress)


def resize_adapter(adapter: Adapter | Result | str | Path, size: Size, progress: Progress | None = None) -> Result:
    """`visionlora.lora.arithmetic.resize_adapter`, of a file too."""
    return arithmetic.resize_adapter(adapter_of(adapter), size, progress)


def save_adapter(adapter: Adapter | Result | str | Path, path: str | Path, format: str = "visionlora") -> None:
    """Writes an adapter, atomically.

    Args:
        adapter: from a file or a handle; what `merge_adapters` and its like return; or the path of a file.
        path: a file, or for `peft` a folder.
        format: `visionlora` (our own, which diffusers reads too), `kohya` (A1111, Forge, ComfyUI; diffusers 0.42 drops the
            magnitudes of a text encoder's DoRA from it, and says so), `diffusers`, `diffusers-folded` (for versions of
            diffusers that do not read scales from the header) or `peft`.

    Raises:
        AdapterFileError: when the format is unknown or cannot hold the adapter, a value is NaN or infinite, or the path cannot
            be written.
        ConfigError: when no program would know an adapter by the path.
    """
    check_format(format)
    adapter = adapter_of(adapter)
    check_name(path, format)
    if (bad := first_not_finite(adapter.modules)) is not None:
        raise AdapterFileError(
            f"The adapter has NaN or infinite values in {bad!r}, so {path} was not written: its training diverged, or a scale "
            "was too large."
        )
    if format != "visionlora":
        alphas = [m.alpha for m in adapter.modules.values() if m.rank and m.alpha]
        usual = most_common(alphas) if alphas else None
        adapter = replace(adapter, modules={n: m.with_alpha_for_none(usual) for n, m in adapter.modules.items()})
    WRITERS[format](adapter, Path(path).expanduser())


def check_format(format: str) -> None:
    """Raises AdapterFileError when there is no such format."""
    if format not in WRITERS:
        raise AdapterFileError(f"There is no adapter format {format!r}. {nearest(format, WRITERS)}")


def check_name(path: str | Path, format: str) -> None:
    """Raises ConfigError when other programs would not find an adapter of a format under this name."""
    name = Path(path).name
    stem = Path(path).stem if Path(path).suffix.lower() in WEIGHT_SUFFIXES else name
    if format != "peft" and not name.lower().endswith(".safetensors"):
        raise ConfigError(
            f"{path} does not end in .safetensors, by which programs know adapters: write {stem}.safetensors"
            + (", or choose format peft (--to peft) for a folder." if stem == name else ".")
        )
    if format == "peft" and stem != name:
        raise ConfigError(
            f"{path} would be a folder, as PEFT has adapters: write {stem}, or choose another format (--to)."
        )


def check_base(adapter: Adapter, base: BaseModel, force: bool = False, allow_partial: bool = False) -> None:
    """Refuses an adapter of another base model.

    Args:
        adapter: read from a file.
        base: what it is to be applied to.
        force: accept other weights in the same architecture (a fine-tune of the same family).
        allow_partial: accept an adapter with parts that the base has not.

    Raises:
        AdapterFileError: when the families or architectures differ, or the weights do and `force` is not given.
    """
    check_family(adapter, base)
    there = base.fingerprints_for(adapter)
    for component in adapter.components:
        if component not in there and not allow_partial:
            raise AdapterFileError(f"The adapter has a part for {component!r}, which {base.id} has not.")
    check_fingerprints(adapter, base.id, there, force)


def check_draws(adapter: Adapter, where: str | Path) -> None:
    """Raises AdapterFileError when an adapter is a classifier, which no picture can be drawn with."""
    if found := adapter.info.get("classifier"):
        count = len(found.get("classes", ()))
        raise AdapterFileError(
            f"{where} is a classifier of {count} classes, made by `visionlora classify`, and changes no pictures: it is for "
            f"`visionlora predict --adapter {shlex.quote(str(where))}`. Name a style or subject adapter."
        )


def check_sees(adapter: Adapter, where: str | Path) -> None:
    """Raises AdapterFileError when an adapter is for what draws, which no vision transformer has."""
    if drawing := [component for component in adapter.components if component in PIPELINE_PARTS]:
        raise AdapterFileError(
            f"{where} is an adapter for Stable Diffusion (it changes its {' and '.join(drawing)}), not for a vision "
            "transformer: draw with it, `visionlora generate --lora`, and name a run of `visionlora classify` here."
        )


def check_classifies(adapter: Adapter, where: str | Path) -> None:
    """Raises AdapterFileError when an adapter is no classifier, so that nothing can be predicted with it."""
    check_sees(adapter, where)
    if not adapter.info.get("classifier"):
        raise AdapterFileError(
            f"{where} has no classes: it was not made by `visionlora classify`. Name a run of it, or its adapter.safetensors."
        )


def check_fingerprints(
    adapter: Adapter,
    id: str,
    there: Mapping[str, Mapping[str, str]],
    force: bool = False,
    older: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Refuses an adapter that says it was made for another model.

    Args:
        adapter: read from a file.
        id: of the model that it is to be applied to.
        there: architecture and weights fingerprint of each part of that model.
        force: accept other weights in the same architecture.
        older: the same by other names, which a part may have had when the adapter was made.

    Raises:
        AdapterFileError: when an architecture differs, or the weights do and `force` is not given.
    """
    made_for = adapter.info.get("base", {})
    for component in adapter.components:
        given = made_for.get("fingerprints", {}).get(component)
        if given is None or component not in there:
            continue
        # Either may have been named by the newer version of a library.
        pairs = [(given, there[component])]
        pairs += [(given, older[component])] if older and component in older else []
        said_older = made_for.get("older_fingerprints", {})
        pairs += [(said_older[component], there[component])] if component in said_older else []
        given, own = next((pair for pair in pairs if pair[0]["architecture"] == pair[1]["architecture"]), pairs[0])
        if given["architecture"] != own["architecture"]:
            raise AdapterFileError(
                f"The adapter was made for {made_for.get('id')}, whose {component} has another "
                f"architecture than that of {id}. Open its own base: --model {made_for.get('id')}."
            )
        if given["weights"] != own["weights"] and not force:
            raise AdapterFileError(
                f"The adapter was made for {made_for.get('id')}; {id} has the same architecture but "
                "other weights. If it is a fine-tune of the same family, use --force."
            )


def check_family(adapter: Adapter, base: BaseModel) -> None:
    """Raises AdapterFileError when an adapter's cross-attention is of another width than the base's."""
    check_family_of(adapter, base.pipe.unet, base.id)


def check_family_of(adapter: Adapter, unet: Any, id: str) -> None:
    """Raises AdapterFileError when an adapter's cross-attention is of another width than that of a UNet."""
    there, width = family_of_unet(unet.config)
    shapes = flat_shapes(adapter)
    family = family_of(shapes)
    given = context_width(shapes) if family is None else family.context
    if given is None or width is None or given == width:
        return
    title = family.title if family is not None else "a model of its own kind"
    own = f"{id} is {there.title}" if there is not None else f"{id} is a model of its own kind"
    raise AdapterFileError(
        f"This is an adapter for {title} (its cross-attention reads text embeddings {given} wide); {own} ({width} wide). "
        f"Open a base of the family it was made for: --model with {title if family else 'its own base'}."
    )


def apply(
    base: BaseModel, adapter: Adapter, name: str = "default", scale: float = 1.0, force: bool = False,
    allow_partial: bool = False,
) -> list[Handle]:  # fmt: skip
    """Puts an adapter on an opened base model, one handle per component, and its tokens into the tokenizer.

    Args:
        base: the model.
        adapter: of any format.
        name: to tell adapters apart.
        scale: of the whole effect.
        force: see `check_base`.
        allow_partial: leave out what does not fit; `handle.report.skipped` lists it.

    Raises:
        AdapterFileError: when it was made for another base.
        TargetError: when a module does not fit.
    """
    check_base(adapter, base, force, allow_partial)
    parts = base.components()
    components = [c for c in adapter.components if c in parts]
    handles: list[Handle] = []
    try:
        for component in components:
            handles.append(attach(parts[component], adapter, component, name, allow_partial))
            handles[-1].set_scale(scale)
        add_tokens(base, adapter)
    except BaseException:
        for handle in handles:
            handle.eject()
        raise
    refuse_saving(base.pipe)
    return handles


def add_tokens(base: BaseModel, adapter: Adapter) -> None:
    """Gives the text encoders the vectors of an adapter's own tokens.

    Raises:
        AdapterFileError: when the vectors have another width than the text encoder's, or a token is there already.
    """
    tokenizers = {name: tokenizer for name, tokenizer, _ in base.text_parts()}
    for token, parts in adapter.embeddings.items():
        for component, vectors in parts.items():
            encoder = base.components().get(component)
            if encoder is None or component not in tokenizers:
                raise AdapterFileError(
                    f"The adapter has vectors of {token!r} for {component!r}, which {base.id} has not."
                )
            add_token(base.pipe, token, vectors, tokenizers[component], encoder)


def words_elsewhere(adapters: Mapping[str, Adapter], pipe: Any) -> Iterator[tuple[str, str]]:
    """(name of an adapter, word) of each word that was learned with it and is in none of them: some formats keep it in a file
    of its own.
    """
    known = {word for adapter in adapters.values() for word in adapter.embeddings} | pipe.tokenizer.get_vocab().keys()
    for name, adapter in adapters.items():
        for word in adapter.info.get("words", ()):
            if word not in known:
                yield name, word


def add_token(pipe: Any, token: str, vectors: Tensor, tokenizer: Any, encoder: Any) -> None:
    """Gives one text encoder of a pipeline a token with vectors of its own, (n, width).

    Raises:
        AdapterFileError: when the vectors have another width than the text encoder's, or the token is there already.
    """
    check_width(token, vectors, encoder)
    try:
        add_word(pipe, token, vectors, tokenizer, encoder)
    except ValueError as e:
        raise AdapterFileError(f"The token {token!r} cannot be added: {e}") from None


def check_width(token: str, vectors: Tensor, encoder: Any) -> None:
    """Raises AdapterFileError when the vectors of a token, (n, width), have another width than the text encoder's."""
    width = encoder.get_input_embeddings().weight.shape[1]
    if vectors.shape[1] != width:
        raise AdapterFileError(
            f"The vectors of {token!r} are {vectors.shape[1]} wide, this text encoder's {width}: they were made for another "
            "family."
        )


def ends_in_noise(base: BaseModel, adapters: Iterable[Adapter]) -> bool:
    """Whether one of the adapters was trained at noise levels that end at nothing but noise, and the base can draw at these:
    one that predicts the noise sees nothing else there.
    """
    return base.prediction_type != "epsilon" and any(a.zero_terminal_snr for a in adapters)


def follow_noise(base: BaseModel, adapters: Iterable[Adapter]) -> bool:
    """Lets a base draw at the noise levels of `ends_in_noise`; returns whether it does."""
    if wanted := ends_in_noise(base, adapters):
        base.pipe.scheduler = zero_terminal(base.pipe.scheduler)
    return wanted


def named(adapters: Any, name: str = "default") -> Mapping[str, str | Path | Adapter]:
    """Adapters by name: one path or `Adapter` goes by `name`.

    Raises:
        ConfigError: for anything else.
    """
    by_name = {name: adapters} if isinstance(adapters, (Adapter, str, Path)) else adapters
    if not isinstance(by_name, Mapping):
        raise ConfigError(
            f"adapters is {type(adapters).__name__}: give them by name, such as {{'dog': 'dog.safetensors'}}, or one path."
        )
    for given in by_name:
        check_called(given)
    return by_name


def check_called(name: Any) -> None:
    """Raises ConfigError when the name of an adapter is no text."""
    if not isinstance(name, str):
        raise ConfigError(f"An adapter is named {name!r}; a name must be a text, such as 'dog'.")


def scales_of(scales: Any, adapters: Iterable[str]) -> Mapping[str, Any]:
    """Scales by name: one that is not by name is of all.

    Raises:
        ConfigError: for a scale of what is not there.
    """
    by_name = scales if isinstance(scales, Mapping) else {} if scales is None else dict.fromkeys(adapters, scales)
    for given in by_name:
        if given not in (there := list(adapters)):
            check_called(given)
            raise ConfigError(f"There is a scale for {given!r}, which is not attached. {nearest(given, there)}")
    return by_name


def open_for(adapters: Iterable[Adapter], model: str = "auto") -> BaseModel:
    """Opens `model`; for `auto` the one that the first of the adapters names.

    Raises:
        ModelError: see `open_base`.
    """
    first = next(iter(adapters), None)
    own = None if first is None else (first.info.get("base") or {}).get("id")
    return open_base(str(own), named_by="the adapter") if model == "auto" and own else open_base(model)


def load_pipeline(
    adapters: Mapping[str, str | Path | Adapter] | str | Path | Adapter,
    model: str = "auto",
    scales: Mapping[str, float] | float | None = None,
    force: bool = False,
) -> Any:
    """A `StableDiffusionPipeline` with adapters on it, each with its own scale, in fp32 on the CPU; its `to` moves and casts
    the adapters too.

    Warns where an adapter was trained with a `clip_skip`, which a pipeline is told at each call.

    Args:
        adapters: name -> file, run folder or `Adapter`; or one of these.
        model: the base model; `auto` takes the one that the first adapter names.
        scales: name -> scale, 1 where not given; or one scale for all.
        force: see `check_base`.

    Raises:
        ConfigError: for adapters without names, and a scale of what is not there.
        AdapterFileError, ModelError, TargetError: see `load_adapter`, `open_base` and `apply`.
    """
    adapters = named(adapters)
    by_name = scales_of(scales, adapters)
    loaded = {n: a if isinstance(a, Adapter) else load_adapter(a) for n, a in adapters.items()}
    for name, adapter in loaded.items():
        check_draws(adapter, name)
    base = open_for(loaded.values(), model)
    follow_noise(base, loaded.values())
    inner = inner_names(loaded)
    for name, adapter in loaded.items():
        apply(base, adapter, inner[name], by_name.get(name, 1.0), force)
        if adapter.clip_skip != 1 and not base.is_xl:  # kohya writes it for SDXL too, where it is nothing
            warnings.warn(
                f"{name} was trained with clip_skip {adapter.clip_skip}, and the pipeline reads the last layer unless a call "
                f"says otherwise: pipe(…, clip_skip={adapter.clip_skip - 1}), as diffusers counts from 0. vl.generate does so "
                "by itself.",
                stacklevel=2,
            )
    return base.pipe
