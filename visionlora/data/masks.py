"""Which parts of a picture are learned: from its own alpha channel, or from a grey picture of the same name or row.

In: `alpha`, a folder of masks or a column of them, and pictures that have been decoded. Out: for each picture the file of its
mask, or one line that says what is wrong with it; and `mask_of`, the mask itself.

Letters in shapes: `h`, `w` height and width of the upright picture in px.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from visionlora.config.folders import ALPHA
from visionlora.data.files import Names, composed, list_folder
from visionlora.data.images import Decoded, decode_noted, printable
from visionlora.data.wording import Meant, first_names, missing, no_pictures
from visionlora.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from visionlora.data.folder import ImageItem

DARK = 32
"""Of 255 levels: a mask that is darker than this all over is not meant so; most hold 0 and 1, or numbers of classes."""


Box = tuple[int, int, int, int]
"""Left, top, right and bottom, px."""


@dataclass(frozen=True)
class Masks:
    """Where the masks of the pictures of a folder are; pictures are named as messages name them."""

    files: Mapping[str, Path]
    """Picture -> file of its mask; the picture itself where its alpha channel is the mask."""
    folder: Path | None = None
    """Where they lie; None for alpha channels and columns."""
    column: str = ""
    """Of a parquet table, that they come from."""
    problems: Mapping[str, str] | None = None
    """Picture -> why it has no mask."""
    notes: tuple[str, ...] = ()

    def file_of(self, name: str) -> Path:
        """The file of a picture's mask.

        Raises:
            DataError: when there is none.
        """
        if self.problems and name in self.problems:
            raise DataError(self.problems[name])
        return self.files[name]

    def check(self, name: str, picture: Decoded) -> Box:
        """Where something of a picture is learned, by its mask, which is read.

        Raises:
            DataError: when there is none, it cannot be read, has another size, or is (nearly) black all over.
        """
        file = self.file_of(name)
        if self.folder is None and not self.column:
            return learned_box(self._checked_alpha(name, picture))
        shown, size = f"in the column {self.column!r}" if self.column else printable(file), picture.image.size
        mask = grey(decode_noted(file, shown=f"the mask of {name}" if self.column else None))
        if mask.shape != size[::-1]:
            raise DataError(
                f"{printable(name)} is {size[0]} x {size[1]} px, but its mask {shown} {mask.shape[1]} x {mask.shape[0]}; save "
                "the mask in the size of the upright picture"
            )
        if not mask.any():
            raise DataError(
                f"{printable(name)} has a mask that is black all over, {shown}, so nothing of it is learned; paint white "
                "where to learn, or remove both"
            )
        if mask.max() < DARK:
            raise DataError(
                f"{printable(name)} has a mask that is nearly black all over, {shown}: its brightest level is {mask.max()} of "
                "255, so hardly anything is learned; save it with 255 where to learn (often 1 is meant as white)"
            )
        return learned_box(mask)

    def _checked_alpha(self, name: str, picture: Decoded) -> npt.NDArray[np.uint8]:
        if picture.alpha is None:
            raise DataError(
                f"{printable(name)} has no alpha channel to take a mask from; cut out what is to be learned and save it as "
                "PNG, or move it to a folder without masks"
            )
        if picture.alpha.getextrema()[1] == 0:
            raise DataError(
                f"{printable(name)} is transparent all over, so nothing of it is learned; make opaque what is to be learned, "
                "or remove it"
            )
        return np.asarray(picture.alpha)


def find_masks(wanted: str, root: Path, pictures: Mapping[str, Path]) -> Masks:
    """The masks of a folder's pictures, none of them opened yet.

    A mask has the name of its picture and any ending of pictures; where there are several, the one with the same ending.

    Args:
        wanted: `alpha`, or a folder.
        root: the folder of the pictures.
        pictures: posix paths relative to it -> files.

    Raises:
        ConfigError: when it is the folder of the pictures itself, or `alpha` misspelt.
        DataError: when there is no such folder or nothing in it.
    """
    if wanted == ALPHA:
        return Masks(pictures)
    folder = Path(wanted).expanduser()
    if not folder.is_dir():
        if difflib.get_close_matches(wanted.lower(), [ALPHA]):
            raise ConfigError(f"masks is {wanted!r}; {nearest(wanted.lower(), [ALPHA])}")
        if folder.exists():
            raise DataError(f"masks: {printable(folder)} is a file; pass the folder that holds the masks, or alpha.")
        raise DataError(f"masks: {missing(folder)}")
    if folder.resolve() == root.resolve():
        raise ConfigError(
            f"masks: {printable(folder)} holds the pictures themselves; put the masks, by the same names, into a folder of "
            "their own."
        )
    listing = list_folder(folder)
    if not listing.pictures:
        raise DataError("masks: " + no_pictures(folder, listing, "is empty; put the masks into it, or pass another."))
    by_stem: dict[str, list[str]] = {}
    for name in listing.pictures:
        by_stem.setdefault(_stem(name), []).append(name)
    stems = Names(by_stem)
    used = {stems.find(_stem(name)) for name in pictures}
    unused = {stem: names[0] for stem, names in by_stem.items() if stem not in used}
    meant = Meant(unused)
    files, problems = {}, {}
    for name in pictures:
        found = by_stem.get(stems.find(_stem(name)) or "", [])
        same = [mask for mask in found if composed(mask) == composed(name)]
        if same or len(found) == 1:
            files[name] = folder / (same or found)[0]
        elif found:
            problems[name] = (
                f"{printable(name)} has several masks in {printable(folder)}: {first_names(found)}; keep one"
            )
        else:
            problems[name] = _no_mask(name, folder, unused, meant)
    notes = [f"masks without a picture, not used: {first_names(unused.values())}"] if unused else []
    return Masks(files, folder, problems=problems, notes=tuple(notes))


def masks_of_column(column: str, pictures: Mapping[str, Path], masks: Mapping[str, Path]) -> Masks:
    """The masks that a parquet table holds beside its pictures.

    Args:
        column: its name.
        pictures: name of the row -> file.
        masks: likewise, where the row has one.
    """
    missing = [name for name in pictures if name not in masks]
    problems = {
        name: f"{printable(name)} has nothing in the column {column!r} of masks; add one, white where to learn, or remove the "
        "row"
        for name in missing
    }
    files = {name: masks.get(name, path) for name, path in pictures.items()}
    return Masks(files, column=column, problems=problems)


def mask_of(item: ImageItem) -> npt.NDArray[np.float32] | None:
    """How much each pixel of `decode(item.path)` counts, float32 (h, w) in 0 … 1; None where all of it does.

    Raises:
        DataError: when the file can no longer be read.
    """
    if item.mask is None:
        return None
    decoded = decode_noted(item.mask)
    if item.mask != item.path:
        levels = grey(decoded)
    elif decoded.alpha is not None:
        levels = np.asarray(decoded.alpha)
    else:
        raise DataError(
            f"{printable(item.path)} has lost its alpha channel; leave the pictures as they are while in use"
        )
    return levels.astype(np.float32) / np.float32(255)


def learned_box(mask: npt.NDArray[np.uint8] | npt.NDArray[np.float32]) -> Box:
    """Around what is not black, or not nearly so where there is more than that.

    Args:
        mask: levels of 0 … 255, or floats of 0 … 1, (h, w); somewhere above zero.
    """
    dark = DARK if np.issubdtype(mask.dtype, np.integer) else DARK / 255
    seen = mask >= dark if mask.max() >= dark else mask > 0
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def grey(decoded: Decoded) -> npt.NDArray[np.uint8]:
    """The levels of a mask, uint8 (h, w): what is transparent is black, though `decode` puts it on white."""
    levels = np.asarray(decoded.image.convert("L"))
    if decoded.alpha is None:
        return levels
    on_black: npt.NDArray[np.int16] = levels.astype(np.int16) - 255 + np.asarray(decoded.alpha)
    return np.maximum(on_black, 0).astype(np.uint8)


def _no_mask(name: str, folder: Path, unused: Mapping[str, str], meant: Meant) -> str:
    close = meant.by(_stem(name))
    hint = f" (did you mean {printable(folder / unused[close])}?)" if close else ""
    add = printable(folder / PurePosixPath(name).with_suffix(".png"))
    return f"{printable(name)} has no mask{hint}; add {add}, white where to learn, or remove the picture"


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()
