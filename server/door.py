"""The door before the SuperLink: nodes come in from everywhere, all else from this machine, and by the server's own word.

Flower serves nodes (Fleet), operators (Control) and executors (Runtime) on one port, and lets whoever reaches it submit runs,
stop them, and register nodes. A peer on loopback need not be of this machine: what forwards TCP makes strangers local. So
Control also wants a word that only processes of this server know; for Runtime Flower itself wants a secret, or a task's token.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

Address = IPv4Address | IPv6Address
FLEET, HEALTH, RUNTIME = "/v1/fleet/", "/health", "/v1/runtime/"
REFUSAL = f"only {FLEET} and {HEALTH} are open to other machines; everything else is asked for on the server itself\n"
NO_WORD = "this is for processes of `fedtune server` alone: the request has not the word that they know\n"
HEADER = "x-fedtune-word"


def word_of(secret: bytes) -> str:
    """What the header must say. The secret itself is not sent: executors sign with it."""
    return hmac.new(secret, b"fedtune control", hashlib.sha256).hexdigest()


class Door:
    """An ASGI middleware. `own`: the address that the SuperLink listens on, where that is one alone and not loopback."""

    def __init__(self, app: ASGIApp, word: str, own: Iterable[Address] = ()) -> None:
        self._app, self._word, self._own = app, word.encode(), frozenset(own)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = "" if scope["type"] == "lifespan" else self._refusal(scope)
        if not refusal:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocketClose()(scope, receive, send)
        else:
            await PlainTextResponse(refusal, status_code=403)(scope, receive, send)

    def _refusal(self, scope: Scope) -> str:
        path = scope["path"]
        if open_to_all(path):
            return ""
        if not self.is_local(scope.get("client")):
            return REFUSAL
        return "" if path.startswith(RUNTIME) or self.knows(scope["headers"]) else NO_WORD

    def knows(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """An empty word would be known to everybody, so nobody knows it."""
        given = [value for name, value in headers if name.lower() == HEADER.encode()]
        return bool(self._word) and len(given) == 1 and hmac.compare_digest(given[0], self._word)

    def is_local(self, peer: tuple[str, int] | None) -> bool:
        """A peer without an address counts as foreign: nothing says that it is not."""
        try:
            address = plain_address(str((peer or ("",))[0]))
        except ValueError:
            return False
        return address.is_loopback or address in self._own


def open_to_all(path: str) -> bool:
    return path == HEALTH or path.startswith(FLEET)


def plain_address(text: str) -> Address:
    """An IPv4 address that came over an IPv6 socket is that IPv4 address. Raises ValueError where it is none."""
    address = ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address
