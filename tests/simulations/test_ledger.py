"""The ledger of whole runs: what a coded run would be plain is what a plain run is; every message counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from client.trainer import Trainer
from fedtune.job import Job
from server.records import RoundRecord
from server.watchers import Quiet
from simulations.engine import run_simulation, simulate

MakeJob = Callable[..., Job]
DIGITS = 60  # bytes of figures in headers, which a lossy wire changes a little


@pytest.mark.parametrize("preset", ["lossless", "balanced", "tiny"])
def test_plain_bytes_are_those_of_a_plain_run(make_job: MakeJob, tmp_path: Path, preset: str) -> None:
    plain = simulate(make_job("wire.preset=plain"), tmp_path / "plain", Quiet()).records
    coded = simulate(make_job(f"wire.preset={preset}"), tmp_path / "coded", Quiet()).records
    for one, other in zip(plain, coded, strict=True):
        assert one.ratio == 1.0
        for client, record in one.clients.items():
            same = other.clients[client]
            assert same.plain_down == record.plain_down == record.bytes_down
            assert same.plain_up == pytest.approx(record.bytes_up, abs=DIGITS)
            assert same.bytes_down < record.bytes_down
            assert same.transport_down < record.transport_down  # one array in place of 28
            assert 0 < same.header_up <= same.bytes_up


class Forgetful(Quiet):
    """After round 1 a client loses its memory."""

    def __init__(self, trainer: Trainer, client: str) -> None:
        self._trainer, self._client = trainer, client

    def round_ended(self, record: RoundRecord) -> None:
        if record.round == 1:
            self._trainer._memories.reread(self._client)  # which lies nowhere else


def test_a_broadcast_that_is_sent_again_counts_again(make_job: MakeJob, tmp_path: Path) -> None:
    """Round 2 asks ann to train, in vain; once more, with everything; and to evaluate: three broadcasts, where bob has two, and
    where plain there would have been two: what is sent again counts as no larger than it is."""
    trainer = Trainer.for_simulation(make_job("wire.preset=balanced", "clients.names=['ann', 'bob']"))
    _, first, second = run_simulation(trainer, tmp_path / "run", Forgetful(trainer, "ann")).records
    ann, bob = second.clients["ann"], second.clients["bob"]
    assert first.clients["ann"].plain_down == first.clients["bob"].plain_down == bob.plain_down
    assert bob.plain_down < ann.plain_down < bob.plain_down + ann.bytes_down
    assert ann.failed is None
    assert ann.bytes_down > bob.bytes_down
    assert ann.bytes_up > bob.bytes_up + 100  # and a failure that says so
    assert ann.transport_down == pytest.approx(1.5 * bob.transport_down, rel=0.05)
