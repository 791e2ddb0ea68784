"""The table of a comparison: mean ± std derived by hand, its order, and what it says of cells without figures."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from simulations.sweep_cell import Figures, Outcome, Point
from simulations.sweep_table import (
    HEADERS,
    NOTE,
    RATIO_NOTE,
    Spread,
    base_cells,
    headers,
    markdown,
    rich_table,
    rows_of,
)

FIGURES = Figures(
    loss=2.0, own=1.9, base=3.0, base_own=3.1, bytes_up=1_500_000, bytes_down=300, seconds=75, aggregation_error=None,
    exact=False, personal=False, curve=(Point(0, 3.0, 10), Point(1, 2.0, 1000)),
)  # fmt: skip
Cell = Callable[..., Outcome]


def cell(variant: str, seed: int = 0, strategy: str = "", **changed: object) -> Outcome:
    return Outcome(variant, seed, strategy or variant, "done", figures=replace(FIGURES, **changed))  # type: ignore[arg-type]


def test_mean_and_sample_deviation() -> None:
    """Of 1, 2, 6: the mean is 3, the squares of the distances are 4 + 1 + 9 = 14, and sqrt(14 / (3 - 1)) = 2.6458."""
    assert str(Spread.of([1.0, 2.0, 6.0])) == "3.000 ± 2.646"
    assert str(Spread.of([2.5])) == "2.500"
    assert str(Spread.of([2.5, math.inf])) == str(Spread.of([math.nan])) == "diverged"


def test_the_table_as_markdown() -> None:
    """Losses 2.0 and 2.2 have the mean 2.1 and the deviation sqrt(0.01 + 0.01) = 0.141; so have the differences 0.1 and 0.3
    to 1.9, seed by seed."""
    outcomes = [
        cell("fedavg", 0, aggregation_error=0.25), cell("fedavg", 1, loss=2.2, aggregation_error=0.5),
        cell("wide", 0, "flora", loss=1.9, exact=True), cell("wide", 1, "flora", loss=1.9, exact=True),
        cell("hot", 0, loss=math.nan), cell("hot", 1, loss=1.0),
        Outcome("bad|name", 0, "bad|name", "failed", "no\nluck"), Outcome("bad|name", 1, "bad|name", "failed", "no\nluck"),
    ]  # fmt: skip
    wanted = f"""# demo: 2 seeds

| strategy | loss, everybody's | to the best | loss, own files | up | down | time | aggregation error |
|---|---:|---:|---:|---:|---:|---:|---:|
| wide (flora) | 1.900 ± 0.000 | - | 1.900 ± 0.000 | 1.5 MB | 300 B | 1 min 15 s | exact |
| fedavg | 2.100 ± 0.141 | +0.200 ± 0.141 | 1.900 ± 0.000 | 1.5 MB | 300 B | 1 min 15 s | 0.375 |
| hot | diverged | diverged | 1.900 ± 0.000 | 1.5 MB | 300 B | 1 min 15 s | - |
| bad\\|name | failed | - | - | - | - | - | - |
| scaffold | cannot | - | - | - | - | - | - |
| base model | 3.000 ± 0.000 | - | 3.100 ± 0.000 | - | - | - | - |

{NOTE}

- bad\\|name: failed: no luck
- scaffold: cannot: needs sgd
"""
    assert markdown("demo: 2 seeds", rows_of(outcomes, {"scaffold": "needs sgd"})) == wanted


def test_the_ratio_to_plain_has_a_column_where_somebody_s_is_not_1() -> None:
    """Mean over the seeds: (10 + 20) / 2 = 15."""
    plain, older = cell("plain", ratio=1.0), cell("older", ratio=None)
    assert headers(rows_of([plain, older], {})) == HEADERS
    small = [cell("small", 0, ratio=10.0), cell("small", 1, ratio=20.0)]
    rows = rows_of([plain, older, *small, Outcome("x", 0, "x", "failed", "no luck")], {"scaffold": "needs sgd"})
    assert headers(rows) == (*HEADERS[:6], "to plain", *HEADERS[6:])
    assert {row.name: row.cells[6] for row in rows} == {
        "plain": "1.0x", "older": "-", "small": "15x", "x": "-", "scaffold": "-"
    }  # fmt: skip
    assert {len(row.cells) for row in rows} | {len(base_cells(rows) or ())} == {len(HEADERS) + 1}
    assert RATIO_NOTE in markdown("x", rows)
    assert RATIO_NOTE not in markdown("x", rows_of([plain], {}))


def test_differences_are_taken_seed_by_seed() -> None:
    """1.0 and 3.0 against 1.1 and 3.1: the losses scatter, the difference does not. Seed 1 of the third failed."""
    rows = rows_of(
        [
            *(cell("best", seed, loss=loss) for seed, loss in enumerate([1.0, 3.0])),
            *(cell("next", seed, loss=loss) for seed, loss in enumerate([1.1, 3.1])),
            *(cell("last", seed, loss=loss) for seed, loss in ((1, 4.0), (2, 2.0))),
        ],
        {},
    )
    assert [(row.name, row.to_best) for row in rows] == [("best", "-"), ("next", "+0.100 ± 0.000"), ("last", "+1.000")]


def test_seeds_that_failed_are_said_beside_the_others() -> None:
    rows = rows_of(
        [cell("fedavg", 0), Outcome("fedavg", 1, "fedavg", "failed", "no luck"), cell("flora"), cell("flora", 1)], {}
    )
    assert [row.cells[1] for row in rows] == ["2.000", "2.000 ± 0.000"]
    assert rows[0].notes == ("1 of 2 seeds, failed: no luck",)


def test_variants_with_other_examples_have_no_common_base() -> None:
    assert "base model" not in markdown("x", rows_of([cell("a"), cell("b", base=3.2)], {}))
    assert "base model" in markdown("x", rows_of([cell("a"), cell("b", base=3.0 + 1e-6)], {}))


@pytest.mark.parametrize("outcomes", [[], [cell("fedavg")]])
def test_the_table_of_the_terminal_holds_the_same(outcomes: list[Outcome]) -> None:
    console = Console(width=140, file=io.StringIO())
    rows = rows_of(outcomes, {"[red]odd[/red]": "broken"})
    console.print(rich_table(rows))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(text in said for row in rows for text in row.cells)
