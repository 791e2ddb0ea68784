"""A node's looks for an ask, against a server that is played: what it answers, and what of it arrives."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from flwr.proto import fleet_pb2 as flower
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode import fleet_http_connection
from flwr.supernode.fleet_http_client import FleetHttpClient

from client import fleet
from client.fleet import AWAY, Fleet, lose_no_ask, same_keys

KEY, NODE = b"its public key", Node(node_id=7)
LOOK = flower.PullMessagesRequest(node=NODE)
LOOKS, OFF, ON, BEATS = "pull-messages", "deactivate-node", "activate-node", "send-node-heartbeat"
REGISTER = "register-node"


class Server:
    """Every request is noted; what is in `next` takes the place of its answer: an error of the network, or a status."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.next: list[Exception | int | bytes] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.url.path.rpartition("/")[2])
        answer = self.next.pop(0) if self.next else 200
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(200, content=answer) if isinstance(answer, bytes) else httpx.Response(answer)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """A second of being away takes none."""
    server = Server()
    monkeypatch.setattr(fleet.time, "sleep", lambda seconds: server.asked.append(f"{seconds:g} s"))
    return server


@pytest.fixture
def node(server: Server) -> Iterator[Fleet]:
    """One that is connected."""
    with Fleet("http://server") as node:
        node._client = httpx.Client(transport=httpx.MockTransport(server))
        node.ActivateNode(flower.ActivateNodeRequest(public_key=KEY, heartbeat_interval=30))
        server.asked.clear()
        yield node


def looks(node: Fleet, times: int) -> None:
    """As the loop of Flower does, which repeats what failed."""
    for _ in range(times):
        try:
            node.PullMessages(LOOK)
        except httpx.TransportError:
            continue


COME_BACK = [OFF, f"{AWAY:g} s", ON]


def test_while_all_goes_well_nothing_is_added(server: Server, node: Fleet) -> None:
    looks(node, 3)
    assert server.asked == [LOOKS] * 3


@pytest.mark.parametrize(
    "error", [httpx.ReadTimeout("30 s"), httpx.ReadError("reset"), httpx.RemoteProtocolError("half an answer")]
)
def test_after_an_answer_that_was_lost_the_node_goes_away_and_comes_back_once(
    server: Server, node: Fleet, error: Exception
) -> None:
    server.next = [error]
    looks(node, 3)
    assert server.asked == [LOOKS, *COME_BACK, LOOKS, LOOKS]


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ConnectTimeout("30 s"), httpx.PoolTimeout("busy")])
def test_what_never_left_the_node_has_lost_nothing(server: Server, node: Fleet, error: Exception) -> None:
    server.next = [error]
    looks(node, 2)
    assert server.asked == [LOOKS, LOOKS]


def test_it_comes_back_when_the_network_is_there_again(server: Server, node: Fleet) -> None:
    """Whatever of going and coming fails is done at the next look."""
    lost, down = httpx.ReadTimeout("30 s"), httpx.ConnectTimeout("30 s")
    server.next = [lost, down, 200, down]
    looks(node, 4)
    assert server.asked == [LOOKS, OFF, *COME_BACK, *COME_BACK, LOOKS]


def test_a_node_that_the_server_had_given_up_needs_not_go_away(server: Server, node: Fleet) -> None:
    server.next = [httpx.ReadTimeout("30 s"), 412]
    looks(node, 2)
    assert server.asked == [LOOKS, OFF, ON, LOOKS]


def test_a_node_that_was_revoked_meanwhile_hears_it(server: Server, node: Fleet) -> None:
    server.next = [httpx.ReadTimeout("30 s"), 401]
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        looks(node, 2)


def test_it_comes_back_under_its_key_and_is_away_under_its_number(node: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []
    for name in ("DeactivateNode", "ActivateNode"):
        monkeypatch.setattr(FleetHttpClient, name, lambda self, request: sent.append(request))
    node._lost = True
    looks(node, 1)
    assert [sent[0].node_id, sent[1].public_key, sent[1].heartbeat_interval] == [7, KEY, 30]


def test_no_heartbeat_brings_it_back_while_it_is_away(server: Server, node: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    from threading import Thread

    beats: list[Thread] = []

    def beat(seconds: float) -> None:
        beats.append(Thread(target=node.SendNodeHeartbeat, args=[SendNodeHeartbeatRequest(node=NODE)]))
        beats[0].start()
        beats[0].join(0.05)  # it waits, or would be through by now

    monkeypatch.setattr(fleet.time, "sleep", beat)
    node._lost = True
    looks(node, 1)
    beats[0].join()
    assert server.asked.index(ON) < server.asked.index(BEATS)


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Fleet, "mark", tmp_path / "node.mark")
    return tmp_path / "node.mark"


ACTIVATION = flower.ActivateNodeRequest(public_key=KEY, heartbeat_interval=30)
AS_SEVEN = flower.ActivateNodeResponse(node_id=7).SerializeToString()


def test_while_it_is_connected_its_number_is_marked_and_not_after_it_went_in_order(
    server: Server, node: Fleet, mark: Path
) -> None:
    server.next = [AS_SEVEN]
    node.ActivateNode(ACTIVATION)
    assert mark.read_text() == "7"
    node.DeactivateNode(flower.DeactivateNodeRequest(node_id=7))
    assert not mark.exists()
    node.ActivateNode(ACTIVATION)
    assert server.asked == [ON, OFF, ON]


def test_after_one_that_was_killed_a_node_signs_off_first(server: Server, node: Fleet, mark: Path) -> None:
    mark.write_text("7")
    server.next = [200, AS_SEVEN]
    node.ActivateNode(ACTIVATION)
    assert server.asked == COME_BACK
    assert mark.read_text() == "7"


@pytest.mark.parametrize("status", [401, 404, 412])
def test_a_server_that_had_given_it_up_or_never_knew_it_is_signed_on_to_at_once(
    server: Server, node: Fleet, mark: Path, status: int
) -> None:
    mark.write_text("7")
    server.next = [status, AS_SEVEN]
    node.ActivateNode(ACTIVATION)
    assert server.asked == [OFF, ON]


@pytest.mark.parametrize("trouble", [httpx.ConnectError("refused"), 503])
def test_a_server_that_is_not_there_yet_is_signed_off_from_when_it_is(
    server: Server, node: Fleet, mark: Path, trouble: Exception | int
) -> None:
    """Flower repeats the whole of it."""
    mark.write_text("7")
    server.next = [trouble]
    with pytest.raises(httpx.HTTPError):
        node.ActivateNode(ACTIVATION)
    node.ActivateNode(ACTIVATION)
    assert server.asked == [OFF, *COME_BACK]


@pytest.mark.parametrize("left", ["", "seven", "7.5"])
def test_a_mark_that_says_nothing_is_none(server: Server, node: Fleet, mark: Path, left: str) -> None:
    mark.write_text(left)
    node.ActivateNode(ACTIVATION)
    assert server.asked == [ON]


def test_a_node_without_keys_is_the_same_when_it_starts_again(server: Server, node: Fleet, mark: Path) -> None:
    """Its number goes with the key that it drew, and what it was asked goes with its number."""
    first, again = same_keys(mark.with_suffix(".key")), same_keys(mark.with_suffix(".key"))
    assert public_key_to_bytes(first[1]) == public_key_to_bytes(again[1])
    assert mark.with_suffix(".key").stat().st_mode & 0o777 == 0o600
    server.next = [200, 412]
    for _ in range(2):
        node.RegisterNode(flower.RegisterNodeFleetRequest(public_key=KEY))
    node.UnregisterNode(flower.UnregisterNodeFleetRequest(node_id=7))
    assert server.asked == [REGISTER, REGISTER]
    server.next = [400]
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        node.RegisterNode(flower.RegisterNodeFleetRequest(public_key=KEY))


def test_a_node_that_keeps_no_mark_registers_as_flower_s_own(server: Server, node: Fleet) -> None:
    server.next = [412, 200]
    with pytest.raises(httpx.HTTPStatusError, match="412"):
        node.RegisterNode(flower.RegisterNodeFleetRequest(public_key=KEY))
    node.UnregisterNode(flower.UnregisterNodeFleetRequest(node_id=7))
    assert server.asked == [REGISTER, "unregister-node"]


def test_flower_s_connection_is_the_one_that_we_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("FleetHttpClient", "generate_key_pairs"):  # put back afterwards
        monkeypatch.setattr(fleet_http_connection, name, getattr(fleet_http_connection, name))
    monkeypatch.setattr(fleet_http_connection, "FleetHttpClient", FleetHttpClient)
    monkeypatch.setattr(Fleet, "mark", None)
    assert lose_no_ask(tmp_path / "node.mark")
    assert fleet_http_connection.FleetHttpClient is Fleet
    assert Fleet.mark == tmp_path / "node.mark"
    drawn = [public_key_to_bytes(fleet_http_connection.generate_key_pairs()[1]) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_another_flower_runs_stock_and_it_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr(fleet_http_connection, "FleetHttpClient")
    monkeypatch.setattr(fleet.log, "propagate", True)
    with caplog.at_level(logging.WARNING, "flwr"):
        assert not lose_no_ask()
    assert "rounds.timeout" in caplog.text
