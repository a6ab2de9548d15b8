"""Bars of an adapter's strength."""

from pathlib import Path

from visionlora.report.norms import draw_norms


def test_names_are_no_formulas(tmp_path: Path) -> None:
    draw_norms({"up $\\frac$": 1.0, "$x^": 2.0}, "dog$_{.safetensors$", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
