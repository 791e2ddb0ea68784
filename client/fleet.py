"""The node's connection to the server: Flower's own, which loses no ask when the network goes away at the wrong moment.

A node asks for asks, and the server counts one as delivered as soon as it has answered. Where that answer is lost on its way,
nobody sends the ask again, and the round waits for this node until its timeout. The server asks again only a node that was
away. So after such a loss this node goes away and comes back.
"""

from __future__ import annotations

import importlib
import logging
import time
from threading import Lock
from typing import Any

import httpx
from flwr.proto import fleet_pb2 as flower
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.supernode.fleet_http_client import FleetHttpClient

log = logging.getLogger("flwr")
CONNECTION = "flwr.supernode.fleet_http_connection"
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)  # the server cannot have answered
AWAY = 3.0  # seconds; a coordinator sees in half a second that a node is away, unless it is busy with another's answer


class Fleet(FleetHttpClient):
    """Raises what Flower's own raises; the node's loop repeats it then."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._activation = flower.ActivateNodeRequest()
        self._lost = False  # a look for an ask that the server may have answered
        self._beating = Lock()

    def ActivateNode(self, request: flower.ActivateNodeRequest) -> flower.ActivateNodeResponse:
        self._activation = request
        return super().ActivateNode(request)

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


def _allowed(call: Any, request: Any) -> bool:
    """Whether it was done; False where the node is already what the request would make of it, or is no longer registered."""
    try:
        call(request)
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.PRECONDITION_FAILED:
            raise
        return False
    return True


def lose_no_ask() -> bool:
    """Whether Flower's connection is as we know it; where Flower has changed it, it runs stock."""
    connection = importlib.import_module(CONNECTION)
    if getattr(connection, "FleetHttpClient", None) is not FleetHttpClient:
        log.warning("Flower's connection has changed: an ask that is lost on its way is not sent again before rounds.timeout")
        return False
    connection.FleetHttpClient = Fleet  # type: ignore[attr-defined]
    return True
