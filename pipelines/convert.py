"""Adapter file -> the same adapter in another format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from visionlora.atomic import check_new
from visionlora.errors import ConfigError, nearest
from visionlora.formats.embeddings import files_beside
from visionlora.loaders import adapter_of, check_format, check_name, load_adapter, save_adapter
from visionlora.lora.adapter import Adapter
from visionlora.lora.arithmetic import Result
from visionlora.report.runfolder import check_place


def convert(
    source: str | Path | Adapter | Result, output: str | Path, to: str = "visionlora", component: str = "",
    allow_partial: bool = False, overwrite: bool = False,
) -> Adapter:  # fmt: skip
    """Reads an adapter of any format and writes it in another.

    Args:
        source: a file or folder; or an adapter or result in memory.
        output: the file to write, or for `peft` the folder.
        to: see `visionlora.loaders.save_adapter`.
        component: write this part alone (`unet`, `text_encoder`), as PEFT's folders hold one.
        allow_partial: leave out tensors that nothing here takes.
        overwrite: replace what is there.

    Raises:
        AdapterFileError: when the source cannot be read, or the format cannot hold it: what is lost, which one keeps it.
        ConfigError: when the output exists, or no program would know an adapter by its name.
    """
    check_output(output, to, overwrite)
    adapter = load_adapter(source, allow_partial) if isinstance(source, (str, Path)) else adapter_of(source)
    if component:
        if component not in adapter.components:
            where = source if isinstance(source, (str, Path)) else "The adapter"
            raise ConfigError(f"{where} has no part {component!r}. {nearest(component, adapter.components)}")
        own = {token: {c: v for c, v in parts.items() if c == component} for token, parts in adapter.embeddings.items()}
        adapter = replace(
            adapter,
            modules={n: m for n, m in adapter.modules.items() if n.startswith(component + ".")},
            embeddings={token: parts for token, parts in own.items() if parts},
        )
    save_new(adapter, output, to, overwrite)
    return adapter


def check_output(output: str | Path, to: str, overwrite: bool) -> None:
    """Raises what can be said of an output before there is anything to write.

    Raises:
        AdapterFileError: when there is no such format.
        ConfigError: when other programs would not find an adapter under this name, or something is there already.
        RunFolderError: when nothing can be written there.
    """
    check_format(to)
    check_name(output, to)
    path = Path(output).expanduser()
    check_new(path, overwrite)
    check_place(path if to == "peft" else path.parent)


def save_new(adapter: Adapter, output: str | Path, to: str, overwrite: bool) -> None:
    """Writes an adapter, taking the place of nothing unless `overwrite`: not of its learned words' files either.

    Raises:
        AdapterFileError: when the format cannot hold it.
        ConfigError: when one of the files is there already; nothing is written then.
    """
    for file in files_written(adapter, output, to):
        check_new(file, overwrite)
    save_adapter(adapter, output, to)


def files_written(adapter: Adapter, output: str | Path, to: str) -> list[Path]:
    """What an adapter is written to: the output, and in diffusers' formats a file beside it for each learned word."""
    path = Path(output).expanduser()
    return [path, *(files_beside(path, adapter.embeddings).values() if to.startswith("diffusers") else ())]
