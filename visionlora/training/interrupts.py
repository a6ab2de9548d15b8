"""Ctrl-C between two steps: what a step changes in several places must be saved whole or not at all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """While it is entered, Ctrl-C waits for `check`; the second one no longer.

    SIGTERM does the same where it is turned into SIGINT, as the command line does. In threads other than the main one,
    where Python cannot listen to signals, nothing changes.
    """

    def __init__(self, told: Callable[[], None] | None = None) -> None:
        """Nothing is listened to yet.

        Args:
            told: called at the first Ctrl-C, to say that it was heard.
        """
        self.told, self.asked = told, False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGINT)
            if self._before is signal.default_int_handler:  # somebody's own, or none as in the background, stays
                signal.signal(signal.SIGINT, self._heard)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if signal.getsignal(signal.SIGINT) == self._heard:
            signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raises KeyboardInterrupt when there was a Ctrl-C."""
        if self.asked:
            raise KeyboardInterrupt

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self.told is not None:
            self.told()
