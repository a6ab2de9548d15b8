"""Classifier adapter + pictures -> a table of predictions."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionlora.atomic import check_new
from visionlora.classifier import Prediction, load_classifier
from visionlora.data.files import list_folder
from visionlora.data.images import IMAGE_SUFFIXES, decode, printable
from visionlora.data.tables import TABLE_SUFFIXES
from visionlora.errors import ConfigError, DataError, nearest
from visionlora.report.listener import Listener
from visionlora.report.runfolder import write_atomic

OUTPUTS = (".csv", ".json", ".parquet")
MOST_LISTED = 20


@dataclass(frozen=True)
class Predicted:
    """One picture and what was said of it."""

    path: Path
    prediction: Prediction


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
    listener: Listener | None = None,
) -> list[Predicted]:
    """Predicts every picture of files and folders, and writes the table whole or not at all.

    Args:
        adapter: a file or run folder of `visionlora classify`.
        images: files and folders (with their subfolders), or one.
        output: a .csv, .json or .parquet file; none is written without it.
        top_k: classes per picture.
        threshold: with several labels per picture, those above it apply.
        batch_size: pictures per forward pass.
        model: another place of the backbone than the adapter names.
        device: to run on; auto takes a GPU where there is one.
        force: accept a backbone of the same architecture with other weights.
        weights: another place of the backbone's state dict.
        skip_broken: leave out pictures that cannot be read, and say so, instead of stopping.
        overwrite: replace the output.
        all_scores: add the probability of every class, in CSV and parquet a column `p_CLASS` each.
        listener: hears what happens.

    Raises:
        DataError: when there are no pictures, or some cannot be read: all of them are listed.
        ConfigError: when a setting is out of range, the output exists or there is no such device.
        AdapterFileError, ModelError: see `visionlora.classifier.load_classifier`.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1.")
    tell = listener or Listener()
    target = None if output is None else Path(output).expanduser()
    if target is not None:
        check_new(target, overwrite)
        if target.suffix not in OUTPUTS:
            raise ConfigError(
                f"Predictions are written to {', '.join(OUTPUTS)} files. {nearest(target.suffix, OUTPUTS)}"
            )
        if target.suffix == ".parquet":
            parquet()
    places = [images] if isinstance(images, (str, Path)) else images
    paths = pictures_in([Path(p).expanduser() for p in places])
    classifier = load_classifier(adapter, model, device, force, weights)
    tell.say(f"{classifier.backbone.why} {len(classifier.tasks[classifier.names[0]].classes)} classes.")
    found: list[Predicted] = []
    broken: list[str] = []
    for start in range(0, len(paths), batch_size):
        readable, opened = [], []
        for path in paths[start : start + batch_size]:
            try:
                opened.append(decode(path))
                readable.append(path)
            except DataError as e:
                broken.append(str(e))
        if opened:
            said = classifier.predict(
                opened, top_k=top_k, batch_size=batch_size, threshold=threshold, all_scores=all_scores
            )
            found += [Predicted(p, s) for p, s in zip(readable, said, strict=True)]
        tell.progress("Predicting", min(start + batch_size, len(paths)), len(paths))
    if broken:
        shown = "\n".join(f"- {line}" for line in broken[:MOST_LISTED])
        more = f"\nand {len(broken) - MOST_LISTED} more" if len(broken) > MOST_LISTED else ""
        if not skip_broken or not found:
            raise DataError(
                f"{len(broken)} of {len(paths)} pictures cannot be read:\n{shown}{more}\n"
                "--skip-broken leaves them out; nothing was written."
            )
        tell.say(f"Left out, as they cannot be read:\n{shown}{more}")
    if target is not None:
        write_atomic(target, table(found, top_k, target.suffix))
    return found


def pictures_in(places: Sequence[Path]) -> list[Path]:
    """Every picture, in the order of the places and sorted within a folder.

    Raises:
        DataError: for a place that is not there, or when there are no pictures at all.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += [place / name for name in list_folder(place).pictures]
        elif place.suffix.lower() in TABLE_SUFFIXES and place.is_file():
            raise DataError(f"{printable(place)} is a table: name the pictures themselves, or folders of pictures.")
        elif place.is_file():
            found.append(place)
        else:
            siblings = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
            hint = nearest(place.name, siblings) if siblings else ""
            raise DataError(
                f"There is nothing at {printable(place)}." + (f" {hint}" if hint.startswith("Did you mean") else "")
            )
    if not found:
        where = ", ".join(printable(p) for p in places) or "the list of files, which is empty"
        raise DataError(f"There are no pictures in {where} ({', '.join(IMAGE_SUFFIXES)}).")
    return found


def record(one: Predicted) -> dict[str, Any]:
    """A picture and its classes as plain values; with several labels `top` also holds likely ones that do not apply."""
    p = one.prediction
    found = {
        "path": printable(one.path),
        "label": p.label,
        "probability": p.probability if p.labels else None,
        "top": [{"label": n, "probability": v} for n, v in p.top],
    }
    return {**found, "scores": dict(p.scores)} if p.scores else found


def row(one: Predicted, top_k: int) -> dict[str, Any]:
    """A picture as a row of a table: the first class, further ones in columns of their own, then every class's probability."""
    p = one.prediction
    found: dict[str, Any] = {
        "path": printable(one.path),
        "label": p.label,
        "probability": p.probability if p.labels else None,
    }
    for k in range(1, max(top_k, len(p.labels))):
        there = k < len(p.labels)
        found[f"label_{k + 1}"] = p.labels[k] if there else None
        found[f"probability_{k + 1}"] = p.probabilities[k] if there else None
    return {**found, **{f"p_{name}": value for name, value in p.scores}}


def table(found: Sequence[Predicted], top_k: int, suffix: str) -> bytes:
    """The whole file."""
    if suffix == ".json":
        return (json.dumps([record(one) for one in found], indent=2, ensure_ascii=False) + "\n").encode()
    rows = [row(one, top_k) for one in found]
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
