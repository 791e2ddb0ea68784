"""Whether this client's SuperNode is connected, and if not, why, in a line that says what to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from client.told import Link
from fedtune.errors import FedtuneError
from fedtune.security.probe import Probe, probe

STALE = 30.0  # seconds without a good answer; heartbeats come at least every 23 s
SELDOM = 5.0  # seconds between probes of the server
TOLERANCE = 300.0  # seconds by which clocks may differ: Flower's, by which it judges a node's signature
ACTIVATE = "/v1/fleet/activate-node"

Prober = Callable[[str, Path | None], Probe]


class Connection:
    """`why()` now and then: None while connected. The server is probed only when something is wrong."""

    def __init__(
        self, server: str, ca: Path | None, link: Path, prober: Prober = probe, clock: Callable[[], float] = time.time
    ) -> None:
        self.server, self._ca, self._link = server, ca, link
        self._prober, self._clock = prober, clock
        self._probed, self._found = float("-inf"), Probe(True)

    def why(self, up: bool) -> str | None:
        """`up`: whether the SuperNode's process runs."""
        link = Link.read(self._link)
        if up and link and self._is_well(link):
            return None
        found = self._probe()
        if found.problem:
            return found.problem
        if link and link.status >= 400:
            return self._refused(link, found.clock)
        if not up:
            return "the SuperNode has ended, and is started again; its log (logs/supernode.log) says why"
        if link is None or link.warned > link.well:
            return f"{self.server} answers, and the SuperNode is about to connect"
        return f"{self.server} answers, but the SuperNode has had no answer for more than {STALE:.0f} s"

    @property
    def gone(self) -> bool:
        """Whether the server's machine answers that nothing listens there, as after a server that has ended."""
        return self._found.refused

    def _is_well(self, link: Link) -> bool:
        return link.status < 400 and link.warned <= link.well and self._clock() - link.well < STALE

    def _probe(self) -> Probe:
        if self._clock() - self._probed >= SELDOM:
            self._probed = self._clock()
            try:
                self._found = self._prober(self.server, self._ca)
            except FedtuneError as error:
                self._found = Probe(False, str(error))
        return self._found

    def _refused(self, link: Link, ahead: float | None) -> str:
        if link.status == 401 and ahead is not None and abs(ahead) >= TOLERANCE:
            return (
                f"the clocks of this machine and of {self.server} differ by {abs(ahead) / 60:.0f} minutes, allowed are "
                f"{TOLERANCE / 60:.0f}; set the one that is wrong, such as with `timedatectl set-ntp true`"
            )
        if link.status == 412 and link.path == ACTIVATE:
            return (
                f"{self.server} does not know this node, or counts it as connected already (answer 412): it was revoked, or is "
                f"not registered there, and its operator sees it with `fedtune keys list`; or the server still counts an "
                f"earlier connection as open, about a minute after a crash; or another client runs with the same bundle"
            )
        if link.status == 401 or (link.path == ACTIVATE and link.status < 500):
            return (
                f"{self.server} does not know this node (answer {link.status}): it was revoked, or is not registered there, or "
                f"the server is still starting; its operator sees it with `fedtune keys list`"
            )
        return f"{self.server} answers {link.status} to {link.path}: see the server's log (`fedtune logs` there)"
