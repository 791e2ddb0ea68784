"""Registry and SuperLink in step, and waiting for the clients of a job."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from rich.console import Console

from fedtune.errors import FedtuneError, RoundFailed, UserError
from fedtune.job import Job, checked_job
from fedtune.security.handover import make_client_keys
from fedtune.security.registry import ClientRecord, Registry
from server.enrolment import Anybody, Enrolment, Standing
from server.flower_control import Node
from server.waiting import RETURN, Wanted, state_of, wait_for, wanted_again, wanted_of


class Nodes:
    """As much of a Control as nodes need; like Flower's, it never forgets a key."""

    def __init__(self) -> None:
        self.known: dict[bytes, Node] = {}
        self.asked: list[str] = []

    def nodes(self) -> list[Node]:
        return list(self.known.values())

    def register(self, key: bytes, name: str) -> None:
        if key in self.known:
            raise FedtuneError("Public key already in use")
        self.known[key] = Node(len(self.known) + 1, key, "registered")
        self.asked.append(f"register {name}")

    def unregister(self, node: int) -> None:
        self.put(node, "unregistered")
        self.asked.append(f"unregister {node}")

    def put(self, node: int, status: str) -> None:
        self.known = {key: Node(n.id, key, status) if n.id == node else n for key, n in self.known.items()}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClientRecord]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: make_client_keys(folder / name, name) for name in ("north", "south", "south2")}


@pytest.fixture
def registry(tmp_path: Path, records: dict[str, ClientRecord]) -> Registry:
    registry = Registry(tmp_path / "clients")
    registry.add(records["north"])
    registry.add(records["south"])
    return registry


def test_registered_clients_are_let_in_once(registry: Registry, records: dict[str, ClientRecord]) -> None:
    nodes = Nodes()
    enrolment = Enrolment(nodes, registry)
    assert enrolment.step() == {"north": "missing", "south": "missing"}
    assert nodes.asked == ["register north", "register south"]
    nodes.put(1, "online")
    assert nodes.known[records["north"].node_pem()].online
    assert enrolment.step() == Enrolment(nodes, registry).step() == {"north": "connected", "south": "missing"}
    assert len(nodes.asked) == 2


def test_a_revoked_client_is_shut_out_and_a_new_key_is_let_in(registry: Registry, records: dict[str, ClientRecord]) -> None:
    nodes = Nodes()
    enrolment = Enrolment(nodes, registry)
    enrolment.step()
    nodes.put(2, "online")
    registry.revoke("south")
    assert enrolment.step() == {"north": "missing", "south": "revoked"}
    assert nodes.asked[2:] == ["unregister 2"]
    registry.add(ClientRecord("south", records["south2"].node, records["south2"].verify), replace=True)
    assert enrolment.step() == {"north": "missing", "south": "missing"}
    assert nodes.asked[3:] == ["register south"]


def test_a_node_that_the_registry_does_not_know_is_shut_out(registry: Registry, records: dict[str, ClientRecord]) -> None:
    nodes = Nodes()
    nodes.register(records["south2"].node_pem(), "stranger")
    assert list(Enrolment(nodes, registry).step()) == ["north", "south"]
    assert nodes.known[records["south2"].node_pem()].status == "unregistered"


def test_where_others_have_nodes_too_only_the_revoked_is_shut_out(registry: Registry, records: dict[str, ClientRecord]) -> None:
    nodes = Nodes()
    nodes.register(records["south2"].node_pem(), "theirs")
    enrolment = Enrolment(nodes, registry, alone=False)
    enrolment.step()
    registry.revoke("south")
    assert enrolment.step() == {"north": "missing", "south": "revoked"}
    assert nodes.asked == ["register theirs", "register north", "register south", "unregister 3"]


def test_a_key_that_flower_will_not_take_again_is_said_and_stops_nobody_else(
    registry: Registry, records: dict[str, ClientRecord]
) -> None:
    nodes = Nodes()
    nodes.register(records["north"].node_pem(), "north")
    nodes.unregister(1)
    enrolment = Enrolment(nodes, registry)
    assert enrolment.step()["south"] == "missing"
    assert "fedtune keys rotate client north" in enrolment.problems["north"]
    assert nodes.asked[-1] == "register south"


def test_without_keys_nodes_have_numbers() -> None:
    nodes = Nodes()
    nodes.known = {b"a": Node(7, b"a", "online"), b"b": Node(8, b"b", "offline")}
    assert Anybody(nodes).step() == {"node-7": "connected"}


def job(**clients: object) -> Job:
    return checked_job({"clients": clients}, "this test")


def test_whom_a_job_wants() -> None:
    registered = {"north": False, "south": False, "west": True}
    assert wanted_of(job(), registered) == Wanted()
    assert wanted_of(job(count=2), registered) == Wanted(count=2)
    assert wanted_of(job(names=["south"]), registered) == Wanted(("south",))
    assert wanted_of(job(count=3), None) == Wanted(count=3)
    with pytest.raises(UserError, match=r"wants 3 clients and 2 are registered; type `fedtune keys client NAME`"):
        wanted_of(job(count=3), registered)
    with pytest.raises(UserError, match="wants 1 clients and 0 are registered"):
        wanted_of(job(), {"west": True})
    with pytest.raises(UserError, match="'west', which is revoked"):
        wanted_of(job(names=["west"]), registered)
    with pytest.raises(UserError, match="'nort', which is not registered, did you mean 'north'"):
        wanted_of(job(names=["nort"]), registered)
    with pytest.raises(UserError, match=r"type --set clients.count=N"):
        wanted_of(job(), None)


def test_a_run_that_goes_on_wants_who_began_it_and_was_not_revoked() -> None:
    """Even where the job names one that was. A quorum of four fifths: of three clients all, of two of each round two."""
    began, registered = ["north", "south", "west"], {"north": False, "south": False, "west": True, "east": False}
    two = checked_job({"clients": {"names": began}, "rounds": {"quorum": 0.8, "clients": 2}}, "this test")
    all_three = checked_job({"clients": {"names": began}, "rounds": {"quorum": 0.8}}, "this test")
    assert wanted_again(two, registered, began) == Wanted(("north", "south"), least=2)
    assert wanted_again(two, None, began) == Wanted(count=3, least=2)
    with pytest.raises(UserError, match=r"needs 3 of its 3 clients .* 2 are registered and not revoked; `fedtune keys rotate"):
        wanted_again(all_three, registered, began)


CLIENTS: dict[str, Standing] = {"a": "connected", "b": "missing", "c": "revoked", "d": "connected"}


@pytest.mark.parametrize(
    ("wanted", "enough", "missing"),
    [
        (Wanted(), False, ["b"]),  # all three that are not revoked
        (Wanted(count=2), True, ["b"]),
        (Wanted(count=3), False, ["b"]),
        (Wanted(("a", "d")), True, []),
        (Wanted(("a", "b")), False, ["b"]),
    ],
)
def test_when_it_is_enough(wanted: Wanted, enough: bool, missing: list[str]) -> None:
    assert (wanted.enough(CLIENTS), wanted.missing(CLIENTS)) == (enough, missing)


def test_nobody_is_not_enough() -> None:
    assert not Wanted().enough({})
    assert not Wanted().enough({"c": "revoked"})


class Clock:
    """Half a second passes at every sleep."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_the_wait_ends_when_the_last_has_come_and_says_only_what_is_new(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Clock(monkeypatch)
    here: Iterator[Mapping[str, Standing] | None] = iter(
        [None, {"a": "missing", "b": "missing"}, {"a": "connected", "b": "missing"}, {"a": "connected", "b": "missing"}]
    )
    last: Mapping[str, Standing] = {"a": "connected", "b": "connected"}
    assert wait_for(Wanted(), lambda: next(here, last), Console(), None) == last
    assert capsys.readouterr().out.splitlines() == [
        "waiting: 0 of ? clients connected",
        "waiting: 0 of 2 clients connected; missing: a, b",
        "waiting: 1 of 2 clients connected; here: a; missing: b",
    ]


def test_after_a_while_a_quorum_of_those_who_were_there_before_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are waited for first; two of three, or three where they are wanted, at most for as long as --wait says."""
    clock, all_three = Clock(monkeypatch), ("a", "b", "d")
    assert wait_for(Wanted(all_three, least=2), lambda: CLIENTS, Console(), None) == CLIENTS
    assert RETURN <= clock.now <= RETURN + 0.5
    clock.now = 0.0
    assert wait_for(Wanted(all_three, least=2), lambda: CLIENTS, Console(), 5.0) == CLIENTS
    assert clock.now == 5.0
    with pytest.raises(RoundFailed, match="2 of 3 clients connected"):
        wait_for(Wanted(all_three, least=3), lambda: CLIENTS, Console(), 2 * RETURN)


def test_patience_ends_with_the_names_of_those_who_did_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(RoundFailed, match=r"waited 5.0 s \(--wait\): 2 of 3 clients connected; here: a, d; missing: b"):
        wait_for(Wanted(), lambda: CLIENTS, Console(), 5.0)
    assert clock.now == 5.5  # the first look after five seconds


def test_of_many_that_would_do_it_says_how_many() -> None:
    """One of the two that are not there is enough; with three wanted of three there is no choice."""
    two: dict[str, Standing] = {"north": "missing", "south": "missing", "west": "connected"}
    assert state_of(Wanted(count=2), two) == "1 of 2 clients connected; here: west; any 1 of: north, south"
    assert state_of(Wanted(count=3), two) == "1 of 3 clients connected; here: west; missing: north, south"


def test_a_line_names_a_few() -> None:
    many: dict[str, Standing] = {f"c{number}": "missing" for number in range(11)}
    assert state_of(Wanted(), many).endswith("c6, c7, and 3 more")
