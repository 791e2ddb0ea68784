"""What happens to messages at the coordinator's door: asks are signed, answers are opened and must be signed by their client.

`OPEN` does nothing: simulation, where all is one process, and `--insecure`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedtune.envelope import Envelope
from fedtune.errors import ClientFailed, Refused
from fedtune.security.sealing import is_sealed, opened
from fedtune.security.signing import ANSWER, ASK, STAMP, Stamp, signed, verified
from server.serials import Serials

LONGEST_REASON = 500  # characters of a reason that nobody has signed


class Post(Protocol):
    """Both ways, by the node of the grid that a message goes to or comes from."""

    def out(self, node: int, ask: Envelope, again: bool = False) -> Envelope:
        """`again`: the same as before to the same node, and an answer to any of them will do."""

    def back(self, node: int, answer: Envelope) -> Envelope:
        """Raises Refused, or ClientFailed with the client's own reason."""


class Open:
    def out(self, node: int, ask: Envelope, again: bool = False) -> Envelope:
        return ask

    def back(self, node: int, answer: Envelope) -> Envelope:
        return answer


OPEN = Open()


class SignedPost:
    """`clients` are the keys of all who may answer, by name; `revoked` says since when others may no longer. No other run is
    called as this `run`."""

    def __init__(
        self,
        signing: Ed25519PrivateKey,
        sealing: X25519PrivateKey,
        clients: Mapping[str, Ed25519PublicKey],
        run: str,
        *,
        end_to_end: bool,
        revoked: Mapping[str, str] | None = None,
        owner: Callable[[int], str | None] = lambda node: None,
        clock: Callable[[], int] = time.time_ns,
        serials: Path | None = None,
    ) -> None:
        """`owner`: the client whose node key a node has shown to the SuperLink; None where that is not known. `serials`: the
        file that makes them grow over restarts."""
        self._signing, self._sealing, self._clients, self._revoked = signing, sealing, clients, revoked or {}
        self._run, self._end_to_end, self._owner, self._serials = run, end_to_end, owner, Serials(serials, clock)
        self._asked: dict[int, list[Stamp]] = {}  # node -> those under which its open ask was sent, the last one last
        self._names: dict[int, str] = {}  # node -> the client that introduced itself from there

    def out(self, node: int, ask: Envelope, again: bool = False) -> Envelope:
        stamp = Stamp(self._run, self._serials.next(), self._name(node) or "", self._end_to_end)
        self._asked[node] = [*(self._asked.get(node, []) if again else []), stamp]
        return signed(ask, stamp, self._signing, ASK)

    def back(self, node: int, answer: Envelope) -> Envelope:
        if "failed" in answer.header and STAMP not in answer.header:  # the relay's, or of a trainer that trusts nobody yet
            raise ClientFailed(f"{str(answer.header['failed'])[:LONGEST_REASON]} (said by its relay, unsigned)")
        client = self._claimed(node, answer)
        inner, stamp = verified(self._opened(node, answer, client), self._clients[client], ANSWER)
        asked = {(asked.run, asked.serial, client) for asked in self._asked[node]}
        if (stamp.run, stamp.serial, stamp.client) not in asked:
            raise Refused("it is signed as the answer to another ask: an old one was sent again")
        if inner.header.get("client") != client:
            raise Refused(f"'{client}' signed it, and it says that it is of '{str(inner.header.get('client'))[:80]}'")
        self._names[node] = client
        return inner

    def _opened(self, node: int, answer: Envelope, client: str) -> Envelope:
        """The serial that a sealed one claims only says which stamp to try: it opens for that one or not at all."""
        *_, last = self._asked[node]
        if is_sealed(answer):
            serials = [asked.serial for asked in self._asked[node] if asked.serial == answer.header.get("serial")]
            return opened(answer, Stamp(last.run, (serials or [last.serial])[0], client), self._sealing)
        if last.seal:
            raise Refused("it is not sealed, and security.end_to_end = true wants that")
        return answer

    def _claimed(self, node: int, answer: Envelope) -> str:
        """Whose it says it is; the signature must prove it."""
        stamp = answer.header.get(STAMP)
        stamp = stamp if isinstance(stamp, Mapping) else answer.header if is_sealed(answer) else _nothing()
        client, known = str(stamp.get("client")), self._name(node)
        if client in self._revoked:
            raise Refused(
                f"'{client}' was revoked on {self._revoked[client]}; give it new keys: fedtune keys rotate client {client}"
            )
        if client not in self._clients:
            raise Refused(f"no client '{client[:80]}' is registered; on the coordinator: fedtune keys client NAME, or register")
        if known is not None and client != known:
            raise Refused(f"it comes from the node of '{known}' and says that it is of '{client}'")
        return client

    def _name(self, node: int) -> str | None:
        return self._names.get(node) or self._owner(node)


def _nothing() -> Mapping[str, Any]:
    raise Refused("it is not signed: start the trainer with --bundle")
