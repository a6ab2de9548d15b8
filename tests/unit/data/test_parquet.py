"""Pictures within parquet files become files, once."""

from __future__ import annotations

import builtins
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import visionlora.data.parquet as parquet
from visionlora.config import FolderConfig
from visionlora.data.folder import ImageFolder, read_image_folder, read_image_folders
from visionlora.data.images import decode
from visionlora.data.masks import mask_of
from visionlora.data.tags import caption_variants
from visionlora.errors import ConfigError, DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, rows: list[dict[str, Any]], kind: Any = STRUCT, size: int = 2, column: str = "image") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: pa.array([row.get(name) for row in rows], kind if name == column else None)
        for name in dict.fromkeys(name for row in rows for name in row)
    }
    pq.write_table(pa.table(arrays), path, row_group_size=size)
    return path


def cell(seed: int, path: str | None = None) -> dict[str, Any]:
    return {"bytes": png(seed), "path": path}


def rows(n: int = 5) -> list[dict[str, Any]]:
    return [{"image": cell(i, f"a_dog_{i}.png"), "text": f"dog  {i}"} for i in range(n)]


def check_pictures(folder: ImageFolder, names: list[str], captions: list[str]) -> None:
    assert [item.name for item in folder.items] == names
    assert [item.caption for item in folder.items] == captions
    for i, item in enumerate(folder.items):
        np.testing.assert_array_equal(np.asarray(decode(item.path)), pixels(i))


def said(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_image_folder(path, **options)
    return str(caught.value)


def test_a_file(tmp_path: Path) -> None:
    file, seen = write(tmp_path / "train.parquet", rows()), []
    folder = read_image_folder(file, cache=tmp_path / "cache", progress=lambda *at: seen.append(at))
    check_pictures(folder, [f"train.parquet row {i}" for i in range(1, 6)], [f"dog {i}" for i in range(5)])
    assert folder.caption_source == 'captions from the column "text" of train.parquet (5)'
    assert seen == [(f"{what} pictures", i, 5) for what in ("Unpacking", "Checking") for i in range(1, 6)]
    assert all(item.path.is_relative_to(tmp_path / "cache" / "parquet") for item in folder.items)
    assert folder.items[0].path.suffix == ".png"


def test_several_folders_with_files_of_one_name(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        write(tmp_path / name / "train.parquet", [{"image": cell(seed), "text": name}])
    configs = [FolderConfig(str(tmp_path / name)) for name in ("a", "b/train.parquet")]
    folder = read_image_folders([configs[0], FolderConfig(str(tmp_path / "b"))], cache=tmp_path / "cache")
    check_pictures(folder, [f"{tmp_path}/{name}/train.parquet row 1" for name in ("a", "b")], ["a", "b"])
    assert not any("look alike" in note for note in folder.notes)
    assert [item.name for item in read_image_folders(configs, cache=tmp_path / "cache").items] == [
        item.name for item in folder.items
    ]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize(("image", "text"), [("image", "caption"), ("Img", "Prompt")])
def test_columns_of_plain_bytes_and_other_names(tmp_path: Path, kind: Any, image: str, text: str) -> None:
    given = [{"other": b"x", image: png(i), text: f"dog {i}"} for i in range(3)]
    folder = read_image_folder(write(tmp_path / "a.parquet", given, kind, column=image))
    check_pictures(folder, [f"a.parquet row {i}" for i in (1, 2, 3)], ["dog 0", "dog 1", "dog 2"])


def test_a_folder_of_several_files(tmp_path: Path) -> None:
    write(tmp_path / "data" / "0.parquet", rows(2))
    write(tmp_path / "data" / "sub" / "1.parquet", [{"image": cell(2), "text": "dog 2"}])
    (tmp_path / "data" / "README.md").write_text("origin")
    folder = read_image_folder(tmp_path / "data")
    names = ["0.parquet row 1", "0.parquet row 2", "sub/1.parquet row 1"]
    check_pictures(folder, names, ["dog 0", "dog 1", "dog 2"])
    assert folder.caption_source == 'captions from the column "text" of 0.parquet and sub/1.parquet (3)'


def test_pictures_beside_it_come_first(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows())
    (tmp_path / "b.png").write_bytes(png(0))
    folder = read_image_folder(tmp_path)
    assert [item.name for item in folder.items] == ["b.png"]
    assert folder.notes == ("not used, as there are pictures beside it: a.parquet",)


def test_it_is_written_once_and_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = write(tmp_path / "a.parquet", rows()), tmp_path / "cache"
    first = read_image_folder(file, cache=cache)
    file.rename(tmp_path / "b.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "_write_rows", None)  # would raise
        again = read_image_folder(tmp_path / "b.parquet", cache=cache)
    assert [item.path for item in again.items] == [item.path for item in first.items]
    write(file, rows(2))
    assert len(read_image_folder(file, cache=cache).items) == 2
    assert len(list((cache / "parquet").iterdir())) == 2


@pytest.mark.parametrize("harm", ["cut", "removed", "no list", "broken list"])
def test_what_is_no_longer_whole_is_written_again(tmp_path: Path, harm: str) -> None:
    file = write(tmp_path / "a.parquet", rows())
    first = read_image_folder(file).items[3].path
    if harm == "cut":
        first.write_bytes(first.read_bytes()[:40])
    elif harm == "removed":
        first.unlink()
    else:
        (first.parent / "rows.json").write_text("{" if harm == "broken list" else '{"rows": [[1]]}')
    check_pictures(read_image_folder(file), [f"a.parquet row {i}" for i in range(1, 6)], [f"dog {i}" for i in range(5)])


def test_nothing_is_left_of_an_interruption(tmp_path: Path) -> None:
    file, cache = write(tmp_path / "a.parquet", rows()), tmp_path / "cache"

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_image_folder(file, cache=cache, progress=interrupt)
    assert list((cache / "parquet").iterdir()) == []


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path: Path) -> None:
    old, new = (tmp_path / "parquet" / f".rows-{name}.tmp" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "x").touch()
    os.utime(old, (time.time() - 90_000,) * 2)
    read_image_folder(write(tmp_path / "a.parquet", rows()), cache=tmp_path)
    assert new.exists() and not old.exists()


def test_rows_without_a_usable_picture(tmp_path: Path) -> None:
    given = [
        *rows(1),
        {"image": None, "text": "a"},
        {"image": {"bytes": None, "path": "x.png"}, "text": "b"},
        {"image": {"bytes": b"no picture", "path": None}, "text": "c"},
        {"image": cell(4), "text": " "},
        {"image": cell(5), "text": None},
    ]
    file = write(tmp_path / "a.parquet", given)
    for _ in range(2):  # the second time from the cache
        assert said(file).splitlines() == [
            f"{file} has 4 problems:",
            "  a.parquet row 2 holds no picture; remove the row",
            "  a.parquet row 3 holds only the name of its picture (x.png); store the pictures themselves in the table, or use "
            "a folder of files",
            "  a.parquet row 4 is not a picture (its content is text); remove it or rename it",
            '  2 of 3 pictures have no caption: a.parquet row 5, a.parquet row 6; fill in the column "text", or pass --prompt '
            "for all",
            "Fix this, or pass --skip-broken to leave out what cannot be used and go on with 1 picture.",
        ]
    assert [item.caption for item in read_image_folder(file, skip_broken=True).items] == ["dog 0"]


def test_prompts_and_names_as_captions(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", rows(2))
    prompted = read_image_folder(file, "a sks dog")
    assert {item.caption for item in prompted.items} == {"a sks dog"}
    assert prompted.caption_source.endswith('; the captions in the column "text" of a.parquet are not used')
    assert [item.caption for item in read_image_folder(file, captions="filename").items] == ["a dog", "a dog"]


def test_without_a_column_of_captions(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [{"image": cell(i), "label": i, "text": i} for i in range(2)])
    assert said(file) == (
        'a.parquet has no column of captions (it has "image", "label", "text"); call it "text", or pass --prompt for all.'
    )
    assert len(read_image_folder(file, "a dog").items) == 2


def test_tables_that_cannot_be_used(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.parquet", [{"path": "a.png", "text": "b"}])
    assert said(plain).startswith('plain.parquet has no column of pictures (it has "path", "text"); store their bytes')
    two = write(tmp_path / "two.parquet", [{"x": png(0), "y": png(1), "text": "b"}])
    assert said(two) == ('two.parquet has several columns of pictures, "x", "y"; call the one to learn from "image".')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    assert said(tmp_path / "bad.parquet").startswith("bad.parquet cannot be read as parquet (")
    empty = write(tmp_path / "empty.parquet", [{"image": png(0), "text": "b"}], pa.binary())
    pq.write_table(pq.read_table(empty).slice(0, 0), empty)
    assert said(empty) == f"{empty} has no rows; pass another table."
    assert said(tmp_path / "plane.parquet") == (
        f"There is no parquet file {tmp_path}/plane.parquet; did you mean {tmp_path}/plain.parquet?"
    )
    with pytest.raises(
        DataError, match=r"a.parquet has no column 'grey' of pictures to take the masks from; its pictures are"
    ):
        read_image_folder(write(tmp_path / "a.parquet", rows()), masks="grey")
    with pytest.raises(
        DataError, match=r"plain.parquet has no column 'grey' of pictures .*; it has \"path\", \"text\""
    ):
        read_image_folder(plain, masks="grey")


def grey(size: tuple[int, int] = (8, 8), level: int = 255) -> bytes:
    """A mask whose left column is `level`, black elsewhere."""
    file, values = io.BytesIO(), np.zeros(size, np.uint8)
    values[:, 0] = level
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("column", ["mask", "second"])
def test_masks_of_a_column(column: str, tmp_path: Path) -> None:
    """The column of masks is none of the pictures' own, whatever its name; the same table without masks is another."""
    table = write(
        tmp_path / "a.parquet", [{"first": png(i), column: grey(level=100 * i + 55), "text": "b"} for i in range(3)]
    )
    for _ in range(2):
        items = read_image_folder(table, masks=column).items
        found = [mask_of(item) for item in items]
        for i, mask in enumerate(found):
            np.testing.assert_allclose(mask[:, 0], (100 * i + 55) / 255, rtol=1e-6)
            assert not mask[:, 1:].any()
            np.testing.assert_array_equal(np.asarray(decode(items[i].path)), pixels(i))
    assert len({item.content for item in items}) == 3
    assert said(table).startswith('a.parquet has several columns of pictures, "first"')


def test_masks_of_a_column_that_do_not_fit(tmp_path: Path) -> None:
    table = write(tmp_path / "a.parquet", [
        {"image": png(0), "mask": grey((4, 8)), "text": "b"},
        {"image": png(1), "mask": grey(level=0), "text": "b"},
        {"image": png(2), "mask": None, "text": "b"},
        {"image": png(3), "mask": b"no picture", "text": "b"},
    ], pa.binary())  # fmt: skip
    with pytest.raises(DataError) as caught:
        read_image_folder(table, masks="mask")
    lines = str(caught.value)
    assert "a.parquet row 1 is 8 x 8 px, but its mask in the column 'mask' 8 x 4" in lines
    assert "a.parquet row 2 has a mask that is black all over, in the column 'mask'" in lines
    assert (
        "a.parquet row 3 has nothing in the column 'mask' of masks; add one, white where to learn, or remove" in lines
    )
    assert "the mask of a.parquet row 4 " in lines


def test_alpha_masks(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.concatenate([pixels(0), pixels(1)[..., :1]], -1)).save(file, "PNG")
    item = read_image_folder(write(tmp_path / "a.parquet", [{"image": {"bytes": file.getvalue(), "path": None}, "text": "b"}]),
                             masks="alpha").items[0]  # fmt: skip
    assert item.mask == item.path


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    file = write(tmp_path / "a.parquet", rows())
    words = said(file, cache=tmp_path / "cache")
    assert words.startswith(f"The pictures of a.parquet cannot be written to {tmp_path}/cache/parquet (")
    assert words.endswith("; make room, or set VISIONLORA_CACHE to another folder.")


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = write(tmp_path / "a.parquet", rows(1)), tmp_path / "cache"
    imported = builtins.__import__

    def lacking(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return imported(name, *rest)

    with monkeypatch.context() as patch, pytest.raises(ConfigError) as caught:
        patch.setattr(builtins, "__import__", lacking)
        read_image_folder(file, cache=cache)
    assert str(caught.value) == (
        f"{file} is a parquet table, which needs pyarrow: pip install 'visionlora[tables]', or save its pictures as files."
    )
    read_image_folder(file, cache=cache)
    monkeypatch.setattr(builtins, "__import__", lacking)
    assert len(read_image_folder(file, cache=cache).items) == 1  # it is not needed any more


def test_one_row_group_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.parquet", rows(7), size=2)
    asked = []

    class Watched(pq.ParquetFile):
        def iter_batches(self, *given: Any, row_groups: list[int], **more: Any) -> Any:
            asked.append(row_groups)
            return super().iter_batches(*given, row_groups=row_groups, **more)

    monkeypatch.setattr(pq, "ParquetFile", Watched)
    assert len(read_image_folder(file).items) == 7
    assert asked == [[0], [1], [2], [3]]


def test_file_names_of_the_data_set_lead_nowhere(tmp_path: Path) -> None:
    given = [
        {"image": cell(i, name), "text": "x"}
        for i, name in enumerate(["../../up.png", "/etc/x.png", "C:\\a\\b.jpg", "e.sh"])
    ]
    folder = read_image_folder(write(tmp_path / "a.parquet", given), cache=tmp_path / "cache")
    kept = next((tmp_path / "cache" / "parquet").iterdir())
    assert sorted(item.path.name for item in folder.items) == [
        "00000001.png",
        "00000002.png",
        "00000003.jpg",
        "00000004",
    ]
    assert {item.path.parent for item in folder.items} == {kept}
    assert len(json.loads((kept / "rows.json").read_text())["rows"]) == 4


def test_a_list_of_captions_is_any_of_them(tmp_path: Path) -> None:
    captions = [["a dog", "one {brown|b}", "a  dog"], ["only one"], [], None]
    file = write(
        tmp_path / "a.parquet", [{"image": cell(i), "text": texts} for i, texts in enumerate(captions)], size=4
    )
    folder = read_image_folder(file, skip_broken=True)
    assert [item.caption for item in folder.items] == [r"{a dog|one \{brown\|b\}}", "only one"]
    seen = [
        caption_variants(item.caption, shuffle_tags=False, keep_tags=1, tag_dropout=0, count=9, seed=0)
        for item in folder.items
    ]
    assert [set(variants) for variants in seen] == [{"a dog", "one {brown|b}"}, {"only one"}]


def test_a_row_for_each_caption_of_a_picture(tmp_path: Path) -> None:
    several = [{"image": cell(i // 2), "text": f"dog {i}"} for i in range(4)]
    folder = read_image_folder(write(tmp_path / "t.parquet", several), cache=tmp_path / "c")
    check_pictures(folder, ["t.parquet row 1", "t.parquet row 3"], ["{dog 0|dog 1}", "{dog 2|dog 3}"])
    assert folder.notes == (
        "2 pictures in several rows with different captions: used once, with any of them each time",
    )
    chosen = [{"image": cell(0), "text": text} for text in ("a {red|blue} dog", "one|two", "a {red|blue} dog")]
    folder = read_image_folder(write(tmp_path / "v.parquet", chosen), cache=tmp_path / "c")
    check_pictures(folder, ["v.parquet row 1"], [r"{a {red|blue} dog|one\|two}"])
    many = [{"image": cell(i // 2), "text": "a dog"} for i in range(14)]
    notes = read_image_folder(write(tmp_path / "u.parquet", many), cache=tmp_path / "c").notes
    assert notes[0] == "the same picture, used once: u.parquet row 1, u.parquet row 2"
    assert len(notes) == 6 and notes[-1] == "and 2 pictures more that are there several times"


def test_files_of_other_splits_are_not_learned_from(tmp_path: Path) -> None:
    for k, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"]):
        write(tmp_path / "data" / f"{name}.parquet", [{"image": cell(k), "text": name}])
    folder = read_image_folder(tmp_path, cache=tmp_path.with_name("c"))
    assert [item.caption for item in folder.items] == ["train-00000-of-00002", "train-00001-of-00002"]
    left = "not used, as others are called train: data/validation-00000-of-00001.parquet"
    assert folder.notes == (left,)
