"""Where a run says what it does; the command line draws it, a program may ignore it."""

from __future__ import annotations

from collections.abc import Mapping


class Listener:
    """Hears everything and does nothing."""

    def say(self, line: str) -> None:
        """One line for a person."""

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        """A stage is `done` of `total`."""


def bars(values: Mapping[str, float], width: int = 32) -> str:
    """A bar chart in text, one line a value, scaled to the largest.

    >>> print(bars({"a": 4.0, "bc": 1.0}, width=8))
      a   ████████ 4.0
      bc  ██ 1.0
    """
    names, most = max(map(len, values), default=0), max(values.values(), default=0.0) or 1.0
    return "\n".join(f"  {n:<{names}}  {'█' * round(width * v / most)} {v:.1f}" for n, v in values.items())
