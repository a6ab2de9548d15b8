"""A heat map of what adapters share."""

from pathlib import Path

from visionlora.lora.overlap import LayerOverlap, PairOverlap
from visionlora.report.overlap import draw_overlap


def test_names_are_no_formulas(tmp_path: Path) -> None:
    layer = LayerOverlap("unet.mid_block.$x^", 0.5, 0.5, 0.1, 0.5, 1.0, 1.0)
    draw_overlap([PairOverlap("dog$_{", "ink$^{", (layer,), 1.0, 1.0)], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
