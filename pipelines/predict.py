"""Classifier adapter + pictures -> a table of predictions."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from visionlora.atomic import check_new
from visionlora.classifier import Classifier, Prediction, check_asked, load_classifier
from visionlora.config.reading import is_utf8
from visionlora.data.class_tables import pictures_of
from visionlora.data.files import list_folder, suffix_of
from visionlora.data.images import decode_noted, printable
from visionlora.data.parquet import PARQUET
from visionlora.data.tables import TABLE_SUFFIXES
from visionlora.data.wording import (
    MAX_LINES,
    beside_pictures,
    count_of,
    first_names,
    no_pictures,
    not_entered,
)
from visionlora.errors import ConfigError, DataError, nearest
from visionlora.models.devices import process_of
from visionlora.report.listener import Listener
from visionlora.report.runfolder import check_place, write_atomic
from visionlora.training.loop import process_state

OUTPUTS = (".csv", ".json", ".parquet")


@dataclass(frozen=True)
class Predicted:
    """One picture and what was said of it."""

    path: Path
    """Its file; of a picture within a table one in the cache."""
    prediction: Prediction
    name: str = ""
    """What it is called, where that is not its path: `new.parquet row 3`."""

    @property
    def shown(self) -> str:
        """What is printed of it."""
        return self.name or printable(self.path)

    @property
    def written(self) -> str:
        """What a file calls it: its path as it is, by which it is found again; as `shown` where that is no UTF-8."""
        path = self.path.as_posix()
        return path if self.shown == printable(path) and is_utf8(path) else self.shown


@dataclass
class Batch:
    """What was said of pictures that went through the model together."""

    start: int
    """Position of the first."""
    found: list[Predicted] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Of those that cannot be read."""


@dataclass
class Given:
    """The pictures of all places, in order, and what is in the way of others."""

    pictures: list[tuple[str, Path]] = field(default_factory=list)
    """What the output calls each, and its file."""
    problems: list[str] = field(default_factory=list)
    """Of pictures that cannot be read, and rows that give none, one line each."""
    notes: list[str] = field(default_factory=list)
    """On what is not read, one line each."""

    def told(self) -> str:
        """The first problems, one a line."""
        shown = "\n".join(f"- {line}" for line in self.problems[:MAX_LINES])
        more = f"\nand {len(self.problems) - MAX_LINES} more" if len(self.problems) > MAX_LINES else ""
        return shown + more


def predict(
    adapter: str | Path,
    images: Sequence[str | Path] | str | Path,
    output: str | Path | None = None,
    *,
    top_k: int = 1,
    threshold: float = 0.5,
    batch_size: int = 32,
    model: str | None = None,
    device: str = "auto",
    force: bool = False,
    weights: str | None = None,
    skip_broken: bool = False,
    overwrite: bool = False,
    all_scores: bool = False,
    path_column: str | None = None,
    listener: Listener | None = None,
) -> list[Predicted]:
    """Predicts every picture of files, folders and tables, and writes the table whole or not at all.

    Under `accelerate launch` the processes share the pictures, each returns all predictions, and the first writes them.

    Args:
        adapter: a file or run folder of `visionlora classify`.
        images: files, folders (with their subfolders) and tables (a row for each picture), or one.
        output: a .csv, .json or .parquet file; none is written without it. Paths are in it as they are; those that are no
            UTF-8 are escaped, and told.
        top_k: classes per picture; with several labels so many are in `top`, and a table has those that apply.
        threshold: with several labels per picture, those above it apply.
        batch_size: pictures per forward pass.
        model: another place of the backbone than the adapter names.
        device: to run on; auto takes a GPU where there is one: cuda, xpu of Intel, or mps on a Mac.
        force: accept a backbone of the same architecture with other weights.
        weights: another place of the backbone's state dict.
        skip_broken: leave out pictures that cannot be read, and say so, instead of stopping.
        overwrite: replace the output.
        all_scores: add the probability of every class, in CSV and parquet a column `p_CLASS` each.
        path_column: of the pictures' paths in tables; found by its name when not given.
        listener: hears what happens.

    Raises:
        DataError: when there are no pictures, or some cannot be read: all of them are listed.
        ConfigError: when a setting is out of range, the output exists or there is no such device.
        RunFolderError: when nothing can be written at the output.
        AdapterFileError, ModelError: see `visionlora.classifier.load_classifier`.
    """
    check_asked(top_k, batch_size, threshold)
    rank, processes = shares()
    tell = listener or Listener()
    target = None if output is None else writable(Path(output).expanduser(), overwrite)
    places = [images] if isinstance(images, (str, Path)) else images
    given = pictures_in(
        [Path(p).expanduser() for p in places], path_column,
        lambda done, total: tell.progress("Unpacking pictures", done, total),
    )  # fmt: skip
    for note in given.notes:
        tell.say(note)
    total = len(given.pictures) + len(given.problems)
    classifier = load_classifier(adapter, model, device, force, weights)
    (task,) = classifier.tasks.values()
    tell.say(f"{classifier.backbone.why} {count_of(len(task.classes), 'class', 'classes')}.")
    if threshold != 0.5 and not task.multi_label:
        tell.say(f"threshold {threshold:g} has no effect: this adapter gives each picture its likeliest class.")
    if top_k != 1 and task.multi_label and target is not None and target.suffix != ".json":
        tell.say(f"top_k {top_k} has no effect on a {target.suffix} file: it holds the labels above the threshold.")
    batches = in_batches(
        classifier, given.pictures, batch_size, (rank, processes), tell,
        top_k=top_k, threshold=threshold, all_scores=all_scores,
    )  # fmt: skip
    found = [one for batch in batches for one in batch.found]
    given.problems += [line for batch in batches for line in batch.problems]
    if given.problems:
        if not skip_broken or not found:
            raise DataError(
                f"{len(given.problems)} of {total} pictures cannot be read:\n{given.told()}\n"
                "--skip-broken leaves them out; nothing was written."
            )
        tell.say(f"Left out, as they cannot be read:\n{given.told()}")
    if escaped := [one.shown for one in found if not is_utf8(one.path.as_posix())]:
        tell.say(
            f"{count_of(len(escaped), 'name is', 'names are')} no UTF-8 and told escaped, by which no file is found: "
            f"{first_names(escaped)}."
        )
    if target is not None and not rank:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, table(found, target.suffix))
    return found


def in_batches(
    classifier: Classifier, pictures: Sequence[tuple[str, Path]], batch_size: int, share: tuple[int, int], tell: Listener,
    **asked: Any,
) -> list[Batch]:  # fmt: skip
    """What is said of all pictures, in order; processes take turns with the batches.

    Args:
        classifier: that says it.
        pictures: names and files.
        batch_size: pictures per forward pass.
        share: see `shares`.
        tell: hears how far it is.
        asked: of `Classifier.predict`.
    """
    rank, processes = share
    batches: list[Batch] = []
    for start in range(0, len(pictures), batch_size)[rank::processes]:
        batch = Batch(start)
        opened = list(readable(pictures[start : start + batch_size], batch.problems))
        if opened:
            said = classifier.predict([picture for _, _, picture in opened], batch_size=batch_size, **asked)
            batch.found += [Predicted(path, s, name) for (name, path, _), s in zip(opened, said, strict=True)]
        batches.append(batch)
        tell.progress("Predicting", min(start + batch_size * processes, len(pictures)), len(pictures))
    if processes > 1:
        from accelerate.utils import gather_object

        batches = sorted(gather_object(batches), key=lambda batch: batch.start)
    return batches


def shares() -> tuple[int, int]:
    """Which of how many processes this is, that together see to all pictures."""
    if process_of()[1] == 1:
        return 0, 1
    state = process_state()
    return state.process_index, state.num_processes


def writable(target: Path, overwrite: bool) -> Path:
    """The output, if it can be written.

    Raises:
        ConfigError: when it exists, or is of a kind that is not written.
        RunFolderError: when nothing can be written there.
    """
    check_new(target, overwrite)
    if target.is_dir():
        raise ConfigError(f"{target} is a folder: name a file in it, such as {target / 'predictions.csv'}.")
    check_place(target.parent)
    if target.suffix not in OUTPUTS:
        raise ConfigError(f"Predictions are written to {', '.join(OUTPUTS)} files. {nearest(target.suffix, OUTPUTS)}")
    if target.suffix == ".parquet":
        parquet()
    return target


def pictures_in(
    places: Sequence[Path], path_column: str | None = None, progress: Callable[[int, int], None] | None = None
) -> Given:
    """Every picture, in the order of the places, sorted within a folder and by rows within a table.

    Args:
        places: files, folders and tables.
        path_column: of the pictures' paths in tables; found by its name when not given.
        progress: called with (rows unpacked, rows of the file) for parquet files that hold pictures.

    Raises:
        DataError: for a place that is not there, a table that cannot be read, or when there are no pictures at all.
    """
    given, empty = Given(), []
    for place in places:
        if place.is_dir():
            listing = list_folder(place)
            shards = [name for name in listing.others if suffix_of(name) == PARQUET]
            if shards and not listing.pictures:
                for name in shards:
                    add_table(given, place / name, path_column, progress)
            else:
                given.notes += beside_pictures([str(place / name) for name in shards])
            given.pictures += [(printable(place / name), place / name) for name in listing.pictures]
            given.problems += [f"{printable(place)}: {line}" for line in listing.problems]
            given.notes += [f"{printable(place)}: {line}" for line in not_entered(listing)]
            if not listing.pictures and not shards:
                empty.append(no_pictures(place, listing, "holds no pictures."))
        elif place.suffix.lower() in TABLE_SUFFIXES and place.is_file():
            add_table(given, place, path_column, progress)
        elif place.is_file():
            given.pictures.append((printable(place), place))
        else:
            siblings = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
            hint = nearest(place.name, siblings) if siblings else ""
            raise DataError(
                f"There is nothing at {printable(place)}." + (f" {hint}" if hint.startswith("Did you mean") else "")
            )
    if not given.pictures and not given.problems:
        raise DataError("\n".join(empty) or "There are no pictures: the list of files is empty.")
    return given


def add_table(given: Given, place: Path, path_column: str | None, progress: Callable[[int, int], None] | None) -> None:
    """Adds the pictures of a table."""
    pictures, problems = pictures_of(place, path_column, progress)
    given.pictures += pictures
    given.problems += problems


def readable(pictures: Sequence[tuple[str, Path]], problems: list[str]) -> Iterator[tuple[str, Path, Image.Image]]:
    """Those that can be decoded, opened; what is wrong with the others is added to the problems."""
    for name, path in pictures:
        try:
            yield name, path, decode_noted(path, name).image
        except DataError as e:
            problems.append(str(e))


def record(one: Predicted) -> dict[str, Any]:
    """A picture and its classes as plain values; with several labels `labels` apply, and `top` also holds likely others."""
    p = one.prediction
    found = {
        "path": one.written,
        "label": p.label,
        "probability": p.probability if p.labels else None,
        "labels": list(p.labels),
        "top": [{"label": n, "probability": v} for n, v in p.top],
    }
    return {**found, "scores": dict(p.scores)} if p.scores else found


def json_of(found: Sequence[Predicted], indent: int | None = None) -> str:
    """All records; what cannot be printed is escaped, as JSON can do it."""
    text = json.dumps([record(one) for one in found], indent=indent, ensure_ascii=False)
    return re.sub(r"[^\n -~]", lambda c: c[0] if c[0].isprintable() else json.dumps(c[0])[1:-1], text)


def row(one: Predicted) -> dict[str, Any]:
    """A picture as a row of a table: its first label, further ones in columns of their own, then every class's probability."""
    p = one.prediction
    found: dict[str, Any] = {
        "path": one.written,
        "label": p.label,
        "probability": p.probability if p.labels else None,
    }
    for k in range(1, len(p.labels)):
        found |= {f"label_{k + 1}": p.labels[k], f"probability_{k + 1}": p.probabilities[k]}
    return {**found, **{f"p_{name}": value for name, value in p.scores}}


def table(found: Sequence[Predicted], suffix: str) -> bytes:
    """The whole file."""
    if suffix == ".json":
        return (json_of(found, indent=2) + "\n").encode()
    rows = [row(one) for one in found]
    columns = list(dict.fromkeys(name for r in rows for name in r))
    columns.sort(key=lambda name: name.startswith("p_"))  # a later picture may have more labels
    if suffix == ".parquet":
        pyarrow = parquet()
        content = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({c: [r.get(c) for r in rows] for c in columns}), content)
        return content.getvalue()
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet() -> Any:
    """pyarrow.

    Raises:
        ConfigError: when it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            "Parquet files need pyarrow: pip install 'visionlora[tables]'. Or write .csv or .json."
        ) from None
    return pyarrow
