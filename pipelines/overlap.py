"""Adapter files -> what they share, pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from visionlora.atomic import check_picture
from visionlora.errors import AdapterFileError, ConfigError
from visionlora.formats.called import names_of
from visionlora.loaders import adapter_of
from visionlora.lora import overlap as factors
from visionlora.lora.adapter import Adapter
from visionlora.lora.arithmetic import additive
from visionlora.lora.overlap import PairOverlap


def overlap(
    adapters: Iterable[str | Path] | Mapping[str, Any], picture: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None, overwrite: bool = False,
) -> list[PairOverlap]:  # fmt: skip
    """What adapters of one base model share, and how to compose them; see `visionlora.lora.overlap`.

    Args:
        adapters: two or more files or run folders; or by name, where adapters and results in memory may be too.
        picture: a PNG to draw a heat map by block to.
        progress: called with (pairs done, pairs).
        overwrite: replace a picture that is there.

    Raises:
        ConfigError: when there are fewer than two, one is no adapter, or the picture cannot be written there.
        AdapterFileError: when a file cannot be read, or ΔW of a layer depends on the base.
    """
    if picture is not None:
        check_picture(Path(picture).expanduser(), overwrite)
    given = adapters if isinstance(adapters, Mapping) else by_name(adapters)
    named = {name: adapter_of(place) for name, place in given.items()}
    for name, adapter in named.items():
        check_comparable(given[name] if isinstance(given[name], (str, Path)) else name, adapter)
    pairs = factors.overlap(named, progress)
    if picture is not None:
        from visionlora.report.overlap import draw_overlap

        draw_overlap(pairs, Path(picture).expanduser())
    return pairs


def by_name(paths: Iterable[str | Path]) -> dict[str, str | Path]:
    """Paths by names that tell them apart.

    Raises:
        ConfigError: when one is no path.
    """
    listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
    for path in listed:
        if not isinstance(path, (str, Path)):
            raise ConfigError(
                f"A {type(path).__name__} has no name of its own: give adapters in memory by name, such as {{'dog': adapter}}."
            )
    return dict(zip(names_of(listed), listed, strict=True))


def check_comparable(path: str | Path, adapter: Adapter) -> None:
    """Raises AdapterFileError, which names the file, when ΔW of a layer depends on the base."""
    for layer, module in adapter.modules.items():
        try:
            if module.kind != "shift":
                additive(layer, module, "compared")
        except AdapterFileError as e:
            raise AdapterFileError(f"{path}: {e}") from None
