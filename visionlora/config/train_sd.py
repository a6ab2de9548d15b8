"""Settings of `visionlora train-sd`."""

from __future__ import annotations

from dataclasses import dataclass

from visionlora.config.training import Rule, TrainingConfig


@dataclass(frozen=True)
class TrainSDConfig(TrainingConfig):
    """Everything `visionlora train-sd` can be told; `model` is a diffusers folder, a checkpoint or a Hub id."""

    prompt: str | None = None
    """One caption for every picture; without it captions come from the folder."""
    resolution: int | None = None
    """Width and height in px; the model's own when not given."""
    caption_dropout: float = 0.05
    """Share of captions replaced by the empty one, which keeps guidance working."""
    timestep_range: tuple[int, ...] = (0, 1000)
    """Noise levels that are learned, of 1000: `0,600` leaves composition, which is settled at high noise, to the base."""
    flip: bool = False
    """Mirror half of the pictures (each time anew)."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of the sample grid; by default some captions of the pictures."""
    sample_columns: int = 3
    """Columns of the grid beside the base: the adapter at so many moments of training."""
    validation: str | None = None
    """Folder of pictures that are not trained on, by which one sees whether it learned."""
    val_share: float = 0.0
    """Share of the pictures that is kept apart for that, instead of `validation`."""
    checkpoints: int = 10
    """How often the state is saved, from which `resume` goes on, and the validation pictures are looked at."""
    sample_steps: int = 20
    """Denoising steps per sample picture."""
    guidance_scale: float | None = None
    """Classifier-free guidance of the samples; by default what suits the base model."""

    def rules(self) -> list[Rule]:
        """What must hold."""
        return [
            *super().rules(),
            ("resolution", self.resolution is None or self.resolution >= 1, "it must be at least 1 px"),
            ("caption_dropout", 0 <= self.caption_dropout <= 1, "it must be between 0 and 1"),
            (
                "timestep_range",
                len(self.timestep_range) == 2 and 0 <= self.timestep_range[0] < self.timestep_range[1] <= 1000,
                "it must be two whole numbers, the first below the second, in 0 … 1000",
            ),
            ("val_share", 0 <= self.val_share < 1, "it must be at least 0 and below 1"),
            (
                "val_share",
                not (self.val_share and self.validation),
                "a validation folder is given: leave one of them out",
            ),
            (
                "patience",
                self.patience is None or bool(self.val_share or self.validation),
                "it needs pictures that are not trained on: give val_share or validation",
            ),
            ("checkpoints", self.checkpoints >= 1, "it must be at least 1"),
            ("sample_columns", self.sample_columns >= 1, "it must be at least 1"),
            ("sample_steps", self.sample_steps >= 1, "it must be at least 1"),
            (
                "guidance_scale",
                self.guidance_scale is None or self.guidance_scale >= 1,
                "it must be at least 1 (no guidance)",
            ),
        ]
