"""Which step of how many a UNet is called for, told by its timestep."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.errors import ConfigError

TRAINED_TIMESTEPS = 1000
"""Of a UNet that is called without a pipeline's scheduler."""


class Moments:
    """Counts the steps of one sampling after the other.

    A step is one of those that the scheduler was asked for, also where it evaluates the model more than once for it (Heun,
    DPM2, the first steps of PNDM). Of a picture to start from the first timesteps are left out: 0 is the first step done, also
    of a sampling that is under way when counting begins.
    """

    def __init__(self, target: Any) -> None:
        """None yet.

        Args:
            target: what has the scheduler, if anything has.
        """
        self.target = target
        self._timesteps: Tensor | None = None
        self._under_way: Tensor | None = None
        self._levels = torch.zeros(0)
        self._first = self._last = 0
        self._warned = False

    def begin(self) -> None:
        """Steps count from now on: a sampling that goes on with the timesteps of now is under way."""
        scheduler = getattr(self.target, "scheduler", None)
        waits = getattr(scheduler, "step_index", 0) is None  # no step was done with them
        self._under_way = None if waits else getattr(scheduler, "timesteps", None)

    def at(self, timestep: Any) -> tuple[int, int]:
        """(step, steps) of a timestep: its place in the scheduler's list, or by its value where there is no scheduler."""
        value = float(torch.as_tensor(timestep).flatten()[0])
        scheduler = getattr(self.target, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is not None and len(timesteps):
            asked = getattr(scheduler, "num_inference_steps", None) or len(timesteps)
            if fresh := timesteps is not self._timesteps:  # every sampling sets them anew
                self._timesteps, self._levels = timesteps, levels(timesteps, asked)
            near = (self._levels - value).abs()
            if float(near.min()) < 0.5:
                count = len(self._levels)
                step, steps = int(near.argmin()), min(count, asked)
                step = step * steps // count
                if fresh or step < self._last:
                    begun = self._begun() if fresh and timesteps is self._under_way else None
                    self._first = step if begun is None else min(step, begun * steps // count)
                self._last = step
                return step - self._first, steps - self._first
            self._warn(value)
        return min(TRAINED_TIMESTEPS - 1, max(0, TRAINED_TIMESTEPS - 1 - round(value))), TRAINED_TIMESTEPS

    def _begun(self) -> int | None:
        """Which of the levels a sampling that is under way began with; None when nothing says it."""
        scheduler = self.target.scheduler
        count = len(scheduler.timesteps)
        # Schedulers that do not know leave the pipeline, which has left out those before.
        known = hasattr(scheduler, "begin_index")
        left = None if known else getattr(self.target, "num_timesteps", None)
        start = scheduler.begin_index or 0 if known else None if left is None else count - left
        if start is None or not 0 <= start < count:
            return None
        return int((self._levels - float(scheduler.timesteps[start])).abs().argmin())

    def _warn(self, value: float) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"Adapters that change from step to step follow the scheduler of their {type(self.target).__name__}, which has "
                f"no timestep {value:g}: another pipeline of the same UNet may have one of its own. Give both one scheduler "
                "(other.scheduler = pipe.scheduler), or attach the adapters to the other; until then a timestep stands for one "
                "of 1000 steps.",
                stacklevel=2,
            )


def levels(timesteps: Tensor, asked: int) -> Tensor:
    """The timesteps in order, each once where there are other than one for each step that was asked for."""
    values = timesteps.float().cpu()
    return values if len(values) == asked else torch.tensor(list(dict.fromkeys(values.tolist())))


READERS = ("input_ids", "pixel_values")
"""What text encoders and vision transformers are called with; these take any keyword, and need no timestep."""


def check_stepped(model: nn.Module) -> None:
    """Raises ConfigError when a model is not called with a timestep."""
    known = inspect.signature(model.forward).parameters
    passes_on = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in known.values())
    if "timestep" not in known and (not passes_on or any(name in known for name in READERS)):
        raise not_stepped(model)


def not_stepped(model: nn.Module) -> ConfigError:
    """What is said of a model that is not called with a timestep."""
    return ConfigError(
        f"Scales and compositions that change from step to step follow the timestep, which {type(model).__name__} is not "
        "given: they are for the UNets of diffusion models. Give a number, and another composition than switch and k-lora."
    )
