"""The node's connection to the server: Flower's own, which loses no ask when the network goes away at the wrong moment.

A node asks for asks, and the server counts one as delivered as soon as it has answered. Where that answer is lost on its way,
nobody sends the ask again, and the round waits for this node until its timeout. The server asks again only a node that was
away. So after such a loss this node goes away and comes back; and also when it starts after one that was killed, which may have
had an ask.
"""

from __future__ import annotations

import importlib
import logging
import time
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from flwr.proto import fleet_pb2 as flower
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, generate_key_pairs, private_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedtune.errors import KeysError
from fedtune.security.keyfiles import write_private

log = logging.getLogger("flwr")
CONNECTION = "flwr.supernode.fleet_http_connection"
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)  # the server cannot have answered
AWAY = 3.0  # seconds; a coordinator sees in half a second that a node is away, unless it is busy with another's answer


class Fleet(FleetHttpClient):
    """Raises what Flower's own raises; the node's loop repeats it then."""

    mark: Path | None = None  # a file that holds this node's number while it is connected: only who was killed leaves it

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._activation = flower.ActivateNodeRequest()
        self._lost = False  # a look for an ask that the server may have answered
        self._beating = Lock()

    def RegisterNode(self, request: flower.RegisterNodeFleetRequest) -> flower.RegisterNodeFleetResponse:
        """Only without keys. A node that comes back with the key that it had is known already."""
        try:
            return super().RegisterNode(request)
        except httpx.HTTPStatusError as error:
            if self.mark is None or error.response.status_code != httpx.codes.PRECONDITION_FAILED:
                raise
            return flower.RegisterNodeFleetResponse()

    def UnregisterNode(self, request: flower.UnregisterNodeFleetRequest) -> flower.UnregisterNodeFleetResponse:
        """It would be another node when it starts again, and what it had been asked would be lost."""
        return super().UnregisterNode(request) if self.mark is None else flower.UnregisterNodeFleetResponse()

    def ActivateNode(self, request: flower.ActivateNodeRequest) -> flower.ActivateNodeResponse:
        self._activation = request
        if self.mark and (left := _read(self.mark)) is not None:
            self._sign_off(left)
        response = super().ActivateNode(request)
        if self.mark:
            _write(self.mark, response.node_id)
        return response

    def DeactivateNode(self, request: flower.DeactivateNodeRequest) -> flower.DeactivateNodeResponse:
        response = super().DeactivateNode(request)
        if self.mark:
            self.mark.unlink(missing_ok=True)
        return response

    def PullMessages(self, request: flower.PullMessagesRequest) -> flower.PullMessagesResponse:
        if self._lost:
            self._go_and_come_back(request.node.node_id)
        try:
            return super().PullMessages(request)
        except httpx.TransportError as error:
            self._lost = not isinstance(error, NOT_SENT)
            raise

    def SendNodeHeartbeat(self, request: SendNodeHeartbeatRequest) -> SendNodeHeartbeatResponse:
        """Not in between: it would bring the node back."""
        with self._beating:
            return super().SendNodeHeartbeat(request)

    def _go_and_come_back(self, node: int) -> None:
        with self._beating:
            if _allowed(self.DeactivateNode, flower.DeactivateNodeRequest(node_id=node)):
                log.info("The connection was lost while an ask may have come: signs off and on, so that it is sent again")
                time.sleep(AWAY)
            _allowed(self.ActivateNode, self._activation)
        self._lost = False

    def _sign_off(self, left: int) -> None:
        """In the name of the one before. Another server than its own knows nothing of it, which is as well."""
        try:
            self.DeactivateNode(flower.DeactivateNodeRequest(node_id=left))
        except httpx.HTTPStatusError as error:
            if error.response.is_server_error:
                raise
            log.info("The server had given up the SuperNode before this one: %s", error)
            return
        log.info("The SuperNode before this one was killed: signs off and on, so that what it was asked is sent again")
        time.sleep(AWAY)


def _allowed(call: Any, request: Any) -> bool:
    """Whether it was done; False where the node is already what the request would make of it, or is no longer registered."""
    try:
        call(request)
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.PRECONDITION_FAILED:
            raise
        return False
    return True


def _read(mark: Path) -> int | None:
    try:
        return int(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(mark: Path, node: int) -> None:
    try:
        mark.write_text(str(node), encoding="utf-8")
    except OSError as error:
        log.warning("%s cannot be written: %s", mark, error)  # a full disk: the node works all the same


def same_keys(file: Path) -> tuple[EllipticCurvePrivateKey, EllipticCurvePublicKey]:
    """As Flower draws them, at the first start."""
    try:
        private = bytes_to_private_key(file.read_bytes())
    except (OSError, ValueError):
        private, _ = generate_key_pairs()
        try:
            write_private(file, private_key_to_bytes(private))
        except KeysError as error:
            log.warning("%s", error)
    return private, private.public_key()


def lose_no_ask(mark: Path | None = None) -> bool:
    """Whether Flower's connection is as we know it; where Flower has changed it, it runs stock. `mark`: see Fleet; beside it, a
    node without a key of its own keeps the one that it draws."""
    connection = importlib.import_module(CONNECTION)
    if getattr(connection, "FleetHttpClient", None) is not FleetHttpClient:
        log.warning("Flower's connection has changed: an ask that is lost on its way is not sent again before rounds.timeout")
        return False
    connection.FleetHttpClient, Fleet.mark = Fleet, mark  # type: ignore[attr-defined]
    if mark:
        connection.generate_key_pairs = partial(same_keys, mark.with_suffix(".key"))  # type: ignore[attr-defined]
    return True
