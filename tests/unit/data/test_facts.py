"""What is known of pictures from before."""

import os
from pathlib import Path

import pytest
from PIL import Image

from visionlora.data import facts
from visionlora.data.facts import FactsOfFolder
from visionlora.data.folder import read_image_folder


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
