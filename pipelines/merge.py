"""Adapter files, each with a scale -> one adapter file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visionlora.pipelines.convert import check_output, save_new

from visionlora.config.generate import use_from
from visionlora.diffusion.uses import check_once
from visionlora.errors import ConfigError
from visionlora.loaders import load_adapter
from visionlora.lora.adapter import Adapter
from visionlora.lora.arithmetic import Progress, Result, Size, merge_adapters
from visionlora.lora.combine import Options
from visionlora.mixing.compose.balanced import scaled
from visionlora.mixing.scales import block_factors, scale_in_file


def merge(
    sources: Sequence[tuple[Any, ...]], output: str | Path, method: str = "sum", size: Size | None = None,
    options: Options | None = None, to: str = "visionlora", overwrite: bool = False, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """Merges adapters of any formats into one LoRA; see `visionlora.lora.arithmetic.merge_adapters`.

    Args:
        sources: each (path, scale) or (path, scale, factors by block), as in `GenerateConfig.loras`.
        output: the file to write, or for `peft` the folder.
        method: see `merge_adapters`, as size, options and progress.
        size: of the result.
        options: of the method.
        to: see `visionlora.loaders.save_adapter`.
        overwrite: replace what is there.
        progress: called with (modules done, modules).

    Raises:
        AdapterFileError: when a source cannot be read or merged, or the result cannot be written.
        ConfigError: when the output exists, a source is given twice, a setting is out of range or a scale not finite.
    """
    uses = [use_from(source) for source in sources]
    for path, scale, _ in uses:
        if not math.isfinite(scale):
            raise ConfigError(f"The scale of {path} is {scale}; it must be a finite number, such as 0.8.")
    check_once(uses)
    check_output(output, to, overwrite)
    adapters = [(in_blocks(load_adapter(path), path, blocks), scale) for path, scale, blocks in uses]
    result = merge_adapters(adapters, method, size, options, progress)
    save_new(result.adapter, output, to, overwrite)
    return result


def in_blocks(adapter: Adapter, path: str, blocks: Mapping[str, float]) -> Adapter:
    """An adapter with ΔW times the factors of its blocks, as it would act when drawn with.

    Raises:
        ConfigError: when a word reaches none of its layers, or is of steps.
    """
    scale = scale_in_file(path, 1.0, blocks)
    if not blocks:
        return adapter
    layers = {name: (name.partition(".")[0], name.partition(".")[2]) for name in adapter.modules}
    factors = block_factors(scale, layers.values())
    return scaled(adapter, {name: factors[layer] for name, layer in layers.items()})
