"""One process behind the relays of many nodes: scripted answers, signed and sealed as a trainer's.

`python -m simulations.load_trainer BUNDLES SOCKETS`: for each bundle in the one folder a socket in the other.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

import torch

from client.service import serve
from client.signed import Signed
from fedtune.envelope import Envelope
from fedtune.security.handover import Bundle
from simulations.load_clients import ScriptedTrainer


class One:
    """A client's share of the trainer of all; one ask at a time, as torch has its own threads."""

    def __init__(self, all: ScriptedTrainer, client: str, lock: threading.Lock) -> None:
        self._all, self._client, self._lock = all, client, lock

    def answer(self, ask: Envelope) -> Envelope:
        with self._lock:
            return self._all.answer(ask, self._client)


def main(bundles: Path, sockets: Path) -> None:
    torch.set_num_threads(1)
    handed = [Bundle.load(folder, "trainer") for folder in sorted(bundles.iterdir())]
    all, lock = ScriptedTrainer([bundle.name for bundle in handed]), threading.Lock()
    serving = [serve(Signed(One(all, own.name, lock), own, None).answer, sockets / own.name) for own in handed]
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    over.wait()
    for one in serving:
        one.stop(grace=None)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
