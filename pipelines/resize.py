"""Adapter file -> a smaller adapter file."""

from __future__ import annotations

from pathlib import Path

from visionlora.pipelines.convert import check_output, save_new

from visionlora.loaders import load_adapter
from visionlora.lora.arithmetic import Progress, Result, Size, resize_adapter


def resize(
    source: str | Path, output: str | Path, size: Size, to: str = "visionlora", overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:  # fmt: skip
    """The nearest LoRA of a smaller rank, or of the rank that keeps a share of ‖ΔW‖² in each module.

    Raises:
        AdapterFileError: when the source cannot be read or resized, or the result cannot be written.
        ConfigError: when the output exists or the size is out of range.
    """
    check_output(output, to, overwrite)
    result = resize_adapter(load_adapter(source), size, progress)
    save_new(result.adapter, output, to, overwrite)
    return result
