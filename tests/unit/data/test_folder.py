from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionlora.config import FolderConfig, TrainSDConfig
from visionlora.data.folder import ImageItem, read_image_folder, read_image_folders, read_pictures
from visionlora.errors import ConfigError, DataError

ENDINGS = ".avif, .bmp, .gif, .jfif, .jpe, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp"


def picture(path: Path, seed: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def said(folder: Path, prompt: str | None = None, skip_broken: bool = False) -> str:
    with pytest.raises(DataError) as caught:
        read_image_folder(folder, prompt, skip_broken=skip_broken)
    return str(caught.value)


@pytest.fixture
def dog(tmp_path: Path) -> Path:
    """Two good pictures with captions."""
    for seed, stem in enumerate("ab"):
        picture(tmp_path / "dog" / f"{stem}.png", seed)
        (tmp_path / "dog" / f"{stem}.txt").write_text(f"dog {stem}")
    return tmp_path / "dog"


def test_items(tmp_path: Path) -> None:
    root = tmp_path / "dog"
    hashes = [picture(root / name, seed) for seed, name in enumerate(["B.PNG", "a.jpg", "sub/c.webp"])]
    picture(root / ".hidden.png", 3)
    picture(root / ".cache" / "d.png", 4)
    (root / "README.md").write_text("origin")
    (root / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "{n}", "text": "t {n}"}}\n' for n in ("B.PNG", "a.jpg", "sub/c.webp"))
    )
    seen: list[tuple[str, int, int]] = []
    folder = read_image_folder(root, progress=lambda *told: seen.append(told))
    assert folder.items == tuple(
        ImageItem(root / name, f"t {name}", sha)
        for name, sha in zip(["B.PNG", "a.jpg", "sub/c.webp"], hashes, strict=True)
    )
    assert folder.root == root
    assert folder.notes == ()
    assert folder.caption_source == "captions from metadata.jsonl (3)"
    assert seen == [("Checking pictures", i, 3) for i in (1, 2, 3)]


def test_folders_that_say_repeats_and_caption(tmp_path: Path) -> None:
    for seed, name in enumerate(["10_sks dog/a.png", "10_sks dog/b.png", "1_dog/sub/c.png"]):
        picture(tmp_path / name, seed)
    (tmp_path / "10_sks dog" / "a.txt").write_text("its own")
    folder = read_image_folder(tmp_path)
    assert [(item.name, item.repeats, item.caption) for item in folder.items] == [
        ("10_sks dog/a.png", 10, "its own"),
        ("10_sks dog/b.png", 10, "sks dog"),
        ("1_dog/sub/c.png", 1, "dog"),
    ]
    assert folder.notes == (
        "as kohya reads them, folders say how often their pictures count: 10_sks dog (10 x), 1_dog (1 x); rename them where "
        "that is not meant",
    )
    assert folder.caption_source == "captions from .txt files (1) and the names of the folders (2)"
    folder = read_image_folder(tmp_path, "all")
    assert [(item.repeats, item.caption) for item in folder.items] == [(10, "all"), (10, "all"), (1, "all")]
    (tmp_path / "10_sks dog" / "b.txt").touch()  # empty: that is a problem, not a reason to take another caption
    assert "10_sks dog/b.txt is empty" in said(tmp_path)
    assert len(read_image_folder(tmp_path, skip_broken=True).items) == 2


@pytest.mark.parametrize("other", ["d.png", "else/d.png", "2023_holiday/d.png", "01_front/d.png", "3_/d.png"])
def test_repeats_are_in_all_folders_or_in_none(tmp_path: Path, other: str) -> None:
    for seed, name in enumerate(["10_sks dog/a.png", other]):
        picture(tmp_path / name, seed)
    folder = read_image_folder(tmp_path)
    assert {item.repeats for item in folder.items} == {1}
    assert folder.notes == (
        "kohya reads a number of repeats from 10_sks dog; here the pictures count alike, as others are in folders that are "
        "called otherwise. Name all so, or give folders, each with its repeats",
    )


def test_many_repeats_are_no_years(tmp_path: Path) -> None:
    for seed, name in enumerate(["1000_sks dog/a.png", "9999_cat/b.png"]):
        picture(tmp_path / "many" / name, seed)
        picture(tmp_path / "kohya" / "img" / name, seed)
        picture(tmp_path / "kohya" / "reg" / "1000_dog" / f"{seed}.png", 2 + seed)
        picture(tmp_path / "years" / name.replace("1000", "1999").replace("9999", "20230101"), seed)
    folder = read_image_folder(tmp_path / "many")
    assert [(item.repeats, item.caption) for item in folder.items] == [(1000, "sks dog"), (9999, "cat")]
    assert "1000_sks dog (1000 x), 9999_cat (9999 x)" in folder.notes[0]
    assert read_image_folder(tmp_path / "many" / "1000_sks dog").items[0].caption == "sks dog"
    folder = read_image_folder(tmp_path / "years")
    assert [(item.repeats, item.caption) for item in folder.items] == [(1, "sks years")] * 2
    assert folder.notes == (
        "kohya reads a number of repeats from 1999_sks dog, 20230101_cat; here the pictures count alike, as years and numbers "
        "above 9,999 are not taken so. Where they are meant, give folders, each with its repeats",
    )
    assert "is laid out for kohya's trainer" in said(tmp_path / "kohya")


def test_pictures_with_a_number_are_no_folders(tmp_path: Path) -> None:
    for seed, name in enumerate(["10_sks dog.png", "else/d.png"]):
        picture(tmp_path / name, seed)
    assert read_image_folder(tmp_path).notes == ()


def test_json_beside_pictures_is_not_read_and_that_is_said(tmp_path: Path) -> None:
    for seed, name in enumerate(["a.png", "b.png", "sub/c.png"]):
        picture(tmp_path / name, seed)
    for name in ("a.json", "b.png.json", "sub/c.JSON", "other.json"):
        (tmp_path / name).write_text('{"caption": "a dog"}')
    note = "not read: {}; captions are read from .txt and .caption files, metadata.jsonl and metadata.csv"
    (tmp_path / "captions.csv").write_text("file_name,text\na.png,a dog\n")
    (tmp_path / "Metadata.jsonl").write_text('{"file_name": "a.png", "text": "a dog"}')
    files = "Metadata.jsonl, a.json, b.png.json, captions.csv, sub/c.JSON"
    assert read_image_folder(tmp_path).notes == (note.format(files),)
    assert read_image_folder(tmp_path, "all").notes == ()
    for name in ("a.txt", "b.txt", "sub/c.txt"):
        (tmp_path / name).write_text("a cat")
    assert read_image_folder(tmp_path).notes == ()
    (tmp_path / "a.txt").unlink()
    (tmp_path / "captions.csv").unlink()
    assert note.format("Metadata.jsonl, a.json") in read_image_folder(tmp_path, skip_broken=True).notes


@pytest.mark.parametrize("name", ["metadata.json", "meta_cap.json", "captions.txt", "Caption.txt"])
def test_one_file_for_all_captions_is_not_read_and_that_is_said(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "sub" / "a.png", 0)
    (tmp_path / name).write_text("{}")
    (note,) = read_image_folder(tmp_path).notes
    assert note.startswith(f"not read: {name}; captions are read from .txt")


def test_among_several_folders_settings_say_repeats(tmp_path: Path) -> None:
    for seed, name in enumerate(["in/10_sks dog/a.png", "more/b.png"]):
        picture(tmp_path / name, seed)
    folder = read_image_folders([FolderConfig(str(tmp_path / name)) for name in ("in", "more")])
    assert {item.repeats for item in folder.items} == {1}


def test_names_that_are_not_utf8_are_no_captions(tmp_path: Path) -> None:
    root = tmp_path / "d\udce9"
    picture(root / "a.png", 0)
    (root / "a.png").rename(root / "caf\udce9.png")
    picture(root / "a dog.png", 1)
    with pytest.raises(DataError, match=r"caf\\udce9.png has letters in its name that are not UTF-8; rename it after"):
        read_image_folder(root, captions="filename")
    assert {item.caption for item in read_image_folder(root).items} == {"sks d"}


def test_how_numbers_were_read_is_part_of_the_content(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(tmp_path / "a.tif", tiffinfo={262: 0})
    item = read_image_folder(tmp_path, "x").items[0]
    assert item.content == f"{item.sha256} white is zero, turned round"


def test_linked_folders_are_mentioned(dog: Path, tmp_path: Path) -> None:
    picture(tmp_path / "more" / "c.png", 2)
    (dog / "more").symlink_to(tmp_path / "more")
    assert read_image_folder(dog).notes == ("left out, linked folders are not entered: more",)


def test_what_runs_have_drawn_is_not_learned(dog: Path) -> None:
    picture(dog / "runs" / "sd-dog" / "grid.png", 2)
    (dog / "runs" / "sd-dog" / "asked.yaml").touch()
    folder = read_image_folder(dog)
    assert [item.name for item in folder.items] == ["a.png", "b.png"]
    assert folder.notes == ("left out, folders of runs are not entered: runs/sd-dog",)


def test_sources_are_counted(dog: Path) -> None:
    (dog / "metadata.csv").write_text("file_name,text\na.png,first\n")
    folder = read_image_folder(dog)
    assert [item.caption for item in folder.items] == ["first", "dog b"]
    assert folder.caption_source == "captions from metadata.csv (1) and .txt files (1)"


def test_prompt(dog: Path) -> None:
    folder = read_image_folder(dog, " a photo of sks dog ")
    assert [item.caption for item in folder.items] == ["a photo of sks dog"] * 2
    assert folder.caption_source == (
        '--prompt: all pictures get "a photo of sks dog"; the captions in .txt files are not used'
    )


def test_prompt_without_captions_in_the_folder(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0)
    assert read_image_folder(tmp_path, "x").caption_source == '--prompt: all pictures get "x"'


def test_empty_prompt(dog: Path) -> None:
    with pytest.raises(ConfigError, match="--prompt is empty; write a caption for all pictures, or leave it out"):
        read_image_folder(dog, " ")


@pytest.mark.parametrize(
    ("name", "caption"),
    [("My_grey-Dog", "sks my grey dog"), ("dog", "sks dog"), ("__", "sks"), ("Ein Hund", "sks ein hund")],
)
def test_instance_prompt(tmp_path: Path, name: str, caption: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / name / "a.png", 0)
    monkeypatch.chdir(tmp_path / name)
    for folder in (read_image_folder(tmp_path / name), read_image_folder(Path())):
        assert [item.caption for item in folder.items] == [caption]
        assert folder.caption_source == (
            f'no captions in the folder, so all pictures get "{caption}" (a rare word and the folder\'s name); '
            '--prompt "..." changes it'
        )


def test_the_name_of_an_inner_folder_of_kohya(tmp_path: Path) -> None:
    picture(tmp_path / "10_sks Dog" / "a.png", 0)
    inner, outer = read_image_folder(tmp_path / "10_sks Dog"), read_image_folder(tmp_path)
    assert [item.caption for item in (*inner.items, *outer.items)] == ["sks Dog", "sks Dog"]
    assert "the folder's name, as kohya reads it; all pictures count alike" in inner.caption_source


def test_all_problems_come_in_one_message(dog: Path) -> None:
    (dog / "notes.png").write_text("my notes")
    (dog / "sub").mkdir()
    (dog / "sub" / "x.jpg").touch()
    (dog / "a.txt").write_text("")
    picture(dog / "c.png", 2)
    (dog / "metadata.jsonl").write_text('{"file_name": "B.png", "text": "t"}\n')
    assert said(dog) == (
        f"{dog} has 5 problems:\n"
        "  notes.png is not a picture (its content is text); remove it or rename it\n"
        "  sub/x.jpg is empty (0 bytes); copy it again from its source, or remove it\n"
        "  metadata.jsonl line 1 names B.png, which is not there; did you mean b.png?\n"
        "  a.txt is empty; write a caption in it, or pass --prompt for all pictures\n"
        "  c.png has no caption; write it in c.txt, or pass --prompt for all\n"
        "Fix this, or pass --skip-broken to leave out what cannot be used and go on with 1 picture."
    )
    folder = read_image_folder(dog, skip_broken=True)
    assert [item.path.name for item in folder.items] == ["b.png"]
    assert folder.notes == (
        "left out: notes.png is not a picture (its content is text); remove it or rename it",
        "left out: sub/x.jpg is empty (0 bytes); copy it again from its source, or remove it",
        "left out: metadata.jsonl line 1 names B.png, which is not there; did you mean b.png?",
        "left out: a.txt is empty; write a caption in it, or pass --prompt for all pictures",
        "left out: c.png has no caption; write it in c.txt, or pass --prompt for all",
    )


def test_a_prompt_makes_bad_captions_harmless(dog: Path) -> None:
    (dog / "a.txt").write_text("")
    (dog / "metadata.jsonl").write_text("{")
    assert len(read_image_folder(dog, "x").items) == 2


def test_some_captions_missing(dog: Path) -> None:
    for number in range(12):
        picture(dog / "sub" / f"{number:02}.png", 10 + number)
    names = ", ".join(f"sub/{number:02}.png" for number in range(10))
    assert said(dog) == (
        f"{dog} has 1 problem:\n"
        f"  12 of 14 pictures have no caption: {names} and 2 more; "
        "write them in sub/00.txt and so on, or pass --prompt for all\n"
        "Fix this, or pass --skip-broken to leave out what cannot be used and go on with 2 pictures."
    )


def test_twenty_lines_at_most(dog: Path) -> None:
    for number in range(23):
        (dog / f"x{number:02}.png").touch()
    lines = said(dog).splitlines()
    assert lines[0] == f"{dog} has 23 problems:"
    assert len(lines) == 1 + 20 + 2
    assert lines[20].startswith("  x19.png is empty")
    assert lines[21] == "  and 3 more"
    assert len(read_image_folder(dog, skip_broken=True).notes) == 23


@pytest.mark.parametrize("skip_broken", [False, True])
def test_nothing_left(tmp_path: Path, skip_broken: bool) -> None:
    (tmp_path / "a.png").touch()
    assert said(tmp_path, skip_broken=skip_broken) == (
        f"{tmp_path} has 1 problem:\n"
        "  a.png is empty (0 bytes); copy it again from its source, or remove it\n"
        "Fix this first: no usable picture is left."
    )


def test_the_same_picture_twice(dog: Path) -> None:
    (dog / "A-copy.png").write_bytes((dog / "a.png").read_bytes())
    folder = read_image_folder(dog)
    assert [item.path.name for item in folder.items] == ["a.png", "b.png"]
    assert folder.notes == ('the same picture, used once: A-copy.png, a.png; it keeps the caption of a.png, "dog a"',)
    (dog / "A-copy.txt").write_text("dog a")
    folder = read_image_folder(dog)
    assert [item.path.name for item in folder.items] == ["A-copy.png", "b.png"]
    assert folder.notes == ("the same picture, used once: A-copy.png, a.png",)


def test_the_same_picture_twice_without_any_caption(dog: Path) -> None:
    for name in ("x.png", "y.png"):
        picture(dog / name, 7)
    folder = read_image_folder(dog, skip_broken=True)
    assert folder.notes == (
        "the same picture, used once: x.png, y.png",
        "left out: x.png has no caption; write it in x.txt, or pass --prompt for all",
    )


def test_conversions_are_noted_together(tmp_path: Path) -> None:
    for level in range(2):
        Image.new("RGBA", (2, 2), (level, 0, 0, 0)).save(tmp_path / f"clear{level}.png")
    Image.new("CMYK", (8, 8)).save(tmp_path / "ink.jpg")
    assert read_image_folder(tmp_path).notes == (
        "transparent, put on white: clear0.png, clear1.png",
        "CMYK, converted to RGB: ink.jpg",
        "3 pictures look alike: clear0.png and clear1.png and 1 more; they count twice: remove one, or set repeats",
    )


def test_pictures_of_other_kinds_are_mentioned(dog: Path) -> None:
    (dog / "phone.HEIC").write_bytes(b"x")
    assert read_image_folder(dog).notes == ("left out, export as JPEG or PNG to use: phone.HEIC",)


def test_an_unprintable_name_stays_on_one_line(dog: Path) -> None:
    (dog / "a\nb\x1b.png").touch()
    assert said(dog).splitlines()[1].startswith(r"  a\nb\x1b.png is empty")


def test_linked_pictures_count_linked_folders_do_not(dog: Path, tmp_path: Path) -> None:
    picture(tmp_path / "else" / "c.png", 5)
    (dog / "c.png").symlink_to(tmp_path / "else" / "c.png")
    (dog / "c.txt").write_text("linked")
    (dog / "loop").symlink_to(dog)
    assert [item.caption for item in read_image_folder(dog).items] == ["dog a", "dog b", "linked"]


def test_missing_folder(dog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = dog.parent
    assert said(parent / "dogs") == f"There is no folder {parent}/dogs; did you mean {parent}/dog?"
    assert said(parent / "dogs" / "x") == f"There is no folder {parent}/dogs/x; did you mean {parent}/dog?"
    assert said(parent / "zzz") == f"There is no folder {parent}/zzz; the folders in {parent.resolve()} are dog."
    assert said(dog / "x") == f"There is no folder {dog}/x; {dog.resolve()} has no folders."
    monkeypatch.chdir(parent)
    assert said(Path("dogs")) == "There is no folder dogs; did you mean dog?"


def test_a_file_is_no_folder(dog: Path) -> None:
    assert said(dog / "a.png") == f"{dog}/a.png is a file, not a folder; pass the folder that holds the pictures."


def test_empty_folder(tmp_path: Path) -> None:
    assert said(tmp_path) == (
        f"{tmp_path} is empty; put the pictures into it (pictures end in {ENDINGS}) or pass another folder."
    )


def test_folder_without_pictures(tmp_path: Path) -> None:
    for name in ("a.heic", "b.HEIC", "c.md", "LICENSE"):
        (tmp_path / name).touch()
    assert said(tmp_path) == (
        f"{tmp_path} holds no pictures: found 2 .heic, 1 without ending, 1 .md, but pictures end in {ENDINGS}. "
        "Export them as JPEG or PNG first."
    )


# Captions from names.


def test_captions_from_names(tmp_path: Path) -> None:
    for seed, name in enumerate(["01_a-red_dog (3).png", "sub/dog_02.jpg", "Ein Hund.webp"]):
        picture(tmp_path / name, seed)
    (tmp_path / "sub" / "dog_02.txt").write_text("not this")
    folder = read_image_folder(tmp_path, captions="filename")
    assert {item.name: item.caption for item in folder.items} == {
        "01_a-red_dog (3).png": "a red dog",
        "Ein Hund.webp": "Ein Hund",
        "sub/dog_02.jpg": "dog",
    }
    assert folder.caption_source == (
        "captions from the names of the pictures (3); the captions in .txt files are not used"
    )


def test_names_without_words_are_problems(tmp_path: Path) -> None:
    picture(tmp_path / "001.png", 0)
    picture(tmp_path / "dog.png", 1)
    with pytest.raises(DataError) as caught:
        read_image_folder(tmp_path, captions="filename")
    assert str(caught.value) == (
        f"{tmp_path} has 1 problem:\n"
        "  001.png has no words in its name; rename it after what it shows, or leave captions=filename out\n"
        "Fix this, or pass --skip-broken to leave out what cannot be used and go on with 1 picture."
    )
    assert [item.caption for item in read_image_folder(tmp_path, captions="filename", skip_broken=True).items] == [
        "dog"
    ]
    with pytest.raises(ConfigError, match=r"captions is 'filename'; a prompt is given: leave one of them out"):
        read_image_folder(tmp_path, "a dog", captions="filename")


# Pictures that look alike.


def test_pictures_that_look_alike_are_mentioned(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    for name, pixels in {
        "a.png": ramp,
        "b.jpg": ramp,
        "c.png": ramp[:60],
        "d.png": ramp[:, ::-1],
        "e.png": 255 - ramp // 2,
    }.items():
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / name)
    folder = read_image_folder(tmp_path)
    assert folder.alike == ((0, 1, 2),)
    assert folder.notes == (
        "3 pictures look alike: a.png and b.jpg and 1 more; they count twice: remove one, or set repeats",
    )
    (tmp_path / "c.png").unlink()
    assert read_image_folder(tmp_path).notes == (
        "2 pictures look alike: a.png and b.jpg; they count twice: remove one, or set repeats",
    )
    (tmp_path / "b.jpg").unlink()
    assert read_image_folder(tmp_path).notes == ()


def test_only_the_first_sets_of_them_are_named(tmp_path: Path) -> None:
    for i in range(7):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        for j in range(2):
            Image.fromarray(pixels + np.uint8(j) * (pixels < 255)).save(tmp_path / f"{i}{j}.png")
    (note,) = read_image_folder(tmp_path).notes
    assert note.startswith("14 pictures look alike: 00.png and 01.png, 10.png and 11.png, ")
    assert note.endswith("40.png and 41.png and 2 more such sets; they count twice: remove one, or set repeats")


# Several folders.


def test_several_folders(dog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "cat" / "a.png", 7)
    picture(tmp_path / "red_birds" / "a.png", 8)
    Image.new("CMYK", (8, 8)).save(tmp_path / "cat" / "ink.jpg")
    seen: list[tuple[str, int, int]] = []
    folder = read_image_folders(
        [
            FolderConfig("./dog", repeats=10),
            FolderConfig("cat", " a cat ", 2),
            FolderConfig(str(tmp_path / "red_birds")),
        ],
        progress=lambda *told: seen.append(told),
    )
    birds = f"{tmp_path}/red_birds"
    assert [(item.name, item.caption, item.repeats) for item in folder.items] == [
        ("dog/a.png", "dog a", 10),
        ("dog/b.png", "dog b", 10),
        ("cat/a.png", "a cat", 2),
        ("cat/ink.jpg", "a cat", 2),
        (f"{birds}/a.png", "sks red birds", 1),
    ]
    assert all(item.path.is_file() for item in folder.items)
    assert folder.root == tmp_path
    assert folder.notes == ("cat: CMYK, converted to RGB: ink.jpg",)
    assert folder.caption_source == (
        'dog: captions from .txt files (2); cat: its prompt: all pictures get "a cat"; '
        f'{birds}: no captions in the folder, so all pictures get "sks red birds" (a rare word and the folder\'s name); '
        "a prompt for the folder changes it"
    )
    assert seen == [("Checking pictures", i, 5) for i in range(1, 6)]


def test_a_picture_in_two_folders_counts_in_the_first(
    dog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(8):
        picture(tmp_path / "more" / f"{i}.png", i)
    (tmp_path / "more" / "0.png").replace(tmp_path / "more" / "again.png")
    folder = read_image_folders([FolderConfig("dog", repeats=3), FolderConfig("more", "x")])
    assert [item.name for item in folder.items] == ["dog/a.png", "dog/b.png", *(f"more/{i}.png" for i in range(2, 8))]
    assert folder.notes == (
        "the same picture in two folders, used once: dog/b.png, not more/1.png",
        "the same picture in two folders, used once: dog/a.png, not more/again.png",
    )
    for i in range(8):
        picture(tmp_path / "dog" / f"c{i}.png", i)
        (tmp_path / "dog" / f"c{i}.txt").write_text("c")
    notes = read_image_folders([FolderConfig("dog"), FolderConfig("more", "x", 2)], skip_broken=True).notes
    assert "and 3 more of more" in notes


@pytest.mark.parametrize("outer_first", [True, False])
def test_a_folder_in_another_is_read_with_its_own_settings(dog: Path, tmp_path: Path, outer_first: bool) -> None:
    """Listed after the outer one, its pictures had neither its prompt nor its repeats."""
    for i in range(2):
        picture(dog / "best" / f"{i}.png", 20 + i)
    folders = [FolderConfig(str(dog), "a dog"), FolderConfig(str(dog / "best"), "my dog", 5)]
    folder = read_image_folders(folders if outer_first else folders[::-1])
    found = {item.name.rpartition("dog/")[2]: (item.caption, item.repeats) for item in folder.items}
    assert found == {
        "a.png": ("a dog", 1), "b.png": ("a dog", 1), "best/0.png": ("my dog", 5), "best/1.png": ("my dog", 5)
    }  # fmt: skip
    assert not folder.notes


def test_problems_of_several_folders_come_together(dog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (dog / "a.txt").write_text("")
    picture(dog / "c.png", 9)
    picture(tmp_path / "cat" / "a.png", 7)
    (tmp_path / "cat" / "b.png").touch()
    folders = [FolderConfig("dog"), FolderConfig("cat", "a cat")]
    with pytest.raises(DataError) as caught:
        read_image_folders(folders)
    assert str(caught.value) == (
        "dog has 2 problems:\n"
        "  a.txt is empty; write a caption in it, or give the folder a prompt for all pictures\n"
        "  c.png has no caption; write it in c.txt, or give the folder a prompt for all\n"
        "cat has 1 problem:\n"
        "  b.png is empty (0 bytes); copy it again from its source, or remove it\n"
        "Fix this, or pass --skip-broken to leave out what cannot be used and go on with 2 pictures."
    )
    folder = read_image_folders(folders, skip_broken=True)
    assert [item.name for item in folder.items] == ["dog/b.png", "cat/a.png"]
    assert "cat: left out: b.png is empty (0 bytes); copy it again from its source, or remove it" in folder.notes


def test_missing_and_empty_folders_are_named_together(dog: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        read_image_folders([FolderConfig(str(tmp_path / name)) for name in ("dgo", "empty", "dog")])
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"There is no folder {tmp_path}/dgo; did you mean")
    assert second.startswith(f"{tmp_path}/empty is empty; put the pictures into it")


def test_a_folder_twice(dog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dog.parent)
    with pytest.raises(ConfigError, match=r"folders: dog/\.\./dog is there twice; raise its repeats instead"):
        read_image_folders([FolderConfig("dog"), FolderConfig("./dog/../dog")])


def test_a_single_folder_among_folders_needs_no_names(dog: Path) -> None:
    folder = read_image_folders([FolderConfig(str(dog), repeats=4)])
    assert [(item.name, item.repeats) for item in folder.items] == [("a.png", 4), ("b.png", 4)]
    assert (folder.root, folder.caption_source) == (dog, "captions from .txt files (2)")


def test_masks_of_several_folders(dog: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.new("L", (8, 8), 200).save(tmp_path / "masks" / name)
    clear = np.random.default_rng(3).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    (tmp_path / "cat").mkdir()
    Image.fromarray(clear).save(tmp_path / "cat" / "c.png")
    folders = [
        FolderConfig(str(dog), masks=str(tmp_path / "masks")),
        FolderConfig(str(tmp_path / "cat"), masks="alpha"),
    ]
    first, _, last = read_image_folders(folders).items
    assert (first.mask, last.mask) == (tmp_path / "masks" / "a.png", last.path)


def test_the_pictures_of_a_run(dog: Path) -> None:
    plain = read_pictures(TrainSDConfig(images=str(dog)))
    assert plain == read_image_folder(dog)
    several = read_pictures(TrainSDConfig(folders=(FolderConfig(str(dog), "x", 2),)))
    assert [(item.caption, item.repeats) for item in several.items] == [("x", 2)] * 2
    named = read_pictures(TrainSDConfig(images=str(dog), captions="filename"))
    assert [item.caption for item in named.items] == ["a", "b"]


def test_other_splits_are_not_learned_from(tmp_path: Path) -> None:
    for seed, name in enumerate(["train/a.png", "train/b.png", "validation/c.png", "test/d.png"]):
        picture(tmp_path / name, seed)
        (tmp_path / name).with_suffix(".txt").write_text(f"dog {seed}")
    folder = read_image_folder(tmp_path)
    assert [item.name for item in folder.items] == ["train/a.png", "train/b.png"]
    assert folder.caption_source == "captions from .txt files (2)"
    assert folder.notes == (
        "not learned from, as the name of a split says: test (1) and validation (1); "
        f"validation={tmp_path / 'validation'} judges by it",
    )


def test_other_splits_in_a_folder_of_pictures(tmp_path: Path) -> None:
    for seed, name in enumerate(["images/train/a.png", "images/train/b.png", "images/val/c.png"]):
        picture(tmp_path / name, seed)
    folder = read_image_folder(tmp_path, "a dog")
    assert [item.name for item in folder.items] == ["images/train/a.png", "images/train/b.png"]
    (note,) = folder.notes
    assert "images/val (1)" in note and f"validation={tmp_path / 'images' / 'val'}" in note


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_one_file_of_captions_for_all_splits(tmp_path: Path, kind: str) -> None:
    """As Hugging Face's data sets have it: the rows of the other split were pictures that are not there."""
    names = ["train/a.png", "train/b.png", "val/c.png", "val/d.png"]
    for seed, name in enumerate(names):
        picture(tmp_path / name, seed)
    rows = [json.dumps({"file_name": name, "text": f"dog {name[-5]}"}) for name in names]
    if kind == "csv":
        rows = ["file_name,text", *(f"{name},dog {name[-5]}" for name in names)]
    (tmp_path / f"metadata.{kind}").write_text("\n".join(rows))
    folder = read_image_folder(tmp_path)
    assert [(item.name, item.caption) for item in folder.items] == [("train/a.png", "dog a"), ("train/b.png", "dog b")]
    apart = read_image_folder(tmp_path / "val")
    assert [item.caption for item in apart.items] == ["dog c", "dog d"]
    assert apart.caption_source == f"captions from ../metadata.{kind} (2)"
    (tmp_path / "val" / "d.txt").write_text("its own")
    assert [item.caption for item in read_image_folder(tmp_path / "val").items] == ["dog c", "its own"]


def test_captions_of_a_folder_of_splits_lie_two_above(tmp_path: Path) -> None:
    """As YOLO has it: `images/val`, which the run itself names as validation, had no captions."""
    picture(tmp_path / "images" / "val" / "c.png", 1)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "images/val/c.png", "text": "dog c"}')
    folder = read_image_folder(tmp_path / "images" / "val")
    assert folder.items[0].caption == "dog c" and folder.caption_source == "captions from ../../metadata.jsonl (1)"


def test_captions_above_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    picture(tmp_path / "val" / "c.png", 1)
    (tmp_path / "metadata.csv").write_bytes("file_name,text\nval/c.png,a caf\xe9".encode("cp1252"))
    assert "../metadata.csv is not UTF-8 text" in said(tmp_path / "val")
    (tmp_path / "metadata.csv").write_text("image,caption\nval\\c.png,a dog")
    assert '../metadata.csv needs the columns "file_name" and "text"' in said(tmp_path / "val")
    picture(tmp_path / "Hünde" / "c.png", 1)
    for folder in ("val", "Hünde"):
        for encoding, wrong in (("utf-16", "is UTF-16 text"), ("cp1252", "is not UTF-8 text")):
            (tmp_path / "metadata.csv").write_text(f"file_name,text\n{folder}/c.png,a caf\xe9", encoding=encoding)
            assert f"../metadata.csv {wrong}" in said(tmp_path / folder)


@pytest.mark.parametrize("content", [b"id,name\n1,b\n", "id;na\xefve\n".encode("cp1252"), b"", b"PK\x03\x04\x00\x00"])
@pytest.mark.parametrize("levels", [0, 1])
def test_metadata_above_that_is_of_something_else_is_no_concern(tmp_path: Path, content: bytes, levels: int) -> None:
    """A table of anything by that name, one or two above, kept a folder without captions from being read."""
    picture(tmp_path / "val" / "dog" / "c.png", 1)
    (tmp_path / ("val", "")[levels] / "metadata.csv").write_bytes(content)
    assert read_image_folder(tmp_path / "val" / "dog").items[0].caption == "sks dog"


def test_what_a_file_beside_the_folder_says_wrongly_of_its_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "val" / "c.png", 1)
    (tmp_path / "metadata.jsonl").write_text(
        'nonsense\n{"file_name": "x/y.png"}\n{"file_name": "val/c.png", "text": ""}'
    )
    assert '../metadata.jsonl line 3 has an empty "text" for c.png' in said(tmp_path / "val")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "valley/c.png", "text": "a"}')
    assert read_image_folder(tmp_path / "val").items[0].caption == "sks val"


def test_captions_of_a_folder_in_another_that_is_read_by_itself(dog: Path) -> None:
    picture(dog / "best" / "x.png", 20)
    rows = [
        {"file_name": "a.png", "text": "one"},
        {"file_name": "b.png", "text": "two"},
        {"file_name": "best/x.png", "text": "x"},
    ]
    (dog / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = read_image_folders([FolderConfig(str(dog)), FolderConfig(str(dog / "best"), repeats=3)])
    assert [(item.caption, item.repeats) for item in folder.items] == [("one", 1), ("two", 1), ("x", 3)]


def test_the_folder_above_those_of_kohya(tmp_path: Path) -> None:
    for seed, name in enumerate(["img/10_sks dog/a.png", "reg/1_dog/b.png", "model/sample/c.png", "preview.png"]):
        picture(tmp_path / name, seed)
    assert said(tmp_path) == (
        f"{tmp_path} is laid out for kohya's trainer: learn from {tmp_path / 'img'}, with its class pictures as "
        f"prior_images={tmp_path / 'reg' / '1_dog'} and prior_prompt='dog'."
    )
    assert read_image_folder(tmp_path / "img").items[0].repeats == 10


def test_captions_of_several_lines_are_mentioned(dog: Path) -> None:
    (dog / "a.txt").write_text("a dog\non grass\n")
    folder = read_image_folder(dog)
    assert folder.items[0].caption == "a dog on grass"
    assert folder.notes == (
        "of several lines, which make one caption: a.txt; for one of them each time write {one|other}",
    )


def test_a_row_for_each_caption_of_a_picture(dog: Path) -> None:
    """As parquet files are read."""
    rows = [{"file_name": f"{name}.png", "text": text} for name in "ab" for text in (f"dog {name}", f"{name} sits")]
    (dog / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = read_image_folder(dog)
    assert [item.caption for item in folder.items] == ["{dog a|a sits}", "{dog b|b sits}"]
    assert folder.notes == (
        "2 pictures in several rows with different captions: used once, with any of them each time",
    )
    (dog / "metadata.jsonl").rename(dog.parent / "metadata.jsonl")
    above = [{**row, "file_name": f"dog/{row['file_name']}"} for row in rows]
    (dog.parent / "metadata.jsonl").write_text("\n".join(map(json.dumps, above)))
    (dog / "a.txt").unlink()
    assert [item.caption for item in read_image_folder(dog).items] == ["{dog a|a sits}", "dog b"]
