"""From files of tables to rows, and what is said about those that cannot be read."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionlora.data.files import Unusable
from visionlora.data.tables import Table, read_table, text_of, truth_of
from visionlora.errors import ConfigError, DataError

TWO = "path,label\n0.png,cat\n1.png,dog\n"
NEEDS_PYARROW = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="reads with pyarrow")


def read(folder: Path, content: str | bytes, name: str = "labels.csv") -> Table:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(folder / name, name)


def said(path: Path, error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as caught:
        read_table(path)
    return str(caught.value)


# CSV.


@pytest.mark.parametrize("text", [TWO, TWO.replace(",", ";"), TWO.replace(",", "\t"), "\ufeff" + TWO + "\n,\n"])
def test_csv(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == Table(
        "labels.csv",
        ["path", "label"],
        [(2, {"path": "0.png", "label": "cat"}), (3, {"path": "1.png", "label": "dog"})],
    )


def test_cells_may_hold_what_else_ends_them(tmp_path: Path) -> None:
    table = read(tmp_path, 'path,label\n0.png,"a, b\nc"\n1.png,dog\n')
    assert [(line, cells["label"]) for line, cells in table.rows] == [(3, "a, b\nc"), (4, "dog")]


def test_rows_of_another_length_are_problems(tmp_path: Path) -> None:
    table = read(tmp_path, "path, label ,\n0.png,a,b,c\n1.png\n2.png,cat,\n")
    assert table.columns == ["path", "label"]
    assert [line for line, _ in table.rows] == [4]
    assert table.problems == [
        "labels.csv line 2 has 4 cells for 3 columns; put cells with commas in quotes",
        "labels.csv line 3 has 1 cell for 3 columns; put cells with commas in quotes",
    ]


@pytest.mark.parametrize("name", ["labels.tsv", "LABELS.TSV", "labels.csv"])
def test_tabs(tmp_path: Path, name: str) -> None:
    table = read(tmp_path, "path\tlabel\n0.png\ta, b\n", name)
    assert table.rows == [(2, {"path": "0.png", "label": "a, b"})]


@pytest.mark.parametrize("text", ["", "path,label\n"])
def test_a_table_without_rows(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text).rows == []


# JSON lines.


def test_json_lines(tmp_path: Path) -> None:
    lines = ['{"path": "0.png", "label": "a\u2028b"}', "", "[1]", '{"path": "2.png"', "1" * 5000, '{"kind": [1, 2]}']
    table = read(tmp_path, "\n".join(lines), "labels.jsonl")
    assert table.columns == ["path", "label", "kind"]
    assert table.rows == [(1, {"path": "0.png", "label": "a\u2028b"}), (6, {"kind": [1, 2]})]
    assert table.problems == [
        f'labels.jsonl line {line} is no JSON object; write it like {{"file_name": "a.png", "label": "cat"}}'
        for line in (3, 4, 5)
    ]


@given(st.lists(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text())))
def test_every_object_of_json_lines_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    text = "".join(json.dumps(row, ensure_ascii=bool(i % 2)) + "\n" for i, row in enumerate(rows))
    folder = tmp_path_factory.mktemp("table")
    table = read(folder, text.encode("utf-8"), "a.jsonl")
    assert (table.rows, table.problems) == (list(enumerate(rows, 1)), [])


# Parquet.


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "labels.parquet"
    assert said(path, ConfigError) == (
        f"{path} is a parquet table, which needs pyarrow: pip install 'visionlora[tables]', or save it as CSV."
    )


@NEEDS_PYARROW
def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "labels.parquet"
    columns = {"path": ["0.png", "1.png"], "label": [1, None], "image": [{"bytes": b"x"}] * 2, "raw": [b"y"] * 2}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    rows: list[tuple[int, dict[str, Any]]] = [(1, {"path": "0.png", "label": 1}), (2, {"path": "1.png", "label": None})]
    assert read_table(path) == Table(str(path), ["path", "label"], rows, embedded=["image", "raw"])
    path.write_bytes(b"PAR1")
    assert said(path).startswith(f"{path} cannot be read as parquet (")


# Files that are no table.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"path,label\n\xe9.png,cat\n", "is not UTF-8 text (at byte 11); save it as UTF-8."),
        ("a.csv", "path,label\n".encode("utf-16"), "is UTF-16 text; save it as UTF-8."),
        ("a.csv", b"path,path\n", 'has two columns of the name "path"; rename one.'),
        (
            "a.csv",
            b'path,label\n"0.png,cat\n',
            "has a quote in line 2 that is not closed (unexpected end of data); close it, or save the file as plain CSV.",
        ),
        ("a.xlsx", b"PK", "is no table that can be read; tables end in .csv, .tsv, .jsonl, .parquet."),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert said(tmp_path / name) == f"{tmp_path / name} {message}"


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    assert said(path) == f"{path} cannot be read (No such file or directory); check that it is there and readable."


# Columns and cells.


def test_columns_are_found_by_name() -> None:
    table = Table("a.csv", ["Label", "File", "label", "path"], [])
    assert table.guess(("path", "file")) == "path"
    assert table.guess(("file", "path")) == "File"
    assert table.guess(("label",)) == "Label"
    assert table.guess(("class",)) is None
    assert table.given("label", "label_column") == "label"
    with pytest.raises(ConfigError) as caught:
        table.given("lable", "label_column")
    assert str(caught.value) == "label_column: a.csv has no column \"lable\". Did you mean 'label'?"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (float("nan"), ""), (" a ", " a "), (3, "3"), (3.0, "3"), (0.5, "0.5"), (True, "True")],
)
def test_cells_as_text(value: object, text: str) -> None:
    assert text_of(value, "label") == text


@pytest.mark.parametrize("value", [[1], {"a": 1}])
def test_cells_that_are_no_text(value: object) -> None:
    with pytest.raises(Unusable) as caught:
        text_of(value, "label")
    assert str(caught.value) == 'has a "label" that is neither text nor a number; write it in quotes'


@pytest.mark.parametrize(
    ("value", "answer"),
    [("1", True), (" Yes", True), ("true", True), (1.0, True), (True, True), ("0.0", False), (0, False), ("NO", False)],
)
def test_cells_as_truth(value: object, answer: bool) -> None:
    assert truth_of(value, "cat") is answer


@pytest.mark.parametrize(("value", "shown"), [("2", '"2"'), ("", "nothing"), (None, "nothing"), (0.5, '"0.5"')])
def test_cells_that_are_neither(value: object, shown: str) -> None:
    with pytest.raises(Unusable) as caught:
        truth_of(value, "cat")
    assert str(caught.value) == f'has {shown} in "cat"; write 1 or 0 (or true, false, yes, no)'
