"""From folders and tables to labels, and what is said about those that cannot be used."""

from __future__ import annotations

import importlib.util
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionlora.data.class_tables import pictures_of
from visionlora.data.classes import natural, read_labelled
from visionlora.data.labelled import LabelledData
from visionlora.errors import ConfigError, DataError


def files(root: Path, *names: str) -> Path:
    """Empty files: no picture is opened here."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def labelled(data: LabelledData) -> dict[str, Any]:
    """Path -> name of its class (names, where there are several)."""
    names = {data.name_of(i): tuple(data.classes[c] for c in item.labels) for i, item in enumerate(data.items)}
    return names if data.multi_label else {path: name for path, (name,) in names.items()}


def said(path: Path, error: type[Exception] = DataError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        read_labelled(path, **options)
    return str(caught.value)


def problems(path: Path, **options: Any) -> list[str]:
    first, *lines, ending = said(path, **options).splitlines()
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    assert first == f"{path} has {count}:"
    assert ending.startswith("Fix this")
    return [line.strip() for line in lines]


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two pictures of cats and two of dogs, in class folders."""
    return files(tmp_path / "pets", "cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Four pictures in one folder, without labels."""
    return files(tmp_path / "flat", *(f"{i}.png" for i in range(4)))


def table(root: Path, text: str, name: str = "labels.csv") -> Path:
    (root / name).write_text(text, encoding="utf-8")
    return root / name


FOUR = "path,label\n0.png,cat\n1.png,dog\n2.png,cat\n3.png,dog\n"


# Class folders.


def test_class_folders(pets: Path) -> None:
    files(pets, "cat/b/c/3.JPG", "cat/.hidden.png", ".cache/x.png", "__MACOSX/cat/1.png", "README.md", "dog/note.txt")
    data = read_labelled(pets)
    assert data.classes == ("cat", "dog")
    assert labelled(data) == {
        "cat/1.png": "cat",
        "cat/2.png": "cat",
        "cat/b/c/3.JPG": "cat",
        "dog/1.png": "dog",
        "dog/2.png": "dog",
    }
    assert {item.split for item in data.items} == {None}
    assert (data.source, data.notes, data.multi_label) == ("labels from the class folders", (), False)


def test_classes_are_in_natural_order(tmp_path: Path) -> None:
    files(tmp_path, *(f"{name}/{i}.png" for name in ("10", "2", "b", "A 1", "A 02") for i in range(2)))
    assert read_labelled(tmp_path).classes == ("2", "10", "A 1", "A 02", "b")


@given(st.lists(st.text()))
def test_natural_order_is_an_order_of_all_names(names: list[str]) -> None:
    backwards = names[::-1]
    assert sorted(names, key=natural) == sorted(backwards, key=natural)


@pytest.mark.parametrize(
    "spelled",
    [
        ("train", "val", "test"),
        ("Training", "valid", "testing"),
        ("train", "validation", "TEST"),
        ("train", "dev", "test"),
        ("train", "Eval", "test"),
        ("train", "evaluation", "test"),
    ],
)
def test_split_folders(tmp_path: Path, spelled: tuple[str, str, str]) -> None:
    train, val, test = spelled
    files(tmp_path, f"{train}/dog/1.png", f"{train}/cat/sub/1.png", f"{train}/cat/2.png", f"{val}/dog/1.png")
    files(tmp_path, f"{test}/ape/1.png", "docs/readme.md")
    data = read_labelled(tmp_path)
    assert data.classes == ("ape", "cat", "dog")  # that train has no ape shifts nothing
    assert {labelled(data)[f"{train}/cat/sub/1.png"], labelled(data)[f"{val}/dog/1.png"]} == {"cat", "dog"}
    assert {item.path.parts[len(tmp_path.parts)]: item.split for item in data.items} == {
        train: "train",
        val: "val",
        test: "test",
    }
    assert data.source == f"labels from the class folders, splits from the folders {', '.join(sorted(spelled))}"


@pytest.mark.parametrize("tops", [("train", "car"), ("val", "test")])
def test_folders_that_only_sound_like_splits_are_classes(tmp_path: Path, tops: tuple[str, str]) -> None:
    files(tmp_path, *(f"{top}/x/{i}.png" for top in tops for i in range(2)))
    data = read_labelled(tmp_path)
    assert data.classes == tuple(sorted(tops))
    assert {item.split for item in data.items} == {None}
    assert any("are taken as classes" in note for note in data.notes) == (tops == ("val", "test"))


def test_other_folders_beside_splits_are_left_out(tmp_path: Path) -> None:
    names = [f"{split}/{name}/{i}.png" for split in ("train", "dev") for name in ("cat", "dog") for i in range(2)]
    files(tmp_path, *names, "figures/plot.png", "raw/cat/1.png", "raw/cat/2.png")
    data = read_labelled(tmp_path)
    assert data.classes == ("cat", "dog")
    assert {item.split for item in data.items} == {"train", "val"}
    assert data.notes == ("left out, beside the splits dev, train: 3 pictures in figures, raw",)
    files(tmp_path, "test/1.png", "test/2.png")  # without labels
    assert problems(tmp_path)[0].startswith("2 pictures lie in no class folder: test/1.png, test/2.png")


def test_flat_folders_that_may_be_splits_are_classes_and_that_is_said(tmp_path: Path) -> None:
    files(tmp_path, *(f"{top}/{i}.png" for top in ("train", "test", "rest") for i in range(2)))
    data = read_labelled(tmp_path)
    assert data.classes == ("rest", "test", "train")
    assert data.notes == (
        "the folders test, train are taken as classes, not as splits; for splits, put train and val or test, each with a "
        "folder for every class, into a folder of their own",
    )


def test_linked_pictures_count_linked_folders_are_mentioned(pets: Path, tmp_path: Path) -> None:
    files(tmp_path, "else/3.png")
    (pets / "cat" / "3.png").symlink_to(tmp_path / "else" / "3.png")
    (pets / "loop").symlink_to(pets)
    data = read_labelled(pets)
    assert len(data.items) == 5
    assert data.notes == ("left out, linked folders are not entered: loop",)


def test_runs_beside_the_classes_are_none(pets: Path) -> None:
    files(pets, "runs/classify-a/asked.yaml", "runs/classify-a/loss.png")
    data = read_labelled(pets)
    assert data.classes == ("cat", "dog")
    assert data.notes == ("left out, folders of runs are not entered: runs/classify-a",)


def test_what_is_mentioned(pets: Path) -> None:
    files(pets, "emu/1.png", "ant/1.png", "ant/2.heic")
    assert read_labelled(pets).notes == (
        "left out, export as JPEG or PNG to use: ant/2.heic",
        "2 classes have only one picture: ant, emu",
    )


def test_problems_of_folders_come_in_one_message(pets: Path) -> None:
    files(pets, "a.png", "b.png", "Dog/9.png")
    (pets / "emu").mkdir()
    lines = problems(pets)
    assert lines == [
        'the class names "Dog" and "dog" differ only in case; give both the same name',
        "2 pictures lie in no class folder: a.png, b.png; move each into the folder of its class",
        'class "emu" has no picture; add some, or remove the class',
    ]
    assert said(pets).endswith("\nFix this first. --skip-broken passes over some of it, but not all.")
    assert problems(pets, skip_broken=True) == lines
    (pets / "Dog" / "9.png").unlink()
    (pets / "Dog").rmdir()
    assert said(pets).endswith(
        "\nFix this, or pass --skip-broken to leave out what cannot be used and go on with 4 pictures."
    )
    data = read_labelled(pets, skip_broken=True)
    assert data.classes == ("cat", "dog")
    assert data.notes == tuple(f"left out: {line}" for line in lines[1:])


def test_class_names_that_look_the_same(tmp_path: Path) -> None:
    split_letters = unicodedata.normalize("NFD", "é")
    text = f'path,label\n0.png,é\n1.png,{split_letters}\n2.png,dog\n3.png," dog"\n'
    root = files(tmp_path, *(f"{i}.png" for i in range(4)))
    assert problems(root, table=table(root, text)) == [
        'the class names " dog" and "dog" differ only in the spaces around them; give both the same name',
        r"the class names 'e\u0301' and '\xe9' differ only in how accents are encoded (Unicode normal form); "
        "give both the same name",
    ]


def test_whole_numbers_of_which_some_became_fractions(flat: Path) -> None:
    path = table(flat, "path,label\n0.png,1.0\n1.png,2\n2.png,1\n3.png,01\n")
    assert problems(flat, table=path) == [
        'the class names "1" and "1.0" differ only in how the number is written; give both the same name'
    ]
    path = table(flat, "path,label\n0.png,1.0\n1.png,2.5\n2.png,2.0\n3.png,01\n")
    assert read_labelled(path).classes == ("01", "1.0", "2.0", "2.5")


def test_a_class_name_is_composed_and_without_spaces_around(tmp_path: Path) -> None:
    files(tmp_path, unicodedata.normalize("NFD", "café /1.png"), "dog/1.png")
    assert read_labelled(tmp_path).classes == ("café", "dog")


def test_a_picture_of_a_table_whose_name_has_a_space_around_it(tmp_path: Path) -> None:
    files(tmp_path, " a.png", "a.png", " b.png", "c.png")
    (tmp_path / "metadata.csv").write_text('file_name,label\n" a.png",x\na.png,y\nb.png,x\n"c.png ",y\n')
    found = read_labelled(tmp_path)
    assert {i.path.name: found.classes[i.labels[0]] for i in found.items} == {
        " a.png": "x", "a.png": "y", " b.png": "x", "c.png": "y"
    }  # fmt: skip


def test_one_class_only(tmp_path: Path) -> None:
    files(tmp_path, "cat/1.png", "cat/2.png")
    assert problems(tmp_path) == ['all 2 pictures are of one class, "cat"; add another class to tell apart']


def test_a_folder_around_the_classes(pets: Path) -> None:
    assert said(pets.parent) == (
        f"{pets.parent} has only one class folder, pets, and that holds folders; did you mean {pets}?"
    )


def test_no_class_folders(flat: Path) -> None:
    assert said(flat) == (
        f"{flat} holds 4 pictures but no class folders; put the pictures of each class into a folder of its name "
        f"({flat}/cat/0.png), or name a table of labels with --table."
    )
    table(flat, '{"file_name": "0.png", "text": "a cat"}\n', "metadata.jsonl")
    assert said(flat).endswith(
        ' metadata.jsonl has no column of labels (it has "file_name", "text"). '
        "Pictures with captions are for `visionlora train-sd`."
    )


def test_split_folders_without_class_folders(tmp_path: Path) -> None:
    files(tmp_path, "train/0.png", "val/1.png")
    assert f"({tmp_path}/train/cat/0.png)" in said(tmp_path)


def test_no_pictures(tmp_path: Path) -> None:
    endings = "pictures end in .avif, .bmp, .gif, .jfif, .jpe, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp"
    (tmp_path / "cat").mkdir()
    assert said(tmp_path) == (
        f"{tmp_path} holds no pictures; put those of each class into a folder of its name ({endings})."
    )
    files(tmp_path, "cat/a.txt", "cat/b.txt", "LICENSE")
    assert said(tmp_path) == f"{tmp_path} holds no pictures: found 2 .txt, 1 without ending, but {endings}."


def test_places_that_are_not_there(pets: Path) -> None:
    parent = pets.parent
    assert said(parent / "pet") == f"There is no folder {parent}/pet; did you mean {pets}?"
    assert said(parent / "zzzz") == f"There is no folder {parent}/zzzz; the folders in {parent} are pets."
    assert said(pets / "cat" / "x") == f"There is no folder {pets}/cat/x; {pets}/cat has no folders."
    table(parent, "", "labels.csv")
    assert said(parent / "label.csv") == f"There is no table {parent}/label.csv; did you mean {parent}/labels.csv?"
    assert said(pets, table=parent / "label.csv").startswith("There is no table")
    assert said(pets / "cat/1.png") == f"{pets}/cat/1.png is one picture; pass the folder that holds the classes."
    assert said(parent / "labels.csv", ConfigError, table=parent / "labels.csv") == (
        f"{parent}/labels.csv is a file; with --table, pass the folder that its paths are relative to."
    )


# Metadata files.


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_metadata_file(flat: Path, name: str) -> None:
    rows = [{"file_name": f"{i}.png", "label": "dog" if i % 2 else "cat", "text": "x"} for i in range(3)]
    if name.endswith("csv"):
        text = "file_name,label,text\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    table(flat, text, name)
    data = read_labelled(flat)
    assert labelled(data) == {"0.png": "cat", "1.png": "dog", "2.png": "cat"}
    assert data.source == f'labels from the column "label" of {name}'
    assert data.notes == (
        "left out, no row names 1 picture of the folder: 3.png",
        "1 class has only one picture: dog",
    )


def test_metadata_files_of_splits(tmp_path: Path) -> None:
    files(tmp_path, "train/a.png", "train/b.png", "test/a.png")
    table(tmp_path / "train", "file_name,label\na.png,cat\nb.png,dog\n", "metadata.csv")
    table(tmp_path / "test", "file_name,label\na.png,dog\n", "metadata.csv")
    data = read_labelled(tmp_path)
    assert labelled(data) == {"test/a.png": "dog", "train/a.png": "cat", "train/b.png": "dog"}
    assert [item.split for item in data.items] == ["test", "train", "train"]
    assert data.source.endswith(", splits from the folders test, train")


def test_one_metadata_file_above_split_folders(tmp_path: Path) -> None:
    files(tmp_path, "train/a.png", "train/b.png", "val/a.png")
    table(tmp_path, "file_name,label\ntrain/a.png,cat\ntrain/b.png,dog\nval/a.png,dog\n", "metadata.csv")
    assert [item.split for item in read_labelled(tmp_path).items] == ["train", "train", "val"]


def test_a_table_of_splits_and_another_folder(tmp_path: Path) -> None:
    names = ["train/a.png", "train/b.png", "val/a.png", "more/a.png"]
    files(tmp_path, *names)
    path = table(tmp_path, "path,label\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(names)))
    data = read_labelled(path)
    assert {item.split for item in data.items} == {None}
    assert data.notes == (
        "the folders train, val are not taken as splits: rows also name pictures outside them, e.g. more/a.png",
    )
    path = table(tmp_path, "path,label,split\ntrain/a.png,0,train\ntrain/b.png,1,train\nval/a.png,0,dev\n", "s.csv")
    assert [item.split for item in read_labelled(path).items] == ["train", "train", "val"]


def test_captions_are_no_labels(pets: Path) -> None:
    table(pets, '{"file_name": "cat/1.png", "text": "a cat"}\n', "metadata.jsonl")
    data = read_labelled(pets)
    assert data.classes == ("cat", "dog")
    assert data.notes == ('metadata.jsonl is not used: none of its columns is a label (it has "file_name", "text")',)


def test_columns_without_a_table(pets: Path) -> None:
    assert said(pets, ConfigError, label_column="breed") == (
        f"label_column is for tables, but {pets} has no metadata.jsonl or metadata.csv; leave it out, or name the table "
        "with --table."
    )


# Tables.


def test_a_table(flat: Path) -> None:
    path = table(flat, FOUR)
    data = read_labelled(path)
    assert labelled(data) == {"0.png": "cat", "1.png": "dog", "2.png": "cat", "3.png": "dog"}
    assert data.root == flat
    assert read_labelled(flat, table=path).items == data.items


def test_a_table_elsewhere_is_relative_to_the_folder(flat: Path, tmp_path: Path) -> None:
    path = table(tmp_path, FOUR)
    assert [item.path for item in read_labelled(flat, table=path).items] == [flat / f"{i}.png" for i in range(4)]


def test_a_table_lists_only_the_folders_that_it_names(pets: Path, tmp_path: Path) -> None:
    files(tmp_path, "holiday/1.png", "pets/cat/3.png")
    path = table(tmp_path, "path,label\npets/cat/1.png,cat\npets\\dog\\1.png,dog\n")
    assert read_labelled(path).notes[0] == (
        "left out, no row names 3 pictures of the folder: pets/cat/2.png, pets/cat/3.png, pets/dog/2.png"
    )


def test_accents_of_paths_may_be_encoded_otherwise(tmp_path: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    files(tmp_path, f"{nfd}/0.png", f"{nfc}1.png")
    path = table(tmp_path, f"path,label\n{nfc}/0.png,cat\n{nfd}1.png,dog\n")
    assert labelled(read_labelled(path)) == {f"{nfd}/0.png": "cat", f"{nfc}1.png": "dog"}


def test_an_absolute_path_inside_the_folder(flat: Path) -> None:
    path = table(flat, f"path,label\n{flat}/0.png,cat\n./1.png,dog\n")
    assert labelled(read_labelled(path)) == {"0.png": "cat", "1.png": "dog"}


def test_columns_are_found_by_name_or_given(flat: Path) -> None:
    text = "Image,Species,Category,who,subset\n" + "".join(f"{i}.png,{i},c{i % 2},p{i},train\n" for i in range(4))
    path = table(flat, text)
    data = read_labelled(path)
    assert data.classes == ("c0", "c1")
    assert [(item.split, item.group) for item in data.items] == [("train", None)] * 4
    assert data.source == f'labels from the column "Category" of {path}, splits from the column "subset"'
    data = read_labelled(path, label_column="Species", group_column="who", path_column="Image", split_column="subset")
    assert data.classes == ("0", "1", "2", "3")
    assert [item.group for item in data.items] == ["p0", "p1", "p2", "p3"]


def test_groups_are_told_apart_as_classes_are(flat: Path) -> None:
    split_letters = unicodedata.normalize("NFD", "é")
    path = table(flat, f'path,label,who\n0.png,a,p1\n1.png,b," p1 "\n2.png,a,{split_letters}\n3.png,b,é\n')
    assert [item.group for item in read_labelled(path, group_column="who").items] == ["p1", "p1", "é", "é"]
    path = table(flat, "path,label,who\n0.png,a,p1\n1.png,b,P1\n2.png,a,\n3.png,b, \n")
    assert problems(flat, table=path, group_column="who") == [
        'the group names "P1" and "p1" differ only in case; give both the same name'
    ]
    path = table(flat, "path,label,who\n0.png,a,p1\n1.png,b,p2\n2.png,a,\n3.png,b, \n")
    data = read_labelled(path, group_column="who")
    assert [item.group for item in data.items] == ["p1", "p2", None, None]
    assert data.notes == ("2 pictures have no group, so that each may be on any side: 2.png, 3.png",)


def test_columns_that_are_not_there(flat: Path) -> None:
    path = table(flat, "file,kind\n0.png,cat\n")
    assert said(path, ConfigError, label_column="kinds") == (
        f"label_column: {path} has no column \"kinds\". Did you mean 'kind'?"
    )
    assert said(path) == (
        f'{path} has no column of labels (it has "file", "kind"); name it with label_column=NAME, or call it "label"; for '
        "one column of 0 and 1 a class, name them with label_columns=[A,B]."
    )
    assert said(table(flat, "0.png,cat\n1.png,dog\n")) == (
        f'{path} has no column of picture paths (it has "0.png", "cat"); name it with path_column=NAME, or call it "path".'
    )
    assert said(table(flat, "file,kind\n0.png,1\n"), ConfigError, label_columns=("file,kind",)) == (
        "label_columns: several are written in brackets: label_columns=[file,kind]."
    )
    for wrong in ({"label_column": "a", "label_columns": ("b",)}, {"label_columns": ("kind", "kind")}):
        assert "label_columns" in said(table(flat, "file,kind\n"), ConfigError, **wrong)


def test_a_column_that_sounds_like_groups_is_pointed_out(flat: Path) -> None:
    rows = [f"{i}.png,{i % 2},p{i // 2}" for i in range(4)]
    path = table(flat, "\n".join(["path,label,Patient", *rows]))
    assert read_labelled(path).notes == (
        'the column "Patient" is not used; group_column=Patient keeps pictures that share its value on one side of the split',
    )
    assert read_labelled(path, group_column="Patient").notes == ()
    assert read_labelled(path, label_column="Patient").notes == ()
    split = [f"{row},{side}" for row, side in zip(rows, ("train", "train", "val", "test"), strict=True)]
    assert read_labelled(table(flat, "\n".join(["path,label,patient,split", *split]))).notes == ()
    each_its_own = [f"{i}.png,{i % 2},{i}" for i in range(4)]
    assert read_labelled(table(flat, "\n".join(["path,label,patient", *each_its_own]))).notes == ()


def test_a_split_that_is_misspelt_or_missing_is_no_reason_to_draw_others(flat: Path) -> None:
    text = "path,label,split\n" + "".join(
        f"{i}.png,{i % 2},{side}\n" for i, side in enumerate(("train", "tets", "", "test"))
    )
    path = table(flat, text)
    assert problems(flat, table=path) == [
        f'{path} line 3 has "tets" in "split"; allowed are train, val and test',
        f'{path} line 4 has nothing in "split"; allowed are train, val and test',
    ]


def test_a_column_that_only_sounds_like_splits(flat: Path) -> None:
    text = "path,label,set\n" + "".join(f"{i}.png,{i % 2},{'AB'[i % 2]}\n" for i in range(4))
    data = read_labelled(table(flat, text))
    assert data.notes == ('the column "set" is not used: it does not name train, val and test',)
    assert problems(flat, table=flat / "labels.csv", split_column="set")[:2] == [
        'no row is in train by the column "set"; allowed are train, val, test',
        f'{flat}/labels.csv line 2 has "A" in "set"; allowed are train, val and test',
    ]


def test_problems_of_rows_come_in_one_message(flat: Path) -> None:
    files(flat, "sub/7.png", "notes.txt", ".x.png")
    names = ["0.png", "1.png", "7.png", "2.jpg", "../9.png", "/etc/9.png", "notes.txt", ".x.png", "", "q/xyz.webp"]
    rows = "".join(f"{name},{'cd'[i % 2]}\n" for i, name in enumerate(names))
    path = table(flat, f"path,label\n{rows}3.png,\n2.png,c,d\n")
    here = f"{path} line"
    lines = problems(flat, table=path)
    assert sorted(lines) == sorted(
        [
            f"{here} 4 names 7.png, which is not there; did you mean sub/7.png?",
            f"{here} 5 names 2.jpg, which is not there; did you mean 2.png?",
            f"{here} 6 names ../9.png, which leaves {flat}; use a path inside it",
            f"{here} 7 names /etc/9.png, which leaves {flat}; use a path inside it",
            f"{here} 8 names notes.txt, which is no picture; pictures end in .avif, .bmp, .gif, .jfif, .jpe, .jpeg, "
            ".jpg, .pgm, .png, .ppm, .tif, .tiff, .webp",
            f"{here} 9 names .x.png, which is hidden; rename it to use it",
            f'{here} 10 names no picture in "path"; write its path there, or remove the row',
            f"{here} 11 names q/xyz.webp, which is not there",
            f'{here} 12 has an empty "label"; write the class there, or remove the row',
            f"{here} 13 has 3 cells for 2 columns; put cells with commas in quotes",
        ]
    )
    data = read_labelled(flat, table=path, skip_broken=True)
    assert labelled(data) == {"0.png": "c", "1.png": "d"}
    assert [note for note in data.notes if note.startswith("left out: ")] == [f"left out: {line}" for line in lines]


def test_a_class_all_of_whose_pictures_are_missing(flat: Path) -> None:
    path = table(flat, f"{FOUR}9.png,emu\n")
    assert problems(flat, table=path)[-1] == 'class "emu" has no picture; add some, or remove the class'
    assert read_labelled(path, skip_broken=True).classes == ("cat", "dog")


def test_a_table_of_other_pictures(flat: Path) -> None:
    path = table(flat, "path,label\npics/0.png,cat\npics/1.png,dog\n")
    assert said(flat, table=path) == (
        f"None of the 2 pictures that {path} names is there; the first is pics/0.png, and paths are relative to {flat}; "
        "did you mean 0.png?"
    )


def test_paths_that_begin_above_the_folder(flat: Path) -> None:
    path = table(flat.parent, "path,label\nflat/0.png,cat\nflat/1.png,dog\n")
    assert said(flat, table=path).endswith(
        f"paths are relative to {flat}; from {flat.parent} they are there: give that folder"
    )


def test_pictures_named_without_their_endings(tmp_path: Path) -> None:
    root = files(tmp_path / "x", "1.png", "v1.2.JPG", "sub/3.png", "4.png", "4.jpg", "5.png.jpg", "6.png")
    rows = ["1,cat", "v1.2,dog", "sub/3,cat", "4,dog", "5.png,cat", "6.png,dog"]
    path = table(root, "\n".join(["id,label", *rows]))
    assert "name it with path_column=id, or" in said(path)
    for places in ({"path": path}, {"path": root, "table": path}):
        for problem in (
            f"{path} line 5 names 4, which is not there; did you mean 4.jpg?",
            f"{path} line 6 names 5.png, which is not there; did you mean 5.png.jpg?",
        ):
            assert problem in said(**places, path_column="id")
        data = read_labelled(**places, path_column="id", skip_broken=True)
        assert labelled(data) == {"1.png": "cat", "6.png": "dog", "sub/3.png": "cat", "v1.2.JPG": "dog"}
    numbers = root / "numbers.jsonl"
    numbers.write_text('{"id": 1, "label": "cat"}\n{"id": 6.0, "label": "dog"}\n')
    assert labelled(read_labelled(numbers, path_column="id")) == {"1.png": "cat", "6.png": "dog"}
    assert [found[1].name for found in pictures_of(numbers, "id")[0]] == ["1.png", "6.png"]


def test_a_picture_listed_twice(flat: Path) -> None:
    data = read_labelled(table(flat, f"{FOUR}0.png,cat\n"))
    assert data.notes == ("listed more than once, with the same label: 0.png",)
    path = table(flat, f"{FOUR}0.png,dog\n")
    line = f'{path} line 6 labels 0.png "dog", after "cat" in line 2; keep one of the two'
    assert problems(flat, table=path) == problems(flat, table=path, skip_broken=True) == [line]
    path = table(flat, "path,label,split\n0.png,a,train\n0.png,a,test\n1.png,b,train\n")
    assert problems(flat, table=path) == [
        f'{path} line 3 puts 0.png into split "test", after "train" in line 2; keep one of the two'
    ]


def test_several_labels_in_one_cell_are_mentioned(flat: Path) -> None:
    data = read_labelled(table(flat, FOUR.replace("cat", "cat|pet")))
    assert data.classes == ("cat|pet", "dog")
    assert data.notes == (
        '1 label such as "cat|pet" may be several in one; each is taken as one class; for several labels a picture, make '
        "a column of 0 and 1 for each class and name them with label_columns=[A,B]",
    )


def test_a_class_that_may_be_a_missing_label_is_mentioned(flat: Path) -> None:
    data = read_labelled(table(flat, FOUR.replace("cat", "nan")))
    assert data.classes == ("dog", "nan")
    (note,) = data.notes
    assert note.startswith('"nan" is a class here, of 2 pictures; it is also how pandas writes a label that is missing')


def test_numbers_are_labels_too(flat: Path) -> None:
    rows = [{"path": f"{i}.png", "label": [10, 2.0, True, 0.5][i]} for i in range(4)]
    path = table(flat, "".join(json.dumps(row) + "\n" for row in rows), "labels.jsonl")
    assert read_labelled(path).classes == ("0.5", "2", "10", "True")


def test_rows_of_json(flat: Path) -> None:
    lines = [
        '{"path": "0.png", "label": ["a", "b"]}',
        '{"path": "1.png", "label": {"a": 1}}',
        "[1]",
        '{"path": "0.png", "label": null}',
        '{"path": "0.png", "label": "a"}',
        '{"path": "1.png", "label": "b"}',
    ]
    path = table(flat, "\n".join(lines), "labels.jsonl")
    assert problems(flat, table=path) == [
        f'{path} line 3 is no JSON object; write it like {{"file_name": "a.png", "label": "cat"}}',
        f'{path} line 1 has several values in "label"; make a column of 0 and 1 for each class and name them with '
        "label_columns=[A,B]",
        f'{path} line 2 has a "label" that is neither text nor a number; write it in quotes',
        f'{path} line 4 has an empty "label"; write the class there, or remove the row',
    ]


def test_a_table_without_rows(flat: Path) -> None:
    path = table(flat, "path,label\n")
    assert said(path) == (
        f"{flat} has 1 problem:\n  {path} has no rows; add one line for each picture\n"
        "Fix this first: no usable picture is left."
    )


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="reads with pyarrow")
def test_pictures_within_a_parquet_table(flat: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = flat / "labels.parquet"
    columns = {"label": [1, 2], "image": [{"bytes": b"x"}] * 2}
    pyarrow.parquet.write_table(pyarrow.table({**columns, "path": ["0.png", "1.png"]}), path)
    assert labelled(read_labelled(path)) == {"0.png": "1", "1.png": "2"}
    features = {"label": {"names": ["no", "cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    rows = {
        **columns,
        "image": [{"bytes": b"x", "path": "a.png"}, {"bytes": b"y", "path": "b.png"}],
        "split": ["train", "test"],
    }
    told = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(pyarrow.table(rows).replace_schema_metadata(told), path)
    data = read_labelled(path)
    assert labelled(data) == {f"{path} row 1": "cat", f"{path} row 2": "dog"} and data.root == path
    assert [item.path.read_bytes() for item in data.items] == [b"x", b"y"] and data.items[1].split == "test"
    assert said(flat, table=path) == (
        f'{path} has no column of picture paths (it has "label", "split"); for pictures in "image", give the table itself as '
        '--images; name it with path_column=NAME, or call it "path".'
    )


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="reads with pyarrow")
def test_labels_in_lists_are_not_read(flat: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = flat / "labels.parquet"
    rows = {"image": [{"bytes": b"x", "path": "a.png"}] * 2, "labels": [[1, 2], [3]]}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    assert said(path) == (
        f'{path} has no column of labels (it has nothing; "image", "labels" hold no plain values); name it with '
        'label_column=NAME, or call it "label"; for one column of 0 and 1 a class, name them with label_columns=[A,B].'
    )


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="reads with pyarrow")
def test_rows_of_a_parquet_table_that_hold_no_picture(flat: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = flat / "labels.parquet"
    columns = {"label": [1, 2, 1], "image": [{"bytes": b"x"}, {"bytes": None}, {"bytes": b"z"}]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert "labels.parquet row 2 holds no picture; remove the row" in said(path)
    pyarrow.parquet.write_table(pyarrow.table({**columns, "label": [1, 2, 3]}), path)
    assert problems(path) == [f"{path} row 2 holds no picture; remove the row"]
    assert labelled(read_labelled(path, skip_broken=True)) == {f"{path} row 1": "1", f"{path} row 3": "3"}
    pyarrow.parquet.write_table(pyarrow.table({"label": [1, 2], "image": [b"", b""]}), path)
    assert "labels.parquet row 1 holds no picture" in said(path)
    pyarrow.parquet.write_table(pyarrow.table({"label": [1, 2], "box": [[1], [2]]}), path)
    assert "has no column of pictures" in said(path)


def shard(root: Path, name: str, labels: list[str], **more: Any) -> Path:
    """A parquet file that holds a picture, whose bytes are its own, for each label."""
    pyarrow, parquet = (pytest.importorskip(module) for module in ("pyarrow", "pyarrow.parquet"))
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    pictures = [{"bytes": f"{name} {i}".encode()} for i in range(len(labels))]
    images = pyarrow.array(pictures, pyarrow.struct([("bytes", pyarrow.binary())]))
    parquet.write_table(pyarrow.table({"image": images, "label": labels, **more}), root / name)
    return root


def splits_of(data: LabelledData) -> dict[str, str | None]:
    return {data.name_of(i): item.split for i, item in enumerate(data.items)}


def test_shards_in_a_folder_and_the_splits_that_their_names_say(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    shard(root, "data/train-00000-of-00002.parquet", ["cat", "dog"])
    shard(root, "data/train-00001-of-00002.parquet", ["cat", "dog"])
    shard(root, "data/validation-00000-of-00001.parquet", ["dog"])
    shard(root, "data/extra.parquet", ["bird"])
    shard(root, "test/0000.parquet", ["cat"])
    data = read_labelled(root)
    assert data.classes == ("cat", "dog") and data.root == root
    rows = "data/train-00000-of-00002.parquet row 1", "data/train-00001-of-00002.parquet row 2"
    assert labelled(data)[rows[0]] == "cat" and labelled(data)[rows[1]] == "dog"
    assert splits_of(data) == {
        **{f"data/train-0000{i}-of-00002.parquet row {row}": "train" for i in (0, 1) for row in (1, 2)},
        "data/validation-00000-of-00001.parquet row 1": "val",
        "test/0000.parquet row 1": "test",
    }
    assert data.source == (
        'labels from the column "label" of data/train-00000-of-00002.parquet, data/train-00001-of-00002.parquet, '
        "data/validation-00000-of-00001.parquet, test/0000.parquet, splits from the names of the files"
    )
    assert data.notes[0] == "not used, as others are called train: data/extra.parquet"


def test_progress_of_shards_that_are_new(tmp_path: Path) -> None:
    root, told = shard(shard(tmp_path, "train.parquet", ["cat", "dog"]), "test.parquet", ["dog"]), []
    read_labelled(root, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 1), (1, 2), (2, 2)]
    read_labelled(root / "train.parquet", progress=lambda done, total: told.append((done, total)))
    pictures_of(root / "train.parquet", progress=lambda done, total: told.append((done, total)))
    assert len(told) == 3, "all is there"
    pictures_of(
        shard(root, "x.parquet", ["emu"]) / "x.parquet", progress=lambda done, total: told.append((done, total))
    )
    assert told[3:] == [(1, 1)]


def test_shards_beside_pictures_are_not_used(pets: Path) -> None:
    before = read_labelled(pets)
    shard(shard(pets, "train.parquet", ["cat"]), "cat/more.parquet", ["dog"])
    data = read_labelled(pets)
    assert data.items == before.items
    assert data.notes == (*before.notes, "not used, as there are pictures beside them: cat/more.parquet, train.parquet")


def test_shards_whose_names_say_no_split(tmp_path: Path) -> None:
    root = shard(shard(tmp_path, "a.parquet", ["cat"]), "test.parquet", ["dog"])
    assert splits_of(read_labelled(root)) == {"a.parquet row 1": None, "test.parquet row 1": None}, "none is train"
    shard(root, "train.parquet", ["cat", "dog"], split=["train", "test"])
    shard(root, "test.parquet", ["dog"], split=["train"])
    (root / "copy").mkdir()
    (root / "copy" / "train.parquet").write_bytes((root / "train.parquet").read_bytes())
    data = read_labelled(root)
    assert splits_of(data) == {
        "copy/train.parquet row 1": "train", "copy/train.parquet row 2": "test", "test.parquet row 1": "train",
    }, "a column comes first"  # fmt: skip
    assert "the same as copy/train.parquet, used once: train.parquet" in data.notes


def test_shards_that_hold_nothing(tmp_path: Path) -> None:
    root = shard(tmp_path, "train.parquet", ["cat", "dog", None])
    shard(root, "train-more.parquet", [])
    assert problems(root) == [
        "train-more.parquet has no rows",
        'train.parquet line 3 has an empty "label"; write the class there, or remove the row',
    ]
    assert list(labelled(read_labelled(root, skip_broken=True)).values()) == ["cat", "dog"]
    (root / "train.parquet").unlink()
    assert said(root) == "train-more.parquet has no rows."


# What a table names, for predictions.


def test_the_pictures_of_a_table_in_the_order_of_its_rows(flat: Path) -> None:
    path = table(flat, f"file,label\n2.png,cat\n{flat}/0.png,\n2.png,dog\n")
    assert pictures_of(path) == ([(f"{flat}/{name}", flat / name) for name in ("2.png", "0.png", "2.png")], [])
    path = table(flat, "id;picture\n1;3.png\n2;x.png\n3;../a.png\n4;labels.csv\n5;\n")
    found, wrong = pictures_of(path, "picture")
    assert found == [(f"{flat}/3.png", flat / "3.png")]
    assert [line.partition(";")[0] for line in wrong] == [
        f"{path} line 3 names x.png, which is not there",
        f"{path} line 4 names ../a.png, which leaves {flat}",
        f"{path} line 5 names labels.csv, which is no picture",
        f'{path} line 6 names no picture in "picture"',
    ]
    path = table(flat, "file\nx/1\nx/0\n")
    with pytest.raises(DataError) as caught:
        pictures_of(path)
    assert str(caught.value) == (
        f"None of the 2 pictures that {path} names is there; the first is x/1, and paths are relative to {flat}, where the "
        "table is"
    )
    path = table(flat, "id;picture\n1;3.png\n")
    with pytest.raises(DataError, match=r"has no column of picture paths .*name it with --path-column picture,"):
        pictures_of(path)


def test_the_pictures_that_a_table_holds(tmp_path: Path) -> None:
    path = shard(tmp_path, "pets.parquet", ["cat", "dog"]) / "pets.parquet"
    found, wrong = pictures_of(path)
    assert [name for name, _ in found] == [f"{path} row 1", f"{path} row 2"] and not wrong
    assert [file.read_bytes() for _, file in found] == [b"pets.parquet 0", b"pets.parquet 1"]


# Several labels a picture.


def test_several_labels(flat: Path) -> None:
    path = table(flat, "path,dog,cat\n0.png,1,0\n1.png,Yes,true\n2.png,no,FALSE\n3.png,0.0,1.0\n")
    data = read_labelled(path, label_columns=("dog", "cat"))
    assert data.multi_label
    assert data.classes == ("cat", "dog")
    assert labelled(data) == {"0.png": ("dog",), "1.png": ("cat", "dog"), "2.png": (), "3.png": ("cat",)}
    assert data.source == f'labels from the columns "dog", "cat" of {path}'


def test_problems_of_several_labels(flat: Path) -> None:
    path = table(flat, "path,dog,cat,emu\n0.png,1,2,0\n1.png,1,,0\n2.png,1,0,0\n3.png,0,1,0\n")
    assert problems(flat, table=path, label_columns=("dog", "cat", "emu")) == [
        f'{path} line 2 has "2" in "cat"; write 1 or 0 (or true, false, yes, no)',
        f'{path} line 3 has nothing in "cat"; write 1 or 0 (or true, false, yes, no)',
        'class "emu" has no picture; add some, or remove the class',
    ]


def test_a_label_of_all_pictures(flat: Path) -> None:
    path = table(flat, "path,pet,cat\n0.png,1,0\n1.png,1,1\n")
    assert read_labelled(path, label_columns=("pet", "cat")).notes[0] == 'every picture has the label "pet"'
    assert problems(flat, table=path, label_columns=("pet",)) == [
        'all pictures have the only label, "pet"; add pictures that do not'
    ]
    assert read_labelled(path, label_columns=("cat",)).classes == ("cat",)
    path = table(flat, "path,cat\n0.png,0\n")
    assert problems(flat, table=path, label_columns=("cat",))[0] == "no picture has any label"
