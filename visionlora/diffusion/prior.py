"""Pictures of the class that a subject belongs to: those of a folder, and drawn ones where there are too few."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from visionlora.atomic import replace_file
from visionlora.data.files import list_folder
from visionlora.data.folder import ImageItem, read_image_folder
from visionlora.diffusion.recipe import Recipe, png_bytes, read_recipe
from visionlora.diffusion.sampling import SamplingConfig, draw
from visionlora.diffusion.settings import BASE_DTYPES
from visionlora.errors import DataError
from visionlora.models.base import BaseModel

DTYPES = {dtype: word for word, dtype in BASE_DTYPES.items()}


def draw_missing(
    base: BaseModel, folder: Path, prompt: str, there: int, count: int, size: int, guidance_scale: float, seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:  # fmt: skip
    """Fills a folder up to `count` pictures of the class, drawn by the base from the class's caption; how many were drawn.

    Each carries its recipe, whose name it has: what is there is not drawn again.

    Args:
        base: without any adapter.
        folder: made when it is not there.
        prompt: caption of the class.
        there: pictures of the class that are there, see `class_pictures`.
        count: pictures that should be there.
        size: of a drawn picture, px.
        guidance_scale: of drawing.
        seed: of the first picture.
        progress: called with (pictures there, pictures in all).
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = 0
    while there + drawn < count:
        recipe = Recipe(
            prompt, base.id, size, size, seed=seed, guidance_scale=guidance_scale, clip_skip=base.clip_skip,
            precision=DTYPES.get(base.pipe.unet.dtype, "fp32"),
        )  # fmt: skip
        path = folder / recipe.file_name
        if not path.exists():
            settings = SamplingConfig(recipe.steps, recipe.guidance_scale, recipe.seed)
            (picture,) = draw(base, [prompt], size, settings)
            replace_file(path, png_bytes(picture, recipe))
            drawn += 1
        seed += 1
        if progress is not None:
            progress(there + drawn, count)
    return drawn


def is_of(picture: Path, prompt: str, base: BaseModel) -> bool:
    """Whether a picture is of the class: not one that was drawn for another caption, or by a model of another name."""
    try:
        recipe = read_recipe(picture)
    except DataError:  # the user's own
        return True
    return recipe.prompt == prompt and Path(recipe.model).name == Path(base.id).name


def class_pictures(folder: Path, prompt: str, skip_broken: bool, base: BaseModel) -> tuple[tuple[ImageItem, ...], int]:
    """The pictures of the class, all with its caption, and how many others lie there; see `is_of`. None without a folder.

    Raises:
        DataError: for pictures that cannot be used.
    """
    if not folder.is_dir() or not list_folder(folder).pictures:
        return (), 0
    found = read_image_folder(folder, prompt, skip_broken=skip_broken).items
    own = tuple(item for item in found if is_of(item.path, prompt, base))
    return own, len(found) - len(own)


def check_class_folder(folder: Path, subjects: Iterable[str]) -> None:
    """Refuses pictures of the class that are the subject's: the one would undo the other.

    Args:
        folder: of the class.
        subjects: folders to learn from; empty ones count for none.

    Raises:
        DataError: when it is one of them, in one, or around one: folders are read with their subfolders.
    """
    own = folder.expanduser().resolve()
    for name in filter(None, subjects):
        subject = Path(name).expanduser().resolve()
        if own == subject:
            how = "is also the folder to learn from"
        elif own.is_relative_to(subject) or subject.is_relative_to(own):
            how = f"lies {'in' if own.is_relative_to(subject) else 'around'} {name}, the folder to learn from"
        else:
            continue
        raise DataError(
            f"prior_images is {folder}, which {how}: what is learned would be held back. Name another folder, beside it; it "
            "is filled with pictures that the base draws. Or leave it out: the base's own predictions then keep the class."
        )
