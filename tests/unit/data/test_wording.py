"""What messages on data sets are made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from visionlora.data.files import Listing
from visionlora.data.wording import (
    MAX_LINES,
    Meant,
    count_of,
    first_names,
    left_out,
    missing,
    no_pictures,
    not_entered,
    problem_report,
    quoted,
    remedy,
)

NAMES = [str(i) for i in range(25)]
ENDINGS = "pictures end in .avif, .bmp, .gif, .jfif, .jpe, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp"


def test_counts() -> None:
    assert [count_of(n, "class", "classes") for n in (0, 1, 1234)] == ["0 classes", "1 class", "1,234 classes"]
    assert count_of(2, "picture") == "2 pictures"


def test_long_lists_are_cut() -> None:
    assert first_names(NAMES) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 15 more"
    assert first_names(NAMES[:10]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert quoted(NAMES) == '"0", "1", "2", "3", "4", "5", "6", "7" and 17 more'
    report = problem_report(Path("x"), NAMES, "end").splitlines()
    assert (report[0], report[1], report[20:]) == ("x has 25 problems:", "  0", ["  19", "  and 5 more", "end"])
    assert left_out(NAMES)[19:] == ["left out: 19", "left out: 5 more"]


def test_short_lists_are_not() -> None:
    assert problem_report(Path("x"), ["a"], "end") == "x has 1 problem:\n  a\nend"
    assert left_out(["a", "b"]) == ["left out: a", "left out: b"]
    assert (first_names([]), quoted([])) == ("", "nothing")


def test_names_stay_on_one_line() -> None:
    assert first_names(["a\nb"]) == r"a\nb"
    assert quoted(["a\x1bb"]) == r'"a\x1bb"'
    assert problem_report(Path("a\nb"), ["x"], "end").startswith(r"a\nb has")


@pytest.mark.parametrize(
    ("usable", "fatal", "skippable", "ending"),
    [
        (0, True, True, "Fix this first: no usable picture is left."),
        (2, True, False, "Fix this first."),
        (2, True, True, "Fix this first. --skip-broken passes over some of it, but not all."),
        (
            1,
            False,
            True,
            "Fix this, or pass --skip-broken to leave out what cannot be used and go on with 1 picture.",
        ),
    ],
)
def test_what_to_do(usable: int, fatal: bool, skippable: bool, ending: str) -> None:
    assert remedy(usable, fatal=fatal, skippable=skippable) == ending


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dog").mkdir()
    (tmp_path / ".dogs").mkdir()
    (tmp_path / "dogs.csv").touch()
    assert missing(tmp_path / "dogs") == f"There is no folder {tmp_path}/dogs; did you mean {tmp_path}/dog?"
    assert missing(tmp_path / "dogs" / "x") == f"There is no folder {tmp_path}/dogs/x; did you mean {tmp_path}/dog?"
    assert missing(tmp_path / "zzz") == f"There is no folder {tmp_path}/zzz; the folders in {tmp_path} are dog."
    assert missing(tmp_path / "dog" / "x") == f"There is no folder {tmp_path}/dog/x; {tmp_path}/dog has no folders."
    below = tmp_path / "dogs.csv" / "x"
    assert missing(below) == f"There is no folder {below}; {tmp_path}/dogs.csv is a file."
    monkeypatch.chdir(tmp_path)
    assert missing(Path("zzz")) == f"There is no folder zzz; the folders in {tmp_path} are dog."


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    def said(name: str) -> str:
        return missing(tmp_path / name, "table", (".csv",)).removeprefix(f"There is no table {tmp_path}/{name}; ")

    assert said("a.csv") == f"{tmp_path} has no folders or tables."
    (tmp_path / "labels.CSV").touch()
    (tmp_path / "label.txt").touch()
    assert said("label.csv") == f"did you mean {tmp_path}/labels.CSV?"
    (tmp_path / "dog").mkdir()
    assert said("zzz.csv") == f"the folders and tables in {tmp_path} are dog, labels.CSV."


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        (Listing(), "x is empty."),
        (Listing(problems=["a cannot be opened", "b"]), "x holds no pictures that can be reached: a cannot be opened."),
        (Listing(links=["a", "b"]), "x holds only linked folders, which are not entered: a, b; copy them."),
        (
            Listing(others=["a.TXT", "b.txt", "c"], links=["d"]),
            f"x holds no pictures: found 2 .txt, 1 without ending, but {ENDINGS}.",
        ),
        (
            Listing(others=["a.heic"]),
            f"x holds no pictures: found 1 .heic, but {ENDINGS}. Export them as JPEG or PNG first.",
        ),
    ],
)
def test_a_folder_without_pictures(listing: Listing, message: str) -> None:
    assert no_pictures(Path("x"), listing, "is empty.") == message


def test_what_lies_there_and_is_not_read_is_mentioned() -> None:
    listing = Listing(others=["a.heic", "b.txt", "c.SVG"], links=["d"], runs=["runs/e", "f"])
    assert not_entered(listing) == [
        "left out, linked folders are not entered: d",
        "left out, folders of runs are not entered: runs/e, f",
        "left out, export as JPEG or PNG to use: a.heic, c.SVG",
    ]
    assert not_entered(Listing(others=["b.txt"])) == []


def test_what_was_probably_meant() -> None:
    meant = Meant(["cat.png", "x/dog.png", "x/two words.png"])
    assert [meant.by(name) for name in ("DOG.png", "y/dog", "two_words.png", "zzz")] == [
        "x/dog.png",
        "x/dog.png",
        "x/two words.png",
        None,
    ]


def test_only_so_many_names_are_compared_as_are_shown() -> None:
    meant = Meant(["dog-1.png"])
    assert [meant.by("dog_1.png") for _ in range(MAX_LINES + 1)] == ["dog-1.png"] * MAX_LINES + [None]
    assert meant.by("DOG-1.png") == "dog-1.png"
