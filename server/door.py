"""The door before the SuperLink: from other machines, nodes alone come in.

Flower serves nodes (Fleet), operators (Control) and its own processes (Runtime) on one port, and lets whoever reaches it submit
a run, which is code that the server executes. So all but Fleet answers this machine only.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

Address = IPv4Address | IPv6Address
FLEET, HEALTH = "/v1/fleet/", "/health"
REFUSAL = f"only {FLEET} and {HEALTH} are open to other machines; everything else is asked for on the server itself\n"


class Door:
    """An ASGI middleware. `own`: the address that the SuperLink listens on, where that is one alone and not loopback."""

    def __init__(self, app: ASGIApp, own: Iterable[Address] = ()) -> None:
        self._app, self._own = app, frozenset(own)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or open_to_all(scope["path"]) or self.is_local(scope.get("client")):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocketClose()(scope, receive, send)
        else:
            await PlainTextResponse(REFUSAL, status_code=403)(scope, receive, send)

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
