"""LoRA Composite, arXiv 2402.16843, eq. 5: the mean of the predictions that each adapter gives alone."""

from __future__ import annotations

from collections.abc import Sequence

from visionlora.mixing.compose.base import Composition


class Composite(Composition):
    """Every step evaluates the model once per adapter that is not at scale 0, all in one batch, and averages."""

    def evaluations(self, names: Sequence[str]) -> list[dict[str, float]]:
        """One adapter each."""
        return [{other: float(other == name) for other in names} for name in names]
