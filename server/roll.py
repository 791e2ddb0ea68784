"""Who takes part in a run, and at which node: settled by the first hello, found again where a client comes back elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.serverapp import Grid

from fedtune.base import Blueprint
from fedtune.job import Job
from fedtune.strategy import ClientInfo
from server.meeting import greet, with_the_job
from server.post import OPEN, Post

PATIENCE = 30.0  # seconds for strangers to say who they are
OWN = ("examples", "rank", "scale", "limits")  # what a client says of itself


class Roll:
    """`nodes[client]` is where a client was last."""

    def __init__(
        self,
        grid: Grid,
        job: Job,
        plan: Blueprint,
        clients: Mapping[str, ClientInfo],
        nodes: Mapping[str, int],
        post: Post = OPEN,
        run: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clients, self.nodes = dict(clients), dict(nodes)
        self.gone: dict[int, float] = {}  # nodes that went away -> when, by the monotonic clock
        self._grid, self._job, self._plan, self.post, self._run = grid, job, plan, post, run
        self._clock, self._asked = clock, dict[int, float]()  # when strangers were asked who they are

    def find(self, clients: Iterable[str]) -> None:
        """Where one of them is not at its node, strangers are asked who they are. None takes the place of one who is there."""
        there = set(self._grid.get_node_ids())
        if all(self.nodes.get(client) in there for client in clients):
            return
        now, known = self._clock(), set(self.nodes.values())
        strangers = [node for node in sorted(there - known) if now - self._asked.get(node, -PATIENCE) >= PATIENCE]
        self._asked |= dict.fromkeys(strangers, now)
        if strangers:
            _, found = greet(self._grid, strangers, self._job, self._plan, self.post, self._run, PATIENCE)
            lost = {client for client in self.clients if self.nodes.get(client) not in there}
            self.nodes |= {client: node for client, node in found.items() if client in lost}

    def greet(self, clients: Iterable[str], timeout: float) -> list[str]:
        """Those of them that said hello from where they are. What they said of themselves when the run began stays."""
        nodes = {self.nodes[client]: client for client in clients if client in self.nodes}
        if not nodes:
            return []
        _, found = greet(self._grid, nodes, self._job, self._plan, self.post, self._run, timeout)
        return sorted(client for client, node in found.items() if nodes.get(node) == client)

    def as_json(self) -> dict[str, Any]:
        told = {client: {name: getattr(info, name) for name in OWN} for client, info in self.clients.items()}
        return {"clients": told, "nodes": self.nodes}


def clients_in(told: Mapping[str, Any], job: Job, plan: Blueprint) -> dict[str, ClientInfo]:
    """Of `Roll.as_json`."""
    infos = {id: ClientInfo(id, **one) for id, one in told["clients"].items()}
    return {id: with_the_job(info, job, plan) for id, info in infos.items()}
