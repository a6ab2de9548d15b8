"""Where a run says what it does; the command line draws it, a program may ignore it."""

from __future__ import annotations


class Listener:
    """Hears everything and does nothing."""

    def say(self, line: str) -> None:
        """One line for a person."""

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        """A stage is `done` of `total`."""
