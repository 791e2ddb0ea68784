"""A SuperLink that fails for a while, and a clock that does not wait."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from server import patience
from server.patience import PATIENCE, PAUSE, patiently


class Clock:
    """Time passes only while somebody sleeps."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(patience, "time", clock)
    return clock


def answers(status: int) -> Exception:
    request = httpx.Request("POST", "http://superlink")
    return httpx.HTTPStatusError(f"{status}", request=request, response=httpx.Response(status, request=request))


def failing(errors: list[Exception]) -> Callable[[], str]:
    def call() -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    return call


@pytest.mark.parametrize("error", [answers(500), ObjectPushError("part", 1, "session")])
def test_what_fails_for_a_while_is_done_in_the_end(clock: Clock, error: Exception) -> None:
    assert patiently(failing([error, error])) == "done"
    assert clock.now == 2 * PAUSE


@pytest.mark.parametrize("error", [answers(400), answers(403), KeyError("ours")])
def test_what_is_refused_or_is_a_mistake_of_ours_is_not_waited_for(clock: Clock, error: Exception) -> None:
    with pytest.raises(type(error)):
        patiently(failing([error]))
    assert clock.now == 0.0


def test_patience_ends(clock: Clock) -> None:
    with pytest.raises(httpx.HTTPStatusError):
        patiently(failing([answers(500)] * 1000))
    assert PATIENCE <= clock.now <= PATIENCE + PAUSE
