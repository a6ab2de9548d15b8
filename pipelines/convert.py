"""Adapter file -> the same adapter in another format."""

from __future__ import annotations

from pathlib import Path

from visionlora.atomic import check_new
from visionlora.loaders import load_adapter, save_adapter
from visionlora.lora.adapter import Adapter


def convert(
    source: str | Path, output: str | Path, to: str = "visionlora", allow_partial: bool = False, overwrite: bool = False
) -> Adapter:
    """Reads an adapter of any format and writes it in another.

    Args:
        source: a file or folder.
        output: the file to write, or for `peft` the folder.
        to: see `visionlora.loaders.save_adapter`.
        allow_partial: leave out tensors that nothing here takes.
        overwrite: replace what is there.

    Raises:
        AdapterFileError: when the source cannot be read, or the format cannot hold it: what is lost, which one keeps it.
        ConfigError: when the output exists.
    """
    check_new(Path(output).expanduser(), overwrite)
    adapter = load_adapter(source, allow_partial)
    save_adapter(adapter, output, to)
    return adapter
