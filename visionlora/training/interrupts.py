"""Ctrl-C between two steps: what a step changes in several places must be saved whole or not at all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn

HANGUP: int | None = getattr(signal, "SIGHUP", None)
"""Of a terminal that was closed or a connection that broke; Windows has none."""
SIGNALS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, *(() if HANGUP is None else (HANGUP,)))
"""Those that ask a program to end."""


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """A handler that makes another signal end a program as Ctrl-C does, also where Ctrl-C itself is ignored.

    Raises:
        KeyboardInterrupt: always.
    """
    _once(number)
    raise KeyboardInterrupt


def _once(number: int) -> None:
    """Ignores further hang-ups: kernel and shell each send one, and what is being saved must not be cut off by them."""
    if number == HANGUP:
        signal.signal(number, signal.SIG_IGN)


def listen() -> None:
    """Makes SIGTERM and SIGHUP end this program as Ctrl-C does; for the main thread of a command line."""
    signal.signal(signal.SIGTERM, stop)
    if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(HANGUP, stop)


class Interrupts:
    """While it is entered, Ctrl-C waits for `check`; the second one no longer.

    SIGTERM and SIGHUP do the same where `stop` handles them, as in the command line. In threads other than the main one, where
    Python cannot listen to signals, nothing changes.
    """

    def __init__(
        self, told: Callable[[], None] | None = None, agree: Callable[[bool], bool] = lambda asked: asked
    ) -> None:
        """Nothing is listened to yet.

        Args:
            told: called at the first one, to say that it was heard.
            agree: from whether this process was asked to end to whether any was, where several end together.
        """
        self.told, self.agree, self.asked = told, agree, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                # Somebody's own, or none as for SIGINT in the background, stays.
                if before is (signal.default_int_handler if number == signal.SIGINT else stop):
                    self._before[number] = before
                    signal.signal(number, self._heard)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        while self._before:
            number, before = self._before.popitem()
            if signal.getsignal(number) == self._heard:
                signal.signal(number, before)

    def check(self) -> None:
        """Raises KeyboardInterrupt when there was a Ctrl-C or a signal like it."""
        if self.agree(self.asked):
            raise KeyboardInterrupt

    def _heard(self, number: int, frame: FrameType | None) -> None:
        _once(number)
        if self.asked and number == HANGUP:
            return
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self.told is not None:
            self.told()
