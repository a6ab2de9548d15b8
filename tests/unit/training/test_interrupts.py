"""Ctrl-C waits for the end of a step."""

import signal
import threading

import pytest

from visionlora.training.interrupts import Interrupts, listen, stop


def test_it_waits_until_it_is_asked() -> None:
    before, heard = signal.getsignal(signal.SIGINT), []
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Interrupts(lambda: heard.append("once")) as interrupts:
            interrupts.check()
            signal.raise_signal(signal.SIGINT)
            heard.append("the step ends")
            interrupts.check()
        assert heard == ["once", "the step ends"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "handler"), [(signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, stop)])
def test_the_second_does_not_wait(number: signal.Signals, handler) -> None:
    """SIGINT is ignored meanwhile where a script starts a program in the background; SIGTERM must not need it."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(number, handler)
    try:
        with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
            signal.raise_signal(number)
            assert interrupts.asked
            signal.raise_signal(number)
            pytest.fail("it went on")
        assert signal.getsignal(number) is handler
    finally:
        for n, was in before.items():
            signal.signal(n, was)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_somebody_elses_handler_stays(handler) -> None:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, handler)
    try:
        with Interrupts():
            assert signal.getsignal(signal.SIGINT) == handler
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_it_does_nothing() -> None:
    found = []

    def work() -> None:
        with Interrupts() as interrupts:
            interrupts.check()
            found.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["done"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_hang_ups_wait_and_come_in_twos() -> None:
    """A closed terminal ended a run unsaved; kernel and shell each send one, and the second must not cut off the saving."""
    before = {n: signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGTERM)}
    heard = []
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        listen()
        with pytest.raises(KeyboardInterrupt), Interrupts(lambda: heard.append("once")) as interrupts:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
            heard.append("the step ends")
            interrupts.check()
        signal.raise_signal(signal.SIGHUP)
        assert heard == ["once", "the step ends"]
    finally:
        for n, was in before.items():
            signal.signal(n, was)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_hang_ups_that_nohup_ignores_stay_ignored() -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        listen()
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupts.asked and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for n, was in before.items():
            signal.signal(n, was)


def test_another_process_may_have_been_asked() -> None:
    """All of a launch end together, also the one that has heard nothing."""
    heard: list[bool] = []

    def agree(asked: bool) -> bool:
        heard.append(asked)
        return len(heard) == 2

    with pytest.raises(KeyboardInterrupt), Interrupts(agree=agree) as interrupts:
        interrupts.check()
        interrupts.check()
        pytest.fail("it went on")
    assert heard == [False, False]
