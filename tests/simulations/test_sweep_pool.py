"""Which cells are played at a time, with how many threads, and what becomes of them when a process dies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedtune.job import Job
from simulations import sweep_pool
from simulations.sweep import Cell
from simulations.sweep_cell import Outcome, finished
from simulations.sweep_pool import play_all, with_threads


class Audience:
    def __init__(self) -> None:
        self.said: list[str] = []

    def doing(self, cell: str, what: str) -> None: ...

    def ended(self, cell: str, outcome: Outcome) -> None:
        self.said.append(f"{cell}: {outcome.state}")


@pytest.fixture
def cells(make_job: Callable[..., Job], tmp_path: Path) -> list[Cell]:
    return [Cell("fedavg", seed, make_job(f"seed={seed}"), tmp_path / f"seed-{seed}") for seed in range(5)]


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[list[Cell]]:
    """What was submitted to each pool. The cell of seed 1 kills its process; of the others nothing is played."""
    made: list[list[Cell]] = []

    class Pool:
        def __init__(self) -> None:
            self.broken = False
            made.append([])

        def submit(self, work: object, cell: Cell) -> Future[Outcome]:
            if self.broken:
                raise BrokenProcessPool
            made[-1].append(cell)
            future: Future[Outcome] = Future()
            if cell.seed == 1:
                self.broken = True
                future.set_exception(BrokenProcessPool())
            else:
                future.set_result(Outcome(cell.variant, cell.seed, "fedavg", "done", memory=3 * 10**9))
            return future

    @contextmanager
    def pool(*_: object) -> Iterator[Pool]:
        yield Pool()

    monkeypatch.setattr(sweep_pool, "_pool", pool)
    monkeypatch.setattr(sweep_pool, "cores", lambda: 4)
    return made


def available(monkeypatch: pytest.MonkeyPatch, count: float) -> None:
    memory = type("Memory", (), {"available": count})
    monkeypatch.setattr(sweep_pool.psutil, "virtual_memory", lambda: memory)


def test_a_process_that_dies_costs_its_cell_alone(cells: list[Cell], pools: list[list[Cell]]) -> None:
    audience = Audience()
    outcomes = list(play_all(cells, 2, audience))
    assert sorted((outcome.seed, outcome.state) for outcome in outcomes) == [
        (0, "done"), (1, "failed"), (2, "done"), (3, "done"), (4, "done"),
    ]  # fmt: skip
    assert len(pools) == 2
    assert "fedavg, seed 1: failed" in audience.said
    assert finished(cells[1]) is None  # written down, and tried again
    assert "--processes 1" in next(outcome.reason for outcome in outcomes if outcome.seed == 1)


def test_cells_share_the_cores(cells: list[Cell], pools: list[list[Cell]]) -> None:
    list(play_all(cells[2:], 2, Audience()))
    assert [cell.job.machine.threads for cell in pools[0]] == [2, 2, 2]
    assert with_threads(cells[0], 0).job.machine.threads == 1


def test_threads_that_the_job_names_stay(make_job: Callable[..., Job], tmp_path: Path) -> None:
    cell = Cell("fedavg", 0, make_job("machine.threads=3"), tmp_path)
    assert with_threads(cell, 1).job.machine.threads == 3


@pytest.mark.parametrize(
    ("gigabytes", "wanted"),
    [
        (100, [1, 1, 1]),  # three cells on four cores
        (2.8, [2, 2, 4]),  # 2.8 * 0.9 // 1.2 = 2 at first; once one has taken 3 GB, none fits beside another
    ],
)
def test_as_many_as_fit(
    gigabytes: float, wanted: list[int], cells: list[Cell], pools: list[list[Cell]], monkeypatch: pytest.MonkeyPatch
) -> None:
    available(monkeypatch, gigabytes * 1e9)
    list(play_all(cells[2:], None, Audience()))
    assert [cell.job.machine.threads for cell in pools[0]] == wanted


def test_with_little_memory_all_is_played_here(
    cells: list[Cell], pools: list[list[Cell]], monkeypatch: pytest.MonkeyPatch
) -> None:
    available(monkeypatch, 1e9)
    played: list[Any] = []
    here = lambda cell, tell: played.append(cell) or Outcome("fedavg", cell.seed, "fedavg", "done")  # noqa: E731
    monkeypatch.setattr(sweep_pool, "play", here)
    assert len(list(play_all(cells, None, Audience()))) == 5
    assert (played, pools) == (cells, [])
