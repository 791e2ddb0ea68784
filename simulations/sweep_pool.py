"""Plays the cells of a comparison, several at a time in processes of their own where cores and memory allow."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import psutil

from simulations.sweep import Cell, stored
from simulations.sweep_cell import Outcome, keep, play

ASSUMED = 1.2e9  # bytes that a cell takes, until one has been measured
SPARED = 0.9  # share of the available memory that cells may take
LOOK = 0.2  # seconds between looks at what the processes tell

_spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
_told: Any = None  # in a process of the pool: the queue to tell the parent


class Audience(Protocol):
    """Somebody who looks at a comparison while it goes on."""

    def doing(self, cell: str, what: str) -> None: ...

    def ended(self, cell: str, outcome: Outcome) -> None: ...


def play_all(cells: Sequence[Cell], processes: int | None, audience: Audience) -> Iterator[Outcome]:
    """The outcome of each cell, as they end. `processes` None: as many as fit."""
    if (processes or min(fitting(ASSUMED), len(cells))) <= 1:
        for cell in cells:
            outcome = play(cell, lambda what, title=cell.title: audience.doing(title, what))
            audience.ended(cell.title, outcome)
            yield outcome
        return
    waiting = list(cells)
    while waiting:  # once, unless a process dies and takes its pool with it
        yield from _Pool(waiting, processes, audience).play()


class _Pool:
    def __init__(self, waiting: list[Cell], processes: int | None, audience: Audience) -> None:
        self._waiting, self._processes, self._audience = waiting, processes, audience
        self._limit = processes or max(1, min(fitting(ASSUMED), len(waiting)))
        self._running: dict[Future[Outcome], Cell] = {}
        self._queue: Any = _spawn.Queue()

    def play(self) -> Iterator[Outcome]:
        workers = min(self._processes or cores(), len(self._waiting))
        with _pool(workers, self._queue) as pool:
            while (self._waiting or self._running) and self._fill(pool):
                ended, _ = wait(self._running, timeout=LOOK, return_when=FIRST_COMPLETED)
                self._listen()
                yield from [self._outcome(future) for future in ended]
            yield from [self._outcome(future) for future in list(self._running)]  # none, unless the pool is broken

    def _fill(self, pool: ProcessPoolExecutor) -> bool:
        """False where a process has died: this pool takes no more."""
        while self._waiting and len(self._running) < self._limit:
            try:
                future = pool.submit(play_here, with_threads(self._waiting[0], cores() // self._limit))
            except BrokenProcessPool:
                return False
            self._running[future] = self._waiting.pop(0)
        return True

    def _listen(self) -> None:
        while True:
            try:
                self._audience.doing(*self._queue.get_nowait())
            except queue.Empty:
                return

    def _outcome(self, future: Future[Outcome]) -> Outcome:
        cell = self._running.pop(future)
        try:
            outcome = future.result()
        except BrokenProcessPool:
            reason = "its process, or one beside it, was killed: for want of memory? Type --processes 1"
            outcome = keep(
                cell, Outcome(cell.variant, cell.seed, cell.job.strategy.name, "failed", reason, job=stored(cell.job))
            )
        if outcome.memory and not self._processes:  # what is available now is beside the cells that still run
            self._limit = min(cores(), max(1, len(self._running) + fitting(outcome.memory)))
        self._audience.ended(cell.title, outcome)
        return outcome


def play_here(cell: Cell) -> Outcome:
    """In a process of the pool."""
    return play(cell, lambda what: _told.put((cell.title, what)))


def with_threads(cell: Cell, threads: int) -> Cell:
    """Unless the job says how many threads: its share of the cores."""
    if cell.job.machine.threads:
        return cell
    machine = cell.job.machine.model_copy(update={"threads": max(1, threads)})
    return replace(cell, job=cell.job.model_copy(update={"machine": machine}))


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fitting(memory: float) -> int:
    """How many more cells of so many bytes fit into the memory that is available, one a core at most."""
    return min(cores(), int(psutil.virtual_memory().available * SPARED // memory))


@contextmanager
def _pool(workers: int, told: Any) -> Iterator[ProcessPoolExecutor]:
    """However it is left, none of its processes stays behind."""
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, _spawn, _begin, (told,))
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        told.close()


def _begin(told: Any) -> None:
    """Ctrl-C goes to every process of a terminal: the parent hears it and ends the others."""
    global _told
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing", FutureWarning)  # as in simulations/commands.py
    _told = told
