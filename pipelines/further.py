"""The finished adapter that a run learns on from, of either trainer: read, checked against the model, and kept.

In: the settings. Out: an `Adapter` whose modules `inject(…, start_from=…)` takes; `visionlora.lora.further` makes the
configuration that agrees with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visionlora.config import TrainingConfig, TrainSDConfig, given_names
from visionlora.data.learned import Learned
from visionlora.errors import AdapterFileError
from visionlora.formats import native
from visionlora.loaders import check_draws, check_fingerprints, check_sees, load_adapter
from visionlora.lora.adapter import Adapter
from visionlora.report.listener import Listener
from visionlora.report.resume import Start
from visionlora.report.runfolder import RunFolder

FIRST_FILE = "start.safetensors"
"""In a run folder: the adapter that the run learns on from."""
OWN_TO_IT = ("rank", "alpha", "targets", "init")
"""Settings that the adapter decides."""


def read_first(start: Start[Any]) -> Adapter | None:
    """The adapter that the run learns on from; a run that goes on reads its own copy.

    Raises:
        AdapterFileError: when it cannot be read, or is of the other trainer.
    """
    if start.config.start_from is None:
        return None
    own = start.folder / FIRST_FILE
    first = load_adapter(own if start.state is not None and own.is_file() else start.config.start_from)
    if isinstance(start.config, TrainSDConfig):
        check_draws(first, start.config.start_from)
    else:
        check_sees(first, start.config.start_from)
    return first


def keep_first(first: Adapter | None, run: RunFolder, start: Start[Any]) -> None:
    """A copy in the folder of a new run, which can then go on when the original is gone."""
    if first is not None and start.state is None:
        native.write(first, run.path / FIRST_FILE)


def named_base(config: TrainingConfig, first: Adapter | None) -> tuple[str, str | None, str | None]:
    """The model of the settings; or for `auto` the one that the adapter names, the weights that it had, and what names it."""
    base = (first.info.get("base") or {}) if first is not None else {}
    if config.model != "auto" or not base.get("id"):
        return config.model, None, None
    return str(base["id"]), base.get("weights"), config.start_from


def check_first(
    first: Adapter,
    config: TrainingConfig,
    id: str,
    there: Mapping[str, Mapping[str, str]],
    tell: Listener,
    older: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Checks that it was made for this model, and says which settings it decides.

    Args:
        first: the adapter.
        config: the settings as given.
        id: of the opened model.
        there: fingerprints of the opened model.
        tell: hears it.
        older: see `check_fingerprints`.

    Raises:
        AdapterFileError: when it is for another architecture; other weights are said.
    """
    try:
        check_fingerprints(first, id, there, older=older)
    except AdapterFileError:
        check_fingerprints(first, id, there, force=True, older=older)
        tell.say(f"{config.start_from} was made for {first.info['base'].get('id')}, of the same architecture as {id}.")
    given = given_names(config)
    ignored = [f"{n}={getattr(config, n)}" for n in OWN_TO_IT if n in given]
    tell.say(
        f"Learning on from {config.start_from}, with its layers and ranks"
        + (f" ({', '.join(ignored)} is left aside)." if ignored else ".")
    )


def learned_before(first: Adapter | None, config: TrainingConfig) -> tuple[Learned, str]:
    """The pictures that the adapter has to do with; where it does not say, none and a line about that."""
    if first is None:
        return Learned.of(()), ""
    if (found := Learned.in_header(first.info)) is not None:
        return found, ""
    return Learned.of(()), (
        f"{config.start_from} does not say which pictures it has learned from: where some of them judge this run, the figures "
        "are too good."
    )
