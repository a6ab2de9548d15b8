"""A picture -> how it was drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from visionlora.diffusion.recipe import Recipe, read_recipe
from visionlora.diffusion.uses import changed_since


@dataclass(frozen=True)
class Shown:
    """How a picture was drawn; as text its settings, and the command that draws it again."""

    recipe: Recipe
    changed: tuple[str, ...]
    """A line for each of its files that is not here or is no longer the same: the command draws another picture, or none."""

    @property
    def command(self) -> str:
        """Draws the picture again, byte for byte."""
        return self.recipe.command()

    def __str__(self) -> str:
        return self.recipe.described()


def show(picture: str | Path) -> Shown:
    """How a picture of ours was drawn.

    Raises:
        DataError: when there is no picture, or it has no recipe of ours.
    """
    recipe = read_recipe(Path(picture).expanduser())
    return Shown(recipe, tuple(changed_since(recipe)))
