"""What is known of pictures from before."""

import os
from pathlib import Path

import pytest
from PIL import Image

from visionlora.data import facts, masks
from visionlora.data.facts import FactsOfFolder
from visionlora.data.folder import read_image_folder
from visionlora.data.images import decode_noted
from visionlora.errors import DataError


@pytest.fixture
def dog(tmp_path: Path) -> Path:
    (tmp_path / "dog").mkdir()
    for k in range(3):
        mode = "CMYK" if k == 2 else "RGB"  # converted, which is said
        Image.effect_noise((24, 16), 60).convert(mode).save(tmp_path / "dog" / f"{k}.{'tif' if k == 2 else 'png'}")
    return tmp_path / "dog"


def test_a_second_start_reads_only_what_has_changed(dog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_image_folder(dog, cache=tmp_path / "c")
    looked: list[str] = []
    look = facts.decode_noted
    monkeypatch.setattr(facts, "decode_noted", lambda path, shown: (looked.append(shown), look(path, shown))[1])
    second = read_image_folder(dog, cache=tmp_path / "c")
    assert second == first and [i.size for i in second.items] == [(16, 24)] * 3 and looked == []
    assert any("2.tif" in note for note in second.notes)
    Image.new("RGB", (8, 8)).save(dog / "1.png")
    third = read_image_folder(dog, cache=tmp_path / "c")
    assert looked == ["1.png"] and third.items[1].sha256 != first.items[1].sha256


def test_a_broken_file_of_facts_is_none(dog: Path, tmp_path: Path) -> None:
    first = read_image_folder(dog, cache=tmp_path / "c")
    (file,) = (tmp_path / "c").glob("facts-*.npz")
    file.write_bytes(b"PK broken")
    assert read_image_folder(dog, cache=tmp_path / "c") == first
    assert FactsOfFolder(tmp_path / "c", dog, [dog / "0.png"]).of(dog / "0.png") is not None


def test_another_file_of_the_same_size_and_date_is_another(dog: Path, tmp_path: Path) -> None:
    old, new = dog / "0.png", tmp_path / "new.png"
    Image.effect_noise((24, 16), 60).convert("RGB").save(new)
    new.write_bytes(new.read_bytes().ljust(old.stat().st_size, b"\0"))
    old.write_bytes(old.read_bytes().ljust(new.stat().st_size, b"\0"))
    first = read_image_folder(dog, cache=tmp_path / "c")
    before = old.stat()
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(old)
    assert (old.stat().st_size, old.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert read_image_folder(dog, cache=tmp_path / "c").items[0].sha256 != first.items[0].sha256


@pytest.mark.parametrize("kind", ["folder", "alpha"])
def test_masks_are_read_again_only_where_they_or_their_pictures_changed(
    dog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (dog / "2.tif").unlink()
    for k in range(2):
        picture, mask = Image.effect_noise((24, 16), 60), Image.new("L", (24, 16), 255)
        mask.paste(0, (0, 0, 5, 6))
        if kind == "alpha":
            Image.merge("LA", (picture, mask)).save(dog / f"{k}.png")
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / "masks" / f"{k}.png")
    where = str(tmp_path / "masks") if kind == "folder" else "alpha"
    first = read_image_folder(dog, masks=where, cache=tmp_path / "c")
    opened: list[str] = []
    for module in (facts, masks):
        monkeypatch.setattr(
            module, "decode_noted", lambda path, shown=None: (opened.append(str(path)), decode_noted(path, shown))[1]
        )
    again = read_image_folder(dog, masks=where, cache=tmp_path / "c")
    assert opened == [] and again == first and [i.learned for i in again.items] == [i.learned for i in first.items]
    changed = tmp_path / "masks" / "1.png" if kind == "folder" else dog / "1.png"
    black = Image.new("L", (24, 16), 0)
    (black if kind == "folder" else Image.merge("LA", (black, black))).save(changed)
    with pytest.raises(DataError, match=r"black all over|transparent all over"):
        read_image_folder(dog, masks=where, cache=tmp_path / "c")
    assert set(opened) == {str(dog / "1.png"), str(changed)}


def test_a_mask_of_another_kind_is_another(dog: Path, tmp_path: Path) -> None:
    (dog / "2.tif").unlink()
    (tmp_path / "masks").mkdir()
    for k in range(2):
        Image.effect_noise((24, 16), 60).convert("LA").save(dog / f"{k}.png")
        Image.new("L", (24, 16), 255).save(tmp_path / "masks" / f"{k}.png")
    alpha, folder, again = (
        read_image_folder(dog, masks=where, cache=tmp_path / "c")
        for where in ("alpha", str(tmp_path / "masks"), "alpha")
    )
    assert [i.mask for i in alpha.items] == [i.mask for i in again.items] == [i.path for i in alpha.items]
    assert [i.mask for i in folder.items] == [tmp_path / "masks" / f"{k}.png" for k in range(2)]
