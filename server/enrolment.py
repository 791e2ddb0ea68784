"""Registry and SuperLink in step: nodes of registered clients are let in, all others are shut out, and each has a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fedtune.errors import FedtuneError
from fedtune.security.registry import ClientRecord, Registry
from server.flower_control import Control, Node

Standing = Literal["connected", "missing", "revoked"]


class Enrolment:
    """`step()` now and then. What could not be done is in `problems`, client -> why, and is tried again at the next step.

    `alone`: nobody else uses this SuperLink, so every node that is not of the registry goes; otherwise those that were revoked.
    """

    def __init__(self, control: Control, registry: Registry, alone: bool = True) -> None:
        self._control, self._registry, self._alone = control, registry, alone
        self.problems: dict[str, str] = {}

    def step(self) -> dict[str, Standing]:
        """How each client of the registry stands, by name."""
        records, nodes = self._registry.clients(), {node.key: node for node in self._control.nodes()}
        welcome = {record.node_pem(): name for name, record in records.items() if not record.revoked}
        self.problems = {}
        for key, name in welcome.items():
            self._let_in(key, name, nodes.get(key))
        unwelcome = nodes.keys() - welcome.keys() if self._alone else {r.node_pem() for r in records.values() if r.revoked}
        for key, node in nodes.items():
            if key in unwelcome and node.status != "unregistered":
                self._control.unregister(node.id)
        return standing(records, nodes)

    def _let_in(self, key: bytes, name: str, node: Node | None) -> None:
        try:
            if node is None:
                self._control.register(key, name)
            elif node.status == "unregistered":
                raise FedtuneError(
                    f"its key was shut out once, and Flower never takes it again: fedtune keys rotate client {name}"
                )
        except FedtuneError as error:
            self.problems[name] = str(error)


def standing(records: Mapping[str, ClientRecord], nodes: Mapping[bytes, Node]) -> dict[str, Standing]:
    def of(record: ClientRecord) -> Standing:
        if record.revoked:
            return "revoked"
        node = nodes.get(record.node_pem())
        return "connected" if node is not None and node.online else "missing"

    return {name: of(record) for name, record in records.items()}


class Anybody:
    """Without keys nobody has a name before the first hello: nodes are told apart by their number."""

    problems: Mapping[str, str] = {}

    def __init__(self, control: Control) -> None:
        self._control = control

    def step(self) -> dict[str, Standing]:
        return {f"node-{node.id}": "connected" for node in self._control.nodes() if node.online}
