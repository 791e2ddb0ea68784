"""The live table on an 80-column terminal and in a pipe, and the watchers that tell others."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from fedtune.job import Job, Rounds
from server.records import ClientRecord, Comparison, RoundRecord
from server.table import LiveTable
from server.watchers import Quiet, Several

JOB = Job(name="demo", rounds=Rounds(count=2), strategy={"name": "flora"})
COMPARISON = Comparison(base=4.0, alone={"a": 3.5, "b": 3.0, "c": 3.1}, federated=2.5, central=2.25)
RECORDS = (
    RoundRecord(0, 4.0, {}, 1.0, {name: ClientRecord(bytes_down=600_000, loss=4.0) for name in "abc"}),
    RoundRecord(
        1, None, {}, 12.3, {"a": ClientRecord(1_200_000, 600_000), "b": ClientRecord(failed="out of\nmemory \x1b[31m")}
    ),
    RoundRecord(2, 2.5, {}, 90.0, {name: ClientRecord(1_200_000, 600_000) for name in "abc"}),
)


SMALL = (  # 10 times and 2.5 times as large, were the numbers plain
    RoundRecord(0, 4.0, {}, 1.0, {"a": ClientRecord(12, 28, plain_down=350, plain_up=50)}),
    RoundRecord(1, 3.0, {}, 90.0, {"a": ClientRecord(30_000, 10_000, plain_down=60_000, plain_up=40_000)}),
)


def terminal(width: int = 80, height: int = 24, encoding: str = "utf-8") -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    return Console(file=file, force_terminal=True, width=width, height=height, color_system=None, legacy_windows=False)


def pipe(encoding: str = "utf-8") -> Console:
    return Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True), width=80)


def output(console: Console) -> str:
    return console.file.buffer.getvalue().decode(console.file.encoding)  # type: ignore[attr-defined]


def run(table: LiveTable, records: tuple[RoundRecord, ...] = RECORDS, comparison: Comparison | None = COMPARISON) -> None:
    with table:
        table.started(JOB, {"a": 40, "b": 60, "c": 1200})
        for record in records:
            table.doing("training", 1, 3)
            table.round_ended(record)
        if comparison:
            table.compared(comparison)


def test_a_pipe_gets_one_plain_line_a_round() -> None:
    console = pipe()
    run(LiveTable(console))
    lines = output(console).splitlines()
    assert lines[0] == "demo: flora, 2 rounds, 3 clients, 1 300 training examples"
    rounds = [re.sub(" +", " ", line) for line in lines if line.startswith("round")]
    assert rounds == [
        "round 0/2 loss 4.000 down 1.8 MB up 0 B 1.0 s 3/3 clients",
        "round 1/2 loss - down 1.2 MB up 600 kB 12 s 1/2 clients failed: b: out of memory ?[31m",
        "round 2/2 loss 2.500 (-1.500) down 3.6 MB up 1.8 MB 1 min 30 s 3/3 clients",
    ]
    assert all(line.isprintable() for line in lines)


def test_small_messages_are_compared_with_plain_ones() -> None:
    """Over both directions; of the whole run only rounds of training count."""
    console = pipe()
    run(LiveTable(console), SMALL)
    words = re.sub(" +", " ", output(console))
    assert "down 12 B up 28 B 10x smaller 1.0 s" in words
    assert "down 30.0 kB up 10.0 kB 2.5x smaller 1 min 30 s" in words
    assert "30.0 kB down and 10.0 kB up per client and round, 2.5x smaller than plain numbers" in words


def test_the_ratio_has_a_column_where_it_is_not_1_and_the_table_still_fits() -> None:
    wide = replace(SMALL[1], seconds=7500.0, clients={"a": ClientRecord(99_000, 99_000, plain_down=10**9)})
    plain = replace(SMALL[1], clients={"a": ClientRecord(10_000, 10_000, plain_down=10_004, plain_up=9_998)})
    shown = {}
    for name, records in {"small": (*SMALL, wide), "plain": (plain,), "old": RECORDS}.items():
        console = terminal()
        run(LiveTable(console), records)
        shown[name] = output(console).rsplit("\x1b[2K", 1)[-1]
        assert max(map(len, shown[name].splitlines())) <= 80
    assert "ratio" in shown["small"]
    assert re.search(r"99\.0 kB +99\.0 kB +>999x +2 h 05 min +1/1", shown["small"])
    assert "ratio" not in shown["plain"] + shown["old"]


def test_the_comparison_names_the_best_and_the_worst_client() -> None:
    console = pipe()
    run(LiveTable(console))
    words = re.sub(" +", " ", output(console))
    assert "alone, mean 3.200 24.53 +0.700" in words  # (3.5 + 3.0 + 3.1) / 3
    assert "alone, best (b) 3.000 20.09 +0.500" in words
    assert "alone, worst (a) 3.500 33.12 +1.000" in words
    assert "central 2.250 9.49 -0.250" in words
    # Four answers in rounds 1 and 2, each 1.2 MB down and 0.6 MB up; the failed one is not an answer.
    assert "1.2 MB down and 600 kB up per client and round" in words


def test_the_final_table_fits_80_columns_and_shows_why_a_client_failed() -> None:
    console = terminal()
    run(LiveTable(console))
    final = output(console).rsplit("\x1b[2K", 1)[-1]  # what follows the last wiped line stays
    assert max(map(len, final.splitlines())) <= 80
    assert re.search(r"1 +- +1\.2 MB +600 kB +12 s +1/2", final)
    assert "round 1, b: out of memory ?[31m" in final
    assert "federated" in final


NOTED = (*RECORDS[:2], replace(RECORDS[2], notes=("ann sits out until round 7", "rolled back: [bold]\x1b[31m\nnot finite")))


@pytest.mark.parametrize("height", [12, 24])
def test_what_was_out_of_the_ordinary_stands_below_the_rounds(height: int) -> None:
    table = LiveTable(terminal(height=height))
    for record in NOTED:
        table.round_ended(record)
    console = Console(record=True, width=80, height=height, file=io.StringIO())
    console.print(table._screen())
    lines = [line.strip() for line in console.export_text().splitlines()]
    assert "round 2: ann sits out until round 7" in lines
    assert "round 2: rolled back: [bold]?[31m not finite" in lines
    assert len(lines) <= height


def test_a_pipe_is_told_it_in_the_round_s_line() -> None:
    console = pipe()
    run(LiveTable(console), NOTED, None)
    last = output(console).splitlines()[-1]
    assert last.endswith("3/3 clients  note: ann sits out until round 7; rolled back: [bold]?[31m not finite")


def test_a_long_run_keeps_its_newest_rounds_on_the_screen() -> None:
    table = LiveTable(terminal(height=12))
    table.started(JOB, {"a": 1})
    for number in range(100, 150):
        table.round_ended(RoundRecord(number, 1.0))
    table.doing("training", 3, 8)
    console = Console(record=True, width=80, height=12, file=io.StringIO())
    console.print(table._screen())
    lines = console.export_text().splitlines()
    assert len(lines) <= 11
    assert any(line.strip().startswith("149") for line in lines)
    assert re.search(r"training .* 3 of 8", lines[-1])


@pytest.mark.parametrize("console", [terminal(), terminal(20, 5), terminal(encoding="ascii"), pipe(), pipe("ascii")])
def test_nothing_known_is_no_crash(console: Console) -> None:
    nobody = RoundRecord(0)
    odd = RoundRecord(1, float("nan"), {}, 0.0, {"клиент [bold]": ClientRecord(failed="причина [/]")})
    run(LiveTable(console), (nobody, odd), Comparison(float("nan"), {}, 2.0, float("inf")))
    with LiveTable(console) as table:
        table.doing("training", 0, 0)


def test_a_run_that_breaks_off_still_shows_its_rounds() -> None:
    console = terminal()
    with contextlib.suppress(KeyboardInterrupt), LiveTable(console) as table:
        table.started(JOB, {"a": 1})
        table.round_ended(RECORDS[0])
        raise KeyboardInterrupt
    assert "4.000" in output(console).rsplit("\x1b[2K", 1)[-1]


def test_several_tells_each_in_order() -> None:
    heard: list[tuple[str, str, object]] = []

    class Ear(Quiet):
        def __init__(self, name: str):
            self.name = name

        def round_ended(self, record: RoundRecord) -> None:
            heard.append((self.name, "round", record))

        def compared(self, comparison: Comparison) -> None:
            heard.append((self.name, "compared", comparison))

        def doing(self, what: str, done: int, total: int) -> None:
            heard.append((self.name, what, (done, total)))

    several = Several([Ear("first"), Quiet(), Ear("second")])
    several.started(JOB, {})
    several.doing("training", 1, 2)
    several.round_ended(RECORDS[0])
    several.compared(COMPARISON)
    wanted = [("training", (1, 2)), ("round", RECORDS[0]), ("compared", COMPARISON)]
    assert heard == [(name, what, value) for what, value in wanted for name in ("first", "second")]
