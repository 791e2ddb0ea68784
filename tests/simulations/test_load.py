"""`make load`, small: scripted clients through a whole run, what is measured of it, and the tables."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from fedtune.adapter import Adapter
from fedtune.strategy import ServerState
from fedtune.wire.versions import Known
from server.opening import Stand
from server.records import ClientRecord, RoundRecord
from server.run_folder import RunFolder
from simulations.load import main, nodes_table, parts_table, rounds_table
from simulations.load_meter import Meter
from simulations.load_simulated import METHODS, Moment, measured
from simulations.load_sockets import KINDS, Carried, Use

CLIENTS, COHORT = 12, 4


@pytest.mark.parametrize("method", [name for name in METHODS if name != "small adapter"])
def test_scripted_clients_are_let_in_and_counted(method: str, tmp_path: Path) -> None:
    moments = measured(tmp_path, method, CLIENTS, COHORT, rounds=2, every=2)

    # round 0: everybody's hello, and everybody evaluates; round 1 trains; round 2 trains, and everybody evaluates
    assert [one.answers for one in moments] == [2 * CLIENTS, COHORT, COHORT + CLIENTS]
    records = RunFolder(tmp_path / "run").records()
    assert [client.failed for record in records for client in record.clients.values() if client.failed] == []
    assert all(one.fsyncs >= one.answers - (CLIENTS if one.round == 0 else 0) for one in moments)  # each is on the disk
    assert all(sum(one.parts.values()) <= one.seconds * 1.5 + 1 for one in moments)
    assert moments[0].journal < moments[1].journal < moments[2].journal


def test_a_run_holds_the_clients_of_its_last_round_alone() -> None:
    stand = Stand(1, ServerState(Adapter({}, {}, "base")), Known())
    for number in (1, 2, 3):
        record = RoundRecord(number, loss=float(number), clients={"ann": ClientRecord(bytes_up=7)})
        stand = stand.after(record, stand.state, stand.known, stand.gate)
    assert [(record.loss, len(record.clients)) for record in stand.records] == [(1.0, 0), (2.0, 0), (3.0, 1)]


def test_a_second_belongs_to_the_innermost_function() -> None:
    ticks: Iterator[float] = iter([0.0, 1.0, 4.0, 10.0])  # outer begins, inner begins, inner ends, outer ends
    meter, owner = Meter(lambda: next(ticks)), SimpleNamespace(inner=lambda: "done")
    owner.outer = lambda: owner.inner()
    inner = owner.inner

    with meter.on({"in": [(owner, "inner")], "out": [(owner, "outer")]}):
        assert owner.outer() == "done"

    assert meter.seconds == {"in": 3.0, "out": 10.0 - 3.0}
    assert meter.calls == {"in": 1, "out": 1}
    assert owner.inner is inner


def moment(round: int, answers: int, gate: float) -> Moment:
    return Moment(round, answers, 9.0, 5 * 10**6, 10**6, 10**6, 10**6, {"gate": gate}, {"fsync": 1.0}, 7)


def text(*tables: object) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*tables)
    return console.export_text()


def test_parts_are_of_rounds_that_only_train() -> None:
    # of rounds 1 and 2: (0.2 + 0.4) s / 200 answers = 3 ms; neither the first, which greets, nor one that evaluates
    moments = [moment(0, 1000, 50.0), moment(1, 100, 0.2), moment(2, 100, 0.4), moment(3, 1100, 70.0)]
    assert next(line for line in text(parts_table("m", moments)).splitlines() if "gate" in line).split()[-2] == "3.00"
    assert "1,100" in text(rounds_table("m", moments))


def test_a_deployment_is_told_by_its_median_round() -> None:
    use = {kind: Use(3.0, 2 * 10**6) for kind in KINDS}
    told = text(nodes_table([Carried(25, [1.0, 2.0, 9.0], 12.0, use, 0.5, 1.5)]))
    assert all(word in told for word in ("25", "2.00", "9.00", "50%", "1.00, 2"))


def test_a_method_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["simulated", "--methods", "nothing"])
    assert "small adapter" in capsys.readouterr().err
