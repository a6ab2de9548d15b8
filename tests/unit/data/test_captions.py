from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from visionlora.data.captions import Captions, caption_of_name, read_captions

PICTURES = ("a.png", "b.png", "sub/c.jpg")
ENDINGS = ".avif, .bmp, .gif, .jfif, .jpe, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp"


def read(root: Path, files: dict[str, str | bytes], pictures: tuple[str, ...] = PICTURES) -> Captions:
    for name in pictures:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).touch()
    for name, content in files.items():
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_captions(root, pictures, files)


def test_nothing_there(tmp_path: Path) -> None:
    assert read(tmp_path, {}) == Captions({}, {}, (), frozenset())


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_jsonl(tmp_path: Path, key: str) -> None:
    lines = f'\ufeff{{"file_name": "a.png", "{key}": " a  dog\\n"}}\r\n\n{{"file_name": "sub/c.jpg", "{key}": "é"}}\n'
    found = read(tmp_path, {"metadata.jsonl": lines})
    assert found == Captions({"a.png": "a dog", "sub/c.jpg": "é"}, {"metadata.jsonl": 2}, (), frozenset())


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_csv(tmp_path: Path, key: str) -> None:
    found = read(tmp_path, {"metadata.csv": f'file_name,{key}\na.png,"a dog,\n sitting"\nsub/c.jpg,cat\n'})
    assert found.texts == {"a.png": "a dog, sitting", "sub/c.jpg": "cat"}
    assert not found.problems


def test_text_comes_before_caption_before_prompt(tmp_path: Path) -> None:
    lines = '{"file_name": "a.png", "prompt": "p", "caption": "c", "text": "t"}\n'
    lines += '{"file_name": "b.png", "prompt": "p", "caption": "c"}'
    assert read(tmp_path, {"metadata.jsonl": lines}).texts == {"a.png": "t", "b.png": "c"}


def test_sidecars(tmp_path: Path) -> None:
    found = read(tmp_path, {"a.txt": "a dog,\n sitting\n", "b.caption": "two", "sub/c.TXT": "three"})
    assert found.texts == {"a.png": "a dog, sitting", "b.png": "two", "sub/c.jpg": "three"}
    assert found.sources == {".txt files": 2, ".caption files": 1}


def test_sidecars_of_the_whole_name(tmp_path: Path) -> None:
    found = read(
        tmp_path, {"a.png.txt": "png", "a.jpg.txt": "jpg", "b.txt": "both"}, ("a.png", "a.jpg", "b.png", "b.jpg")
    )
    assert found.texts == {"a.png": "png", "a.jpg": "jpg", "b.png": "both", "b.jpg": "both"}
    assert not found.problems


def test_precedence(tmp_path: Path) -> None:
    pictures = tuple("abcde"[i] + ".png" for i in range(5))
    files: dict[str, str | bytes] = {
        "metadata.jsonl": '{"file_name": "a.png", "text": "jsonl"}',
        "metadata.csv": "file_name,text\na.png,csv\nb.png,csv\n",
        **{f"{stem}.txt": "txt" for stem in "abc"},
        **{f"{stem}.caption": "caption" for stem in "abcd"},
    }
    found = read(tmp_path, files, pictures)
    assert found.texts == {"a.png": "jsonl", "b.png": "csv", "c.png": "txt", "d.png": "caption"}
    assert found.sources == {"metadata.jsonl": 1, "metadata.csv": 1, ".txt files": 1, ".caption files": 1}
    assert not found.problems


def test_metadata_in_a_subfolder_is_relative_to_it(tmp_path: Path) -> None:
    lines = '{"file_name": "c.jpg", "text": "t"}\n{"file_name": "d.jpg", "text": "t"}'
    found = read(tmp_path, {"sub/metadata.jsonl": lines})
    assert found.texts == {"sub/c.jpg": "t"}
    assert found.problems == ("sub/metadata.jsonl line 2 names d.jpg, which is not there; did you mean c.jpg?",)


def test_windows_separators(tmp_path: Path) -> None:
    assert read(tmp_path, {"metadata.csv": "file_name,text\nsub\\c.jpg,t\n"}).texts == {"sub/c.jpg": "t"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"file_name": "a.png"', "is not JSON (Expecting ',' delimiter at character 22); put one object on each line"),
        ("[" * 100_000, "is not JSON that can be read; put one object on each line"),
        ('["a.png"]', 'is not an object; write it like {"file_name": "dog.png", "text": "a photo of a dog"}'),
        ('"a.png"', 'is not an object; write it like {"file_name": "dog.png", "text": "a photo of a dog"}'),
        ('{"file": "a.png", "text": "t"}', 'names no picture (it has "file", "text"); add a "file_name"'),
        ("{}", 'names no picture (it has nothing); add a "file_name"'),
        ('{"file_name": "a.png", "label": 1}', 'has no caption (it has "file_name", "label"); add a "text"'),
        ('{"file_name": "a.png", "text": 3}', 'has a "text" that is no text; put the caption in quotes'),
        (
            '{"file_name": "a.png", "caption": " "}',
            'has an empty "caption" for a.png; write a caption, or remove the line',
        ),
        ('{"file_name": "A.PNG", "text": "t"}', "names A.PNG, which is not there; did you mean a.png?"),
        ('{"file_name": "c.jpg", "text": "t"}', "names c.jpg, which is not there; did you mean sub/c.jpg?"),
        (
            '{"file_name": "zzzzzzz", "text": "t"}',
            "names zzzzzzz, which is not there; add the picture, or remove the line",
        ),
        ('{"file_name": "notes.md", "text": "t"}', f"names notes.md, which is no picture; pictures end in {ENDINGS}"),
        (
            '{"file_name": "a\\u0000\\n.png", "text": "t"}',
            r"names a\x00\n.png, which is not there; did you mean a.png?",
        ),
    ],
)
def test_bad_row(tmp_path: Path, line: str, problem: str) -> None:
    good = '{"file_name": "b.png", "text": "good"}'
    found = read(tmp_path, {"metadata.jsonl": f"\n{line}\n{good}", "notes.md": ""})
    assert found.problems == (f"metadata.jsonl line 2 {problem}",)
    assert found.texts == {"b.png": "good"}


def test_a_picture_whose_name_has_a_space_around_it(tmp_path: Path) -> None:
    """A row that named it, space and all, was told that it is not there."""
    rows = "".join(f'{{"file_name": "{n}", "text": "[{n}]"}}\n' for n in ("space.png", "a.png", " a.png", "b.png "))
    found = read(tmp_path, {"metadata.jsonl": rows}, pictures=("a.png", "b.png", " space.png", " a.png"))
    assert found.problems == ()
    assert found.texts == {" space.png": "[space.png]", "a.png": "[a.png]", " a.png": "[ a.png]", "b.png": "[b.png ]"}


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "/etc/a.png", "C:\\a.png", "..\\a.png"])
def test_a_row_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    found = read(tmp_path / "in", {"metadata.csv": f"file_name,text\n{name},t\n"})
    assert found.problems == (
        f"metadata.csv line 2 names {name}, which leaves the folder; "
        "use a path inside it, relative to the metadata file",
    )
    assert not found.texts


def test_a_link_cannot_leave_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    (tmp_path / "secret.png").touch()
    (tmp_path / "secret.txt").write_text("secret")
    (root / "a.png").symlink_to(tmp_path / "secret.png")
    (root / "b.txt").symlink_to(tmp_path / "secret.txt")
    (root / "metadata.csv").write_text("file_name,text\na.png,t\n")
    (root / "b.png").touch()
    found = read_captions(root, ["a.png", "b.png"], ["b.txt", "metadata.csv"])
    assert found.problems == ("b.txt is a link to a file outside the folder; copy the file into the folder",)
    assert found.texts == {"a.png": "t"}  # the text is the folder's own


@pytest.mark.parametrize(("repository", "fine"), [("datasets--me--dogs", True), ("dogs", False)])
def test_files_of_a_hub_snapshot_are_links(tmp_path: Path, repository: str, fine: bool) -> None:
    blobs, root = tmp_path / repository / "blobs", tmp_path / repository / "snapshots" / "0a1b"
    (root / "train").mkdir(parents=True)
    blobs.mkdir()
    for blob, name, text in (("1", "a.png", ""), ("2", "a.txt", "one"), ("3", "b.png", ""), ("4", "b.txt", "two")):
        (blobs / blob).write_text(text)
        (root / "train" / name).symlink_to(f"../../../blobs/{blob}")
    (tmp_path / "secret").write_text("secret")
    (blobs / "4").unlink()
    (blobs / "4").symlink_to(tmp_path / "secret")
    for folder in (root / "train", root):
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.*"))]
        pictures, others = ([name for name in names if name.endswith(end)] for end in (".png", ".txt"))
        found = read_captions(folder, pictures, others)
        assert list(found.texts.values()) == (["one"] if fine else [])
        assert len(found.problems) == (1 if fine else 2)


def test_a_link_inside_the_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "b.png").touch()
    (tmp_path / "a.png").symlink_to("b.png")
    assert read(tmp_path, {"metadata.csv": "file_name,text\na.png,t\n"}).texts == {"a.png": "t"}


def test_blamed_pictures_are_those_with_a_bad_caption_and_no_other(tmp_path: Path) -> None:
    lines = '{"file_name": "a.png"}\n{"file_name": "b.png"}'
    found = read(tmp_path, {"metadata.jsonl": lines, "b.txt": "from the sidecar"})
    assert found.blamed == {"a.png"}
    assert found.texts == {"b.png": "from the sidecar"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,text\na.png,one|1\nb.png,cat\na.png,a {red|blue} dog\na.png,one|1\nb.png,cat\n"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "one|1"}\n{"file_name": "b.png", "text": ["cat", null]}\n'
            '{"file_name": "a.png", "text": "a {red|blue} dog"}\n{"file_name": "b.png", "text": "cat"}\n',
        ),
    ],
)
def test_a_row_for_each_caption_of_a_picture(tmp_path: Path, name: str, content: str) -> None:
    found = read(tmp_path, {name: content})
    assert found.texts == {"a.png": r"{one\|1|a {red|blue} dog}", "b.png": "cat"}
    assert (found.problems, found.several, found.sources) == ((), 1, {name: 2})


def test_a_list_of_captions_is_any_of_them(tmp_path: Path) -> None:
    rows = (
        '{"file_name": "a.png", "text": ["a dog", "one {brown|b}", "a  dog"]}\n{"file_name": "b.png", "text": ["x", 1]}'
    )
    found = read(tmp_path, {"metadata.jsonl": rows})
    assert found.texts == {"a.png": r"{a dog|one \{brown\|b\}}"}
    assert found.problems == ('metadata.jsonl line 2 has a "text" that is no text; put the caption in quotes',)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("file_name,label\na.png,1\n", '(it has "file_name", "label"); name them in its first line'),
        ("a.png,a dog\n", '(it has "a.png", "a dog"); name them in its first line'),
        ("", "(it has nothing); name them in its first line"),
    ],
)
def test_csv_without_its_columns(tmp_path: Path, content: str, problem: str) -> None:
    found = read(tmp_path, {"metadata.csv": content})
    assert found.problems == (f'metadata.csv needs the columns "file_name" and "text" {problem}',)


def test_csv_field_without_end(tmp_path: Path) -> None:
    found = read(tmp_path, {"metadata.csv": 'file_name,text\na.png,"' + "x" * 200_000})
    assert found.problems == (
        "metadata.csv has a quote in line 2 that is not closed (field larger than field limit (131072)); close it, or save the "
        "file as plain CSV",
    )


def test_csv_row_with_commas_that_are_not_in_quotes(tmp_path: Path) -> None:
    rows = "a.png,a red dog, sitting, on grass\nb.png,a cat\n"
    found = read(tmp_path, {"metadata.csv": f"file_name,text\n{rows}"})
    assert found.texts == {"b.png": "a cat"}
    assert found.problems == ("metadata.csv line 2 has 4 cells for 2 columns; put cells with commas in quotes",)
    assert found.blamed == {"a.png"}


def test_csv_with_semicolons_and_empty_rows(tmp_path: Path) -> None:
    found = read(tmp_path, {"metadata.csv": "\nfile_name; text\na.png;a red dog, sitting\n;\n"})
    assert (found.texts, found.problems) == ({"a.png": "a red dog, sitting"}, ())


def test_csv_as_people_and_spreadsheets_write_it(tmp_path: Path) -> None:
    """A comma too many at the end of a row, and text behind a closing quote."""
    rows = 'a.png,"a dog" sits\nb.png,a cat,\nsub/c.jpg,"a red, fat hen", ,\n'
    found = read(tmp_path, {"metadata.csv": f"file_name,text\n{rows}"})
    assert found.texts == {"a.png": "a dog sits", "b.png": "a cat", "sub/c.jpg": "a red, fat hen"}
    assert found.problems == ()


@pytest.mark.parametrize("rows", ['a.png,"a dog\nb.png,a cat\n', 'a.png,"a dog\nb.png,"a cat"\n', 'a.png,"a dog'])
def test_csv_with_a_quote_that_nothing_closes(tmp_path: Path, rows: str) -> None:
    found = read(tmp_path, {"metadata.csv": f"file_name,text\n{rows}"})
    assert len(found.problems) == 1 and "metadata.csv has a quote in line 2 that is not closed" in found.problems[0]
    assert not found.texts


def test_short_csv_row(tmp_path: Path) -> None:
    found = read(tmp_path, {"metadata.csv": "file_name,text\na.png\n"})
    assert found.problems == ('metadata.csv line 2 has no caption (it has "file_name", "text"); add a "text"',)


def test_not_utf8(tmp_path: Path) -> None:
    found = read(tmp_path, {"metadata.csv": b"file_name\xff", "a.txt": "\u00e9".encode("utf-16"), "b.txt": b"\xe9"})
    assert found.problems == (
        "metadata.csv is not UTF-8 text (at byte 9); save it as UTF-8",
        "a.txt is UTF-16 text; save it as UTF-8",
        "b.txt is not UTF-8 text (at byte 0); save it as UTF-8",
    )


def test_empty_sidecar(tmp_path: Path) -> None:
    found = read(tmp_path, {"a.txt": " \n"})
    assert found.problems == ("a.txt is empty; write a caption in it, or pass --prompt for all pictures",)
    assert found.blamed == {"a.png"}


def test_sidecar_without_its_picture(tmp_path: Path) -> None:
    found = read(
        tmp_path, {"a.txt": "t", "sub/a-dog.txt": "t", "C.txt": "t", "readme.txt": "t"}, ("a.png", "sub/c.jpg")
    )
    assert found.problems == (
        "C.txt is a caption, but no picture has its name; did you mean sub/c.txt?",
        "sub/a-dog.txt is a caption, but no picture has its name; add the picture, or remove it",
    )


def test_text_that_is_no_caption(tmp_path: Path) -> None:
    assert read(tmp_path, {"some thoughts.txt": "t", "LICENSE.txt": "t"}) == Captions({}, {}, (), frozenset())
    assert read(tmp_path, {"zzzzzzzz.caption": "t"}).problems == (
        "zzzzzzzz.caption is a caption, but no picture has its name; add the picture, or remove it",
    )


def test_accents_may_be_encoded_otherwise(tmp_path: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    pictures = (f"{nfd}1.png", f"{nfc}2.png", f"{nfd}3.png", f"{nfd}4.png", f"{nfc}4.png")
    rows = f"{nfc}1.png,one\n{nfd}2.png,two\n"
    sidecars: dict[str, str | bytes] = {f"{nfc}3.txt": "three", f"{nfc}4.txt": "nfc", f"{nfd}4.txt": "nfd"}
    found = read(tmp_path, {"metadata.csv": f"file_name,text\n{rows}", **sidecars}, pictures)
    assert [found.texts[name] for name in pictures] == ["one", "two", "three", "nfd", "nfc"]
    assert not found.problems


def test_many_rows_without_their_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("difflib.get_close_matches", lambda name, names, n: compared.append(name) or [])
    rows = "".join(f"missing_{i}.png,t\n" for i in range(100))
    found = read(
        tmp_path, {"metadata.csv": f"file_name,text\n{rows}", **{f"other_{i}.caption": "t" for i in range(100)}}
    )
    assert len(found.problems) == 200
    assert len(compared) == 40


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("dog.png", "dog"),
        ("sub/a_red-dog.jpeg", "a red dog"),
        ("0001_dog.png", "dog"),
        ("00012-345678-a photo of a dog.png", "a photo of a dog"),
        ("3. dog.png", "dog"),
        ("3) dog.png", "dog"),
        ("dog (3).png", "dog"),
        ("dog(12).png", "dog"),
        ("dog_01.png", "dog"),
        ("dog_01 (2).png", "dog"),
        ("3d dog v2.png", "3d dog v2"),
        ("dog.2.png", "dog.2"),
        ("a--dog__.png", "a dog"),
        ("日本_犬_2.png", "日本 犬"),
        ("001.png", ""),
        ("1 (2).png", ""),
        ("12 34.png", ""),
        ("__.png", ""),
    ],
)
def test_names_as_captions(name: str, caption: str) -> None:
    assert caption_of_name(name) == caption
