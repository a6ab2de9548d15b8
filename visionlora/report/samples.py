"""The sample grid of a training run: the same prompts and seed, the adapter at different moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from visionlora.diffusion.sampling import SamplingConfig, draw
from visionlora.models.base import BaseModel
from visionlora.models.evaluation import evaluating
from visionlora.report.grid import draw_grid
from visionlora.report.listener import Listener
from visionlora.report.runfolder import RunFolder
from visionlora.training.learner import JointLearner


def sample_moments(steps: int, columns: int) -> list[int]:
    """The steps after which samples are drawn: evenly spread, the last one at the end.

    >>> sample_moments(300, 3)
    [100, 200, 300]
    """
    columns = min(columns, steps)
    return [round(steps * (i + 1) / columns) for i in range(columns)]


@dataclass
class SampleSheet:
    """Collects the columns of the grid while a run goes on."""

    base: BaseModel
    learner: JointLearner
    prompts: tuple[str, ...]
    size: int
    settings: SamplingConfig
    run: RunFolder
    tell: Listener
    columns: list[tuple[str, list[Image.Image]]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Tells whether columns fit beside one another: those of the same prompts, size and settings do."""
        return repr((self.prompts, self.size, self.settings))

    def draw_column(self, label: str, scale: float) -> None:
        """One picture per prompt at the adapter's present state; also kept one by one under `samples/`."""
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            self.tell.progress(f"Drawing samples ({label})", done, len(self.prompts))

        self.learner.set_scale(scale)
        with evaluating(self.learner.model):
            pictures = draw(self.base, self.prompts, self.size, self.settings, count)
        self.learner.set_scale(1.0)
        for (_, place), picture in zip(self.places(label), pictures, strict=True):
            self.run.write_picture(place, picture)
        self.columns.append((label, pictures))

    def places(self, label: str) -> list[tuple[str, str]]:
        """Pairs of prompt and picture path of a column, relative to the run folder."""
        folder = self.run.samples.name
        return [(p, f"{folder}/{label.replace(' ', '-')}_{i:02d}.png") for i, p in enumerate(self.prompts)]

    def read_columns(self, labels: Sequence[str]) -> None:
        """The columns that a run drew before it was cut off; one of which a picture is gone is left out, and said."""
        for label in labels:
            pictures = []
            try:
                for _, place in self.places(label):
                    with Image.open(self.run.path / place) as file:
                        pictures.append(file.convert("RGB"))
            except OSError:
                self.tell.say(f"{self.run.path / place} is missing, so the grid goes on without the column {label!r}.")
            else:
                self.columns.append((label, pictures))

    def grid(self, title: str) -> Image.Image:
        """Rows: prompts; columns: base, then the adapter as it learned."""
        cells = [[column[row] for _, column in self.columns] for row in range(len(self.prompts))]
        s = self.settings
        caption = f"seed {s.seed}, {s.steps} steps, guidance {s.guidance_scale:g}"
        return draw_grid(cells, self.prompts, [label for label, _ in self.columns], title=title, caption=caption)

    def last_samples(self) -> list[tuple[str, str]]:
        """Pairs of prompt and picture path of the newest column, relative to the run folder."""
        return self.places(self.columns[-1][0])
