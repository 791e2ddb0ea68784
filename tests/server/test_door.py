"""The door before the SuperLink: whom it lets in where."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

import pytest

from server.door import HEADER, NO_WORD, REFUSAL, RUNTIME, Door, word_of

HERE = [("127.0.0.1", 5), ("127.8.9.1", 5), ("::1", 5), ("::ffff:127.0.0.1", 5)]
ELSEWHERE = [("192.0.2.7", 5), ("10.0.0.1", 5), ("2001:db8::1", 5), ("::ffff:192.0.2.7", 5), ("0.0.0.0", 5)]
NOBODY = [None, ("", 0), ("testclient", 5), ("127.0.0.1.example.org", 5)]
OPEN = ["/health", "/v1/fleet/pull-messages", "/v1/fleet/register-node"]
CLOSED = [
    "/v1/control/start-run",
    "/v1/control/list-nodes",
    "/v1/runtime/pull-app-inputs",
    "/v1/fleetcontrol",
    "/v1/Fleet/x",
    "//v1/fleet/x",
    "/health/x",
    "/docs",
    "/openapi.json",
    "/",
]


def ask(door: Door, scope: dict[str, Any]) -> list[dict[str, Any]]:
    """What a client is sent."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    asyncio.run(door(scope, receive, send))
    return sent


async def inside(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "let in"})


WORD = word_of(b"of this server")


def http(path: str, peer: tuple[str, int] | None, kind: str = "http", words: Sequence[str] = ()) -> dict[str, Any]:
    headers = [(HEADER.encode(), word.encode()) for word in words]
    return {"type": kind, "path": path, "client": peer, "method": "POST", "headers": headers}


def refused(path: str, peer: tuple[str, int] | None, *own: str, words: Sequence[str] = (WORD,), wanted: str = WORD) -> str:
    """With which words; empty where it is let in."""
    sent = ask(Door(inside, wanted, map(ip_address, own)), http(path, peer, words=words))
    if sent == [{"type": "let in"}]:
        return ""
    assert sent[0]["status"] == 403
    return sent[1]["body"].decode()


def let_in(path: str, peer: tuple[str, int] | None, *own: str) -> bool:
    """With the word, which helps nobody who comes from elsewhere."""
    said = refused(path, peer, *own)
    assert said in ("", REFUSAL)
    return not said


@pytest.mark.parametrize("peer", HERE)
@pytest.mark.parametrize("path", OPEN + CLOSED)
def test_this_machine_reaches_everything_with_the_word(path: str, peer: tuple[str, int]) -> None:
    assert let_in(path, peer)


@pytest.mark.parametrize("words", [(), ("",), (word_of(b"guessed"),), (WORD[:-1],), (WORD, WORD), ("\u00e9",)])
def test_who_is_local_and_has_not_the_word_is_a_stranger_that_something_forwards(words: Sequence[str]) -> None:
    """Executors show Flower a secret or a token instead."""
    free = [path for path in OPEN + CLOSED if path in OPEN or path.startswith(RUNTIME)]
    assert len(free) == len(OPEN) + 1
    for peer in HERE:
        assert [path for path in OPEN + CLOSED if not refused(path, peer, words=words)] == free
        assert {refused(path, peer, words=words) for path in CLOSED} == {"", NO_WORD}


def test_a_door_without_a_word_opens_to_nobody() -> None:
    assert refused("/v1/control/start-run", HERE[0], words=("",), wanted="") == NO_WORD
    assert refused("/v1/control/start-run", HERE[0], words=(), wanted="") == NO_WORD


@pytest.mark.parametrize("peer", ELSEWHERE + NOBODY)
def test_others_and_peers_without_an_address_reach_what_nodes_need_alone(peer: tuple[str, int] | None) -> None:
    assert [path for path in OPEN + CLOSED if let_in(path, peer)] == OPEN


def test_the_one_address_that_is_listened_on_is_this_machine_s_own() -> None:
    """Flower's own processes then come from it."""
    assert let_in("/v1/control/start-run", ("192.0.2.7", 5), "192.0.2.7")
    assert let_in("/v1/control/start-run", ("::ffff:192.0.2.7", 5), "192.0.2.7")
    assert not let_in("/v1/control/start-run", ("192.0.2.8", 5), "192.0.2.7")


def test_a_websocket_from_elsewhere_is_closed_and_the_start_of_the_server_is_let_through() -> None:
    for peer in (("192.0.2.7", 5), HERE[0]):
        assert ask(Door(inside, WORD), http("/v1/control/x", peer, "websocket"))[0]["type"] == "websocket.close"
    assert ask(Door(inside, WORD), {"type": "lifespan"}) == [{"type": "let in"}]
