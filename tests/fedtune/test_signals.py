"""A command that is asked to end."""

from __future__ import annotations

import os
import signal
import time

import pytest

from fedtune.signals import Stopped, stoppable, until_stopped


def test_the_first_signal_is_heard_and_the_second_is_not() -> None:
    cleaned = []
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with stoppable():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                cleaned.append(True)

    with pytest.raises(Stopped) as stopped:
        work()
    assert (stopped.value.exit_code, cleaned) == (143, [True])
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_goes_on_is_finished_before_the_end() -> None:
    before = signal.getsignal(signal.SIGINT)
    with until_stopped() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.event.wait(10)
    assert stop.number == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_is_ignored_stays_so() -> None:
    """`nohup` ignores SIGHUP for what it starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with until_stopped() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.event.wait(10)
        assert stop.number == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)
