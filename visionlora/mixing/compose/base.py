"""What every composition is; as it stands, the plain sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from visionlora.lora.adapter import Adapter

Weights = Mapping[str, "float | Mapping[str, float]"]
"""Adapter -> factor, or factors by the names of its modules (`unet.mid_block…`)."""


class Composition:
    """The plain sum: every adapter acts in every layer at every step, at its own scale.

    A composition may change adapters once (`prepare`), weigh them at every step (`weights`), or evaluate the model several
    times in one batch, each time with other adapters, and blend the outputs (`evaluations`, `blend`).

    An adapter at scale 0 takes no part. At a step it counts as 0 where it changes nothing in the model, in whatever layer and
    on whatever picture of the batch; one that acts somewhere takes part everywhere.
    """

    per_step: ClassVar[bool] = False
    """Whether `weights` depends on the step."""
    skips_silent: ClassVar[bool] = False
    """Whether `prepare` leaves adapters of scale 0 out of account. It sees none of the layers whose blocks are at 0 then."""

    def prepare(self, adapters: Mapping[str, Adapter], scales: Mapping[str, float]) -> dict[str, Adapter]:
        """The adapters to attach in place of these.

        Args:
            adapters: by name, in order.
            scales: their strengths, 0 for those that are 0 at every step or on every picture too.
        """
        return dict(adapters)

    def weights(self, names: Sequence[str], step: int, steps: int) -> Weights:
        """Factors at one step (counted from 0) of the adapters that act at it, at least one; 1 for those not named."""
        return {}

    def evaluations(self, names: Sequence[str]) -> list[dict[str, float]]:
        """Factors of the adapters that act at a step, at least one, in each evaluation; none for a single ordinary one."""
        return []

    def blend(self, outputs: Tensor) -> Tensor:
        """(evaluations, b, ...) -> (b, ...)."""
        return outputs.mean(0)
