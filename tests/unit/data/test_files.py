"""Which files count, and what they hold."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionlora.data.files import Listing, Unusable, list_folder, numbered_lines, read_text, sha256_of, suffix_of


def files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_what_lies_in_a_folder(tmp_path: Path) -> None:
    files(tmp_path, "b/2.PNG", "b/c/1.jpg", "a.png", "notes.txt", "b/raw.HEIC", "LICENSE")
    (tmp_path / "empty").mkdir()
    assert list_folder(tmp_path) == Listing(
        pictures=["a.png", "b/2.PNG", "b/c/1.jpg"],
        others=["LICENSE", "b/raw.HEIC", "notes.txt"],
        folders=["b", "b/c", "empty"],
    )
    assert list_folder(tmp_path).other_pictures() == ["b/raw.HEIC"]


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    files(tmp_path, ".a.png", ".cache/b.png", "__MACOSX/c.png", "d/.e.png", "d/__MACOSX/f.png")
    files(tmp_path, "@eaDir/a.png/x.jpg", "$RECYCLE.BIN/a.png", "d/@eaDir/a.png")
    assert list_folder(tmp_path) == Listing(folders=["d"])
    assert list_folder(files(tmp_path / ".hidden", "a.png")).pictures == ["a.png"]  # what a person has named counts


def test_folders_of_runs_are_not_entered(tmp_path: Path) -> None:
    files(
        tmp_path, "a.png", "runs/sd-a/asked.yaml", "runs/sd-a/grid.png", "runs/sd-a/samples/base_00.png", "b/asked.txt"
    )
    assert list_folder(tmp_path) == Listing(
        pictures=["a.png"], others=["b/asked.txt"], folders=["b", "runs"], runs=["runs/sd-a"]
    )
    named = list_folder(tmp_path / "runs" / "sd-a")  # what a person has named counts
    assert named.pictures == ["grid.png", "samples/base_00.png"]


def test_only_some_names_are_listed(tmp_path: Path) -> None:
    files(tmp_path, "a/1.png", "a/b/2.png", "b/3.png", "4.png", "5.png")
    assert list_folder(tmp_path, {"a", "4.png"}).pictures == ["4.png", "a/1.png", "a/b/2.png"]


def test_linked_files_count_linked_folders_are_not_entered(tmp_path: Path) -> None:
    root = files(tmp_path / "root", "a.png")
    (root / "b.png").symlink_to(root / "a.png")
    (root / "c.png").symlink_to(root / "nowhere.png")
    (root / "loop").symlink_to(root)
    assert list_folder(root) == Listing(pictures=["a.png", "b.png", "c.png"], links=["loop"])


def test_a_folder_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return opened(path)

    opened = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    listing = list_folder(files(tmp_path, "a.png", "b/locked/c.png"))
    assert listing.pictures == ["a.png"]
    assert listing.problems == ["b/locked cannot be opened (Permission denied); check its permissions"]
    assert list_folder(tmp_path / "b" / "locked").problems == [
        ". cannot be opened (Permission denied); check its permissions"
    ]


@pytest.mark.parametrize(("name", "suffix"), [("a.PNG", ".png"), ("a.b/c", ""), ("a.tar.gz", ".gz"), (".png", "")])
def test_suffix(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix


@pytest.mark.parametrize("content", [b"", b"abc", bytes(range(256)) * 5000])
def test_hash(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("content", ["é\n".encode(), "\ufeffé\n".encode()])
def test_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert read_text(tmp_path / "a.txt") == "é\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\xe9", "is not UTF-8 text (at byte 1); save it as UTF-8"),
        ("a".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("a dog".encode("utf-16-le"), "holds zero bytes, as UTF-16 text does; save it as UTF-8"),
        (None, "cannot be read (No such file or directory); check that it is there and readable"),
    ],
)
def test_text_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(Unusable) as caught:
        read_text(tmp_path / "a.txt")
    assert str(caught.value) == message


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"))))
def test_lines_keep_their_numbers(lines: list[str]) -> None:
    assert dict(numbered_lines("\n".join(lines))) == {i: line for i, line in enumerate(lines, 1) if line.strip()}
