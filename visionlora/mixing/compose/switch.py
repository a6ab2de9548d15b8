"""LoRA Switch, arXiv 2402.16843, eq. 4: one adapter at a time, the next one after every τ steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from visionlora.errors import ConfigError
from visionlora.mixing.compose.base import Composition, Weights
from visionlora.mixing.scales import is_number, plain


class Switch(Composition):
    """At step t only adapter ⌊(t mod k·τ)/τ⌋ of the k that are not at scale 0 acts: no more work than a single adapter.

    Args:
        tau: steps until the next adapter's turn; 5 in the paper, where switching at every step distorts.
    """

    per_step: ClassVar[bool] = True

    def __init__(self, tau: int = 5) -> None:
        tau = plain(tau)
        if not is_number(tau) or tau < 1 or tau != int(tau):
            raise ConfigError(f"tau is {tau!r}; it must be a whole number of at least 1 step.")
        self.tau = tau

    def weights(self, names: Sequence[str], step: int, steps: int) -> Weights:
        """1 for the adapter whose turn it is."""
        turn = (step % (len(names) * self.tau)) // self.tau
        return {name: float(k == turn) for k, name in enumerate(names)}
