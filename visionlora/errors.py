"""The exceptions a user can meet.

    VisionLoRAError
    ├── ConfigError (ValueError)         an option that is unknown, missing or out of range
    ├── DataError (ValueError)           pictures or captions that cannot be used
    ├── ModelError (ValueError)          a base model that cannot be opened or does not fit
    ├── TargetError (ValueError)         targets that match nothing, or what must not be adapted
    ├── AdapterFileError (ValueError)    an adapter file that is broken or belongs to another base
    ├── RunFolderError (ValueError)      an output folder that cannot be used
    │   ├── RunFinished                  a run that has nothing left to do
    │   └── WriteError                   a file of a run that cannot be written, for instance on a full disk
    └── TrainingError (RuntimeError)     training that cannot go on
        └── ProcessLost                  another process of the launch is gone

Every message says what was given, what is allowed, the nearest valid choice and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VisionLoRAError(Exception):
    """Base of all errors that are meant for the user; the command line prints them without a traceback."""

    exit_code = 2
    """Of the command line: 2 for wrong use, 1 for a failure on the way."""


class ConfigError(VisionLoRAError, ValueError):
    """An option that is unknown, missing or out of range."""


class DataError(VisionLoRAError, ValueError):
    """Pictures or captions that cannot be used."""


class ModelError(VisionLoRAError, ValueError):
    """A base model that cannot be opened or does not fit."""


class TargetError(VisionLoRAError, ValueError):
    """Targets that match nothing, or something that must not be adapted."""


class AdapterFileError(VisionLoRAError, ValueError):
    """An adapter file that is broken, incomplete or made for another base model."""


class RunFolderError(VisionLoRAError, ValueError):
    """An output folder that cannot be used."""


class RunFinished(RunFolderError):
    """A run that was to be resumed has nothing left to do."""


class WriteError(RunFolderError):
    """A file of a run that cannot be written, for instance on a full disk; what was written before is whole."""

    exit_code = 1


class TrainingError(VisionLoRAError, RuntimeError):
    """Training that cannot go on."""

    exit_code = 1


class ProcessLost(TrainingError):
    """Another process of the launch has ended, and this one cannot go on without it."""


def nearest(given: str, allowed: Iterable[str], most: int | None = None) -> str:
    """A sentence naming the closest allowed word, or when none is close all of them, or the first `most`.

    >>> nearest("atn.q", ["attn.q", "attn.k"])
    "Did you mean 'attn.q'?"
    >>> nearest("FP32", ["bf16", "fp32"])
    "Did you mean 'fp32'?"
    >>> nearest("zzz", ["b", "a"])
    'Allowed: a, b.'
    >>> nearest("zzz", ["c", "b", "a"], most=2)
    'Allowed: a, b and 1 more.'
    """
    choices = sorted(allowed)
    folded = {choice.casefold(): choice for choice in choices}
    if close := difflib.get_close_matches(given, choices, n=1):
        return f"Did you mean {close[0]!r}?"
    if close := difflib.get_close_matches(given.casefold(), folded, n=1):
        return f"Did you mean {folded[close[0]]!r}?"
    more = f" and {len(choices) - most} more" if most is not None and len(choices) > most else ""
    return f"Allowed: {', '.join(choices[:most])}{more}."


def first_line(error: BaseException) -> str:
    r"""The beginning of what another library says of an error; its kind where it says nothing.

    >>> first_line(ValueError("no size 3\nsee the manual")), first_line(KeyError())
    ('no size 3', 'KeyError')
    """
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
