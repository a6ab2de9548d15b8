"""Pictures are decoded once, kept by content, and never served stale."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import visionlora.data.decoded as decoded
import visionlora.data.facts as facts
import visionlora.data.pixels as pixels
from visionlora.data.alike import perceptual_hash, thumbnail
from visionlora.data.classes import read_labelled
from visionlora.data.decoded import Checked, check_pictures
from visionlora.data.images import decode, decode_again
from visionlora.data.labelled import LabelledData, LabelledItem
from visionlora.data.pixels import Writer
from visionlora.data.preprocess import Preprocessing
from visionlora.errors import DataError

SMALL = Preprocessing(size=8)


def picture(path: Path, seed: int, side: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for i in range(6):
        picture(tmp_path / "pets" / ("cat", "dog")[i % 2] / f"{i}.png", i)
    return tmp_path / "pets"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the files that were decoded, in order."""
    names: list[str] = []

    def noted(path: Path, shown: str | None = None) -> Any:
        names.append(path.name)
        return decode_noted(path, shown)

    def again(path: Path) -> Image.Image:
        names.append(path.name)
        return decode_again(path)

    decode_noted = facts.decode_noted
    monkeypatch.setattr(facts, "decode_noted", noted)
    for module in (decoded, pixels):
        monkeypatch.setattr(module, "decode_again", again)
    yield names


def checked(root: Path, cache: Path | None, **options: Any) -> Checked:
    return check_pictures(read_labelled(root), options.pop("preprocessing", SMALL), cache, **options)


def said(root: Path, cache: Path | None = None, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        checked(root, cache, **options)
    return str(caught.value)


def check_content(result: Checked, preprocessing: Preprocessing = SMALL) -> None:
    """All that is said of the pictures agrees with their files."""
    paths = [item.path for item in result.data.items]
    assert len(result.pictures) == len(paths)
    for i, path in enumerate(paths):
        image = decode(path)
        assert result.sha256[i] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert int(result.hashes[i]) == perceptual_hash(image)
        np.testing.assert_array_equal(result.thumbnails[i], thumbnail(image))
        np.testing.assert_array_equal(result.pictures.stored([i])[0], preprocessing.stored(image))


@pytest.mark.parametrize("preprocessing", [SMALL, Preprocessing(7, interpolation="nearest", crop_pct=0.5)])
def test_what_is_kept_is_what_is_decoded(pets: Path, cache: Path, preprocessing: Preprocessing) -> None:
    result = checked(pets, cache, preprocessing=preprocessing)
    check_content(result, preprocessing)
    assert result.data == read_labelled(pets)
    assert result.notes == ()
    assert result.pictures.on_disk
    assert (result.hashes.dtype, result.thumbnails.shape) == (np.uint64, (6, 16, 16, 3))
    squares = result.pictures.stored([4, 0, 4])
    side = preprocessing.stored_size
    assert (squares.shape, squares.dtype) == ((3, side, side, 3), np.uint8)
    squares[:] = 0  # an array of its own
    check_content(result, preprocessing)
    assert result.pictures.stored([]).shape == (0, side, side, 3)


def test_pictures_are_decoded_once(pets: Path, cache: Path, opened: list[str]) -> None:
    seen: list[tuple[int, int]] = []
    first = checked(pets, cache, progress=lambda done, total: seen.append((done, total)))
    assert opened == ["0.png", "2.png", "4.png", "1.png", "3.png", "5.png"]
    assert seen == [(i, 6) for i in range(1, 7)]
    again = checked(pets, cache, progress=lambda done, total: seen.append((done, total)))
    assert (len(opened), len(seen)) == (6, 6)
    check_content(again)
    assert again.sha256 == first.sha256
    assert sorted(p.suffix for p in cache.iterdir()) == [".npy", ".npz"]  # nothing temporary is left


def test_a_new_picture_is_decoded_alone(pets: Path, cache: Path, opened: list[str]) -> None:
    checked(pets, cache)
    opened.clear()
    picture(pets / "cat" / "1b.png", 9)
    check_content(checked(pets, cache))
    assert opened == ["1b.png"]  # the pixels of the others are copied from the file before
    opened.clear()
    os.utime(pets / "cat" / "1b.png", ns=(5, 5))
    check_content(checked(pets, cache))
    assert opened == ["1b.png"]  # touched but of the same content: the file of pixels is still good


def test_pixels_of_other_data_sets_are_copied_where_they_are_the_same(
    pets: Path, cache: Path, opened: list[str]
) -> None:
    checked(pets, cache)
    (pets / "cat" / "0.png").rename(pets / "cat" / "00.png")
    (pets / "dog" / "1.png").unlink()
    opened.clear()
    check_content(checked(pets, cache))
    assert opened == ["00.png"]  # to know what it is; five rows are those of the file before
    for path in cache.glob("pictures-*.npy"):
        path.write_bytes(path.read_bytes()[:-1])  # of an older version, or cut off: it does not say what its rows are
    (pets / "dog" / "3.png").unlink()
    opened.clear()
    check_content(checked(pets, cache))
    assert len(opened) == 4


def test_another_preprocessing_has_a_file_of_its_own(pets: Path, cache: Path) -> None:
    for preprocessing in (SMALL, Preprocessing(9), SMALL):
        check_content(checked(pets, cache, preprocessing=preprocessing), preprocessing)
    assert len(list(cache.glob("pictures-*.npy"))) == 2


def test_changed_content_is_never_served(pets: Path, cache: Path) -> None:
    checked(pets, cache)
    target = pets / "cat" / "0.png"
    before = target.stat()
    picture(target, 77)
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    check_content(checked(pets, cache))
    target.unlink()  # another file by way of a link
    target.symlink_to(picture(pets.parent / "else.png", 78))
    check_content(checked(pets, cache))


def test_a_picture_that_changes_while_it_is_read(pets: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path, shown: str | None = None) -> Any:
        result = noted(path, shown)
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
        return result

    noted = facts.decode_noted
    monkeypatch.setattr(facts, "decode_noted", read)
    assert "cat/0.png was changed while it was read; start again when it is complete" in said(pets, cache)


@pytest.mark.parametrize("content", [b"", b"half", None])
def test_broken_cache_files_are_made_anew(pets: Path, cache: Path, content: bytes | None) -> None:
    checked(pets, cache)
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:-50] if content is None else content)
        check_content(checked(pets, cache))


def test_pictures_that_are_not_kept(pets: Path, cache: Path, opened: list[str]) -> None:
    result = checked(pets, None)
    check_content(result)
    assert not result.pictures.on_disk
    assert result.notes == ("pictures are decoded anew each time they are used: no cache folder is used",)
    result = checked(pets, cache, cache_limit=6 * 8 * 8 * 3 - 1)
    check_content(result)
    assert result.notes == (
        "pictures are decoded anew each time they are used: kept on disk they would take 0.0 GB, more than the limit of "
        "0.0 GB",
    )
    assert checked(pets, cache, cache_limit=6 * 8 * 8 * 3).pictures.on_disk
    opened.clear()
    assert not checked(pets, cache, cache_limit=1).pictures.on_disk
    assert opened == []  # what is known of the files is kept all the same


def test_a_cache_that_cannot_be_written(pets: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = checked(pets, tmp_path / "file" / "cache")
    check_content(result)
    assert result.notes == (
        f"pictures are decoded anew each time they are used: {tmp_path}/file/cache cannot be written (Not a directory)",
    )


def test_a_full_disk(pets: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, square: Any) -> None:
        if self.n == 3:
            raise OSError(28, "No space left on device")
        add(self, square)

    add = Writer.add
    monkeypatch.setattr(Writer, "add", full)
    result = checked(pets, cache)
    check_content(result)
    assert result.notes[0].endswith("cannot be written (No space left on device)")
    assert [p.suffix for p in cache.iterdir()] == [".npz"]


def test_what_a_killed_pass_left_is_removed(pets: Path, cache: Path) -> None:
    cache.mkdir()
    left, other = cache / ".pictures.new.1.7f.tmp", cache / ".else.tmp"
    for file in (left, other):
        file.write_bytes(b"half")
    living = Writer(cache, "new", 8)
    check_content(checked(pets, cache))
    assert (left.exists(), other.exists(), living.path.exists()) == (False, True, True)
    living.remove()
    assert sorted(p.suffix for p in cache.iterdir()) == [".npy", ".npz", ".tmp"]


@pytest.mark.parametrize("limit", [1, 4 << 30])
def test_an_interrupted_pass_keeps_what_it_has_found(pets: Path, cache: Path, opened: list[str], limit: int) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checked(pets, cache, cache_limit=limit, progress=interrupt)
    assert [p.suffix for p in cache.iterdir()] == [".npz"]
    opened.clear()
    check_content(checked(pets, cache, cache_limit=limit))
    assert opened[:2] == ["3.png", "5.png"]


def test_broken_pictures(pets: Path, cache: Path, opened: list[str]) -> None:
    (pets / "cat" / "x.png").write_text("my notes")
    (pets / "dog" / "y.png").touch()
    lines = [
        "cat/x.png is not a picture (its content is text); remove it or rename it",
        "dog/y.png is empty (0 bytes); copy it again from its source, or remove it",
    ]
    assert said(pets, cache) == (
        f"{pets} has 2 problems:\n  {lines[0]}\n  {lines[1]}\n"
        "Fix this, or pass --skip-broken to leave out what cannot be used and go on with 6 pictures."
    )
    for _ in range(2):
        result = checked(pets, cache, skip_broken=True)
        check_content(result)
        assert [item.path.name for item in result.data.items] == ["0.png", "2.png", "4.png", "1.png", "3.png", "5.png"]
        assert result.notes == tuple(f"left out: {line}" for line in lines)
    assert opened[-2:] == ["x.png", "y.png"]  # only what is not known yet


def test_a_class_without_pictures(pets: Path) -> None:
    for i in (0, 2, 4):
        (pets / "cat" / f"{i}.png").write_bytes(b"")
    message = said(pets, skip_broken=True).splitlines()
    assert message[-2:] == [
        '  class "cat" has no picture left; add some, or remove the class',
        "Fix this first. --skip-broken passes over some of it, but not all.",
    ]


def test_nothing_left(pets: Path) -> None:
    for path in pets.rglob("*.png"):
        path.write_bytes(b"")
    message = said(pets, skip_broken=True).splitlines()
    assert message[0] == f"{pets} has 6 problems:"
    assert message[-1] == "Fix this first: no usable picture is left."


def test_the_same_picture_in_two_classes(pets: Path) -> None:
    (pets / "dog" / "z.png").write_bytes((pets / "cat" / "0.png").read_bytes())
    assert said(pets, skip_broken=True) == (
        f"{pets} has 1 problem:\n  cat/0.png (cat) and dog/z.png (dog) are the same picture; remove one\nFix this first."
    )


def test_copies_of_one_class_are_counted(pets: Path, cache: Path) -> None:
    for name in ("z1.png", "z2.png"):
        (pets / "cat" / name).write_bytes((pets / "cat" / "0.png").read_bytes())
    result = checked(pets, cache)
    check_content(result)
    assert result.notes == (
        "2 pictures are an exact copy of another of the same class; copies stay on one side of a split",
    )


def test_copies_need_not_stay_together_where_the_data_names_its_splits(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{i}.png", 0) for i in range(2)]
    items = (LabelledItem(paths[0], (0,), "train"), LabelledItem(paths[1], (0,), "test"))
    data = LabelledData(tmp_path, ("a",), items, False, (), "")
    assert check_pictures(data, SMALL, tmp_path / "cache").notes == (
        "1 picture is an exact copy of another of the same class",
    )


def test_the_same_picture_with_different_labels(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{i}.png", 0) for i in range(2)]
    items = (LabelledItem(paths[0], (0, 1)), LabelledItem(paths[1], (0,)))
    data = LabelledData(tmp_path, ("a", "b"), items, True, (), "")
    assert check_pictures(data, SMALL, tmp_path / "cache").notes[0] == (
        "the same picture with different labels: 0.png (a, b), 1.png (a)"
    )


def test_conversions_are_noted_also_from_the_cache(pets: Path, cache: Path) -> None:
    for i in range(2):
        Image.new("RGBA", (4, 4), (i, 0, 0, 0)).save(pets / "cat" / f"clear{i}.png")
    for _ in range(2):
        assert checked(pets, cache).notes == ("transparent, put on white: cat/clear0.png, cat/clear1.png",)


def test_strange_file_names(pets: Path, cache: Path, opened: list[str]) -> None:
    picture(pets / "cat" / "a\nb\udcff.png", 50)
    check_content(checked(pets, cache))
    opened.clear()
    check_content(checked(pets, cache))
    assert opened == []


def test_a_picture_that_goes_while_it_is_in_use(pets: Path) -> None:
    result = checked(pets, None)
    (pets / "cat" / "0.png").unlink()
    with pytest.raises(DataError, match=r"cat/0.png could be read before but not any more \(.*No such file"):
        result.pictures.stored([0])
