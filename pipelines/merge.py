"""Adapter files, each with a scale -> one adapter file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from visionlora.pipelines.convert import save_new

from visionlora.atomic import check_new
from visionlora.errors import ConfigError
from visionlora.loaders import load_adapter
from visionlora.lora.arithmetic import Progress, Result, Size, merge_adapters
from visionlora.lora.combine import Options


def merge(
    sources: Sequence[tuple[str | Path, float]], output: str | Path, method: str = "sum", size: Size | None = None,
    options: Options | None = None, to: str = "visionlora", overwrite: bool = False, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """Merges adapters of any formats into one LoRA; see `visionlora.lora.arithmetic.merge_adapters`.

    Raises:
        AdapterFileError: when a source cannot be read or merged, or the result cannot be written.
        ConfigError: when the output exists, a setting is out of range or a scale not finite.
    """
    for path, scale in sources:
        if not math.isfinite(scale):
            raise ConfigError(f"The scale of {path} is {scale}; it must be a finite number, such as 0.8.")
    check_new(Path(output).expanduser(), overwrite)
    adapters = [(load_adapter(path), scale) for path, scale in sources]
    result = merge_adapters(adapters, method, size, options, progress)
    save_new(result.adapter, output, to, overwrite)
    return result
