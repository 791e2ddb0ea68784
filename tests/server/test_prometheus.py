"""What Prometheus scrapes, against sums made by hand: from the files of a server's folder alone."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections import namedtuple
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedtune.daemon import State
from fedtune.errors import UserError
from fedtune.security.addresses import Address
from server.prometheus import ServerCollector, outcome, scraped_at
from server.records import ClientRecord, RoundRecord

HERE = Address("127.0.0.1", 0)
NOT_FINITE = "refused: 'w' is not finite"
Usage = namedtuple("Usage", "total used free")
ROUNDS = [
    RoundRecord(0, 4.0, {}, 2.0, {"ann": ClientRecord(10, 1), "bob": ClientRecord(20, 2)}),
    RoundRecord(1, None, {}, 5.0, {"ann": ClientRecord(100, 50, failed=NOT_FINITE), "bob": ClientRecord(100, 60)}),
    RoundRecord(2, 3.5, {}, 7.0, {"ann": ClientRecord(100, 50, failed=NOT_FINITE), "bob": ClientRecord(0, 0, failed="gone")}),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A server in the midst of a run of five rounds."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9, 2, 7))
    (tmp_path / "run").mkdir()
    State(
        "server",
        phase="running",
        run={"folder": str(tmp_path / "run"), "rounds": 5},
        clients={"ann": "connected", "bob": "missing", "cy": "missing"},
        processes={"superlink": {"pid": 7, "restarts": 2}, "serverapp": {"pid": None, "restarts": 0}},
    ).write(tmp_path)
    return tmp_path


def write(folder: Path, rounds: list[RoundRecord], mode: str = "a") -> None:
    with (folder / "run" / "metrics.jsonl").open(mode) as file:
        file.writelines(json.dumps(record.as_json()) + "\n" for record in rounds)


def figures(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(value for _, value in sorted(sample.labels.items()))
            found[sample.name.removeprefix("fedtune_") + f"({labels})" * bool(sample.labels)] = sample.value
    return found


def test_the_figures_are_those_of_the_folder(folder: Path) -> None:
    with scraped_at(HERE, folder) as port:
        before = figures(port)
        write(folder, ROUNDS[:2])
        figures(port)
        write(folder, ROUNDS[2:])
        found = figures(port)
    assert "round" not in before
    assert "held_out_loss" not in before
    assert found == {
        **{f"phase({name})": 0.0 for name in ("starting", "waiting", "finished", "failed", "stopped")},
        "phase(running)": 1.0,
        "clients(connected)": 1.0,
        "clients(missing)": 2.0,
        "clients(revoked)": 0.0,
        "process_up(superlink)": 1.0,
        "process_up(serverapp)": 0.0,
        "process_restarts_total(superlink)": 2.0,
        "process_restarts_total(serverapp)": 0.0,
        "rounds_planned": 5.0,
        "round": 2.0,
        "held_out_loss": 3.5,
        "last_round_seconds": 7.0,
        "round_seconds_count": 3.0,
        "round_seconds_sum": 14.0,
        "bytes_total(down)": 330.0,
        "bytes_total(up)": 163.0,
        "answers_total(accepted,)": 3.0,
        "answers_total(refused,not_finite)": 2.0,
        "answers_total(failed,other)": 1.0,
        "free_disk_bytes": 7.0,
    }


def test_clients_are_named_where_that_was_asked_for(folder: Path) -> None:
    write(folder, ROUNDS)
    with scraped_at(HERE, folder, names=True) as port:
        named = {name: value for name, value in figures(port).items() if name.startswith("client_")}
    assert named == {
        "client_connected(ann)": 1.0,
        "client_connected(bob)": 0.0,
        "client_connected(cy)": 0.0,
        "client_failures_total(ann,not_finite)": 2.0,
        "client_failures_total(bob,other)": 1.0,
    }


def test_a_run_that_goes_on_from_before_and_plays_a_round_again_counts_it_once(folder: Path) -> None:
    collector = ServerCollector(folder)

    def seconds() -> float:
        return next(s.value for one in collector.collect() for s in one.samples if s.name == "fedtune_round_seconds_sum")

    write(folder, ROUNDS)
    assert seconds() == 14.0
    write(folder, ROUNDS[:1], mode="w")  # cut back to its checkpoint
    write(folder, [RoundRecord(1, None, {}, 6.0)])
    assert seconds() == 15.0  # 2, 6 and the old 7, until that round is played again
    write(folder, [RoundRecord(2, None, {}, 8.0)])
    assert seconds() == 16.0


def test_lines_that_cannot_be_read_are_passed_over(folder: Path) -> None:
    write(folder, ROUNDS[:1])
    with (folder / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"round": 7}\n\xff\n[]\n{"round": 8, "cli')
    assert {one.name for one in ServerCollector(folder).collect()} >= {"fedtune_round", "fedtune_bytes"}
    assert list(ServerCollector(folder / "none").collect()) == []


@pytest.mark.parametrize(
    ("failed", "wanted"),
    [
        (None, ("accepted", "")),
        ("refused: its weight is 0, wanted more than 0", ("refused", "weight")),
        ("no answer within 5 s", ("failed", "no_answer")),
        ("memory ran out in training with one example at a time", ("failed", "memory")),
        ("policy.max_steps: given 5, allowed 1", ("failed", "policy")),
        ("refused: something new", ("refused", "other")),
    ],
)
def test_reasons_become_few_labels(failed: str | None, wanted: tuple[str, str]) -> None:
    assert outcome(failed) == wanted


def test_an_address_that_is_taken_is_a_user_s_mistake(folder: Path) -> None:
    with scraped_at(HERE, folder) as port:
        taken = Address("127.0.0.1", port)
        with pytest.raises(UserError, match=f"--metrics {taken}"), scraped_at(taken, folder):
            pass
