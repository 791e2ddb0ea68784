"""What our start of Flower's SuperNode changes of it: how long it waits, and that it tells what the server answers."""

from __future__ import annotations

import importlib
import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError, pull_objects
from flwr.supernode import start_client_internal

from client.supernode import FOR_REPLY, IDLE, LOOP, REPLY, SHORTEST, ShorterWaits, Watch, shorten_waits, watch
from client.told import LONGEST, Link, plain
from client.waits import Waits


class Clock:
    """Sleeping moves it."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_waits_are_a_tenth_of_the_idle_time_between_the_bounds() -> None:
    clock = Clock()
    waits = Waits(0.2, 3, clock)
    seen = {}
    for idle in (0, 1, 2, 10, 30, 1000):
        clock.now = float(idle)
        seen[idle] = waits.next()
    assert seen == pytest.approx({0: 0.2, 1: 0.2, 2: 0.2, 10: 1.0, 30: 3, 1000: 3})
    waits.busy()
    assert waits.next() == 0.2


def test_the_loop_looks_soon_after_a_message_and_then_as_seldom_as_stock() -> None:
    clock = Clock()
    waits = ShorterWaits(clock.sleep, clock)
    for _ in range(60):
        waits.sleep(IDLE)
    assert clock.slept[:3] == [SHORTEST] * 3
    assert clock.slept == sorted(clock.slept)
    assert clock.slept[-1] == IDLE

    waits.sleep(REPLY)  # a message has come
    waits.sleep(IDLE)
    assert clock.slept[-2:] == [FOR_REPLY, SHORTEST]


def test_flower_s_loop_is_the_one_that_we_know() -> None:
    """The two waits stand in its source, and it uses no other part of `time`; a new Flower may change that."""
    source = Path(start_client_internal.__file__).read_text()
    assert importlib.import_module(LOOP) is start_client_internal
    assert re.findall(r"\btime\.(\w+)", source) == ["sleep"] * 3
    assert source.count(f"time.sleep({IDLE})") == 1
    assert source.count(f"time.sleep({REPLY})") == 2


def test_the_hook_takes_the_place_of_time_in_that_module_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_client_internal, "time", time)  # put back afterwards
    monkeypatch.setattr(start_client_internal, "pull_objects", pull_objects)
    assert shorten_waits(start_client_internal)
    assert isinstance(start_client_internal.time, ShorterWaits)
    assert start_client_internal.time.monotonic is time.monotonic
    assert isinstance(time.sleep, type(len))  # the real one, everywhere else


def test_a_part_that_is_still_on_its_way_to_the_server_is_asked_for_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock, the second look is a second after the first, and the third two seconds after that."""
    monkeypatch.setattr(start_client_internal, "time", time)
    monkeypatch.setattr(start_client_internal, "pull_objects", pull_objects)
    shorten_waits(start_client_internal)
    looks = iter([False, False, True])

    def pull(part: str) -> bytes:
        if not next(looks):
            raise ObjectUnavailableError(part)
        return b"here"

    began = time.monotonic()
    assert start_client_internal.pull_objects(["part"], pull_object_fn=pull) == {"part": b"here"}
    assert time.monotonic() - began < 0.8  # 0.05 and 0.1 s, each up to a fifth longer


def test_another_flower_runs_stock_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    changed = ModuleType("changed")
    assert not shorten_waits(changed)
    assert not hasattr(changed, "time")
    assert "its own waits remain" in caplog.text


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """Watched; afterwards httpx says as little as before."""
    requests = logging.getLogger("httpx")
    before = requests.level, requests.propagate, list(requests.handlers)
    watch(tmp_path / "link.json")
    yield tmp_path / "link.json"
    requests.level, requests.propagate, requests.handlers = before


def test_every_answer_of_the_server_is_heard_from_httpx_itself(file: Path) -> None:
    statuses = iter([200, 401])
    transport = httpx.MockTransport(lambda request: httpx.Response(next(statuses)))
    with httpx.Client(transport=transport) as client:
        client.post("https://host:8000/v1/fleet/pull-messages")
        first = Link.read(file)
        client.post("https://host:8000/v1/fleet/activate-node?x=1")
        second = Link.read(file)
    assert first is not None
    assert second is not None
    assert (first.path, first.status, first.well) == ("/v1/fleet/pull-messages", 200, first.at)
    assert (second.path, second.status, second.well) == ("/v1/fleet/activate-node", 401, first.at)


def request(status: int) -> logging.LogRecord:
    """As httpx tells it."""
    args = ("POST", "http://h/p", "HTTP/1.1", status, "")
    return logging.LogRecord("httpx", logging.INFO, "", 0, 'HTTP Request: %s %s "%s %d %s"', args, None)


def line(level: int, words: str) -> logging.LogRecord:
    """Of Flower."""
    return logging.LogRecord("flwr", level, "", 0, words, (), None)


def test_the_file_is_written_at_changes_and_once_a_second(tmp_path: Path) -> None:
    clock = Clock()
    heard = Watch(tmp_path / "link.json", clock)
    written = []
    for now, status in ((10.0, 200), (10.5, 200), (11.0, 200), (11.2, 503), (11.4, 503)):
        clock.now = now
        heard.emit(request(status))
        written.append(json.loads((tmp_path / "link.json").read_text())["at"])
    assert written == [10.0, 10.0, 11.0, 11.2, 11.2]


def test_a_warning_of_flower_is_noted_with_its_time_and_an_information_is_not(tmp_path: Path) -> None:
    clock = Clock()
    heard = Watch(tmp_path / "link.json", clock)
    clock.now = 10.0
    heard.emit(line(logging.INFO, "Starting Flower SuperNode"))
    assert Link.read(tmp_path / "link.json") is None
    heard.emit(line(logging.WARNING, "Connection attempt failed, retrying in 1 seconds"))
    assert Link.read(tmp_path / "link.json") == Link(warned=10.0)
    heard.emit(request(200))
    assert Link.read(tmp_path / "link.json") == Link("/p", 200, at=10.0, well=10.0, warned=10.0)


def test_other_lines_of_httpx_and_files_that_cannot_be_written_are_no_trouble(tmp_path: Path) -> None:
    heard = Watch(tmp_path / "none" / "link.json")
    heard.emit(logging.LogRecord("httpx", logging.INFO, "", 0, "another line", ("one",), None))
    heard.emit(request(200))
    assert Link.read(tmp_path / "none" / "link.json") is None


def test_words_of_strangers_are_fit_for_a_terminal() -> None:
    assert plain("run\x1b[2J\n1") == "run?[2J?1"
    assert len(plain("x" * 10**6)) == LONGEST
    assert (plain(3), plain(None)) == (3, None)
