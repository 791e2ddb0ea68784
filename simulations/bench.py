"""Ratios, measured side by side in one run: what the simulation costs beyond plain training, the server's arithmetic,
what is computed from seeds, what single layers cost, and the wire.

    python -m simulations.bench            # all of them, about ten minutes on two cores
    python -m simulations.bench overhead   # one of: overhead, ray, memory, refactoring, folding, replay, step, step_memory,
                                           # solver, layer_step, layer_memory, probing, wire_stages,
                                           # wire_presets, wire_memory

Each run of a simulation is in a fresh process, the two sides of a ratio in turn; a ratio is that of the fastest of each side,
which other work on the machine disturbs least.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedtune.job import Job, checked_job
from simulations.bench_algebra import Ratio, folding, refactoring
from simulations.bench_layers import layer_memory, layer_step, probing, solver
from simulations.bench_seeds import replay, step, step_memory
from simulations.bench_wire import wire_memory, wire_presets, wire_stages
from simulations.plain_loop import plain_loop

REPEATS = 3


@dataclass(frozen=True)
class Cost:
    seconds: float  # of the work itself, without importing and loading
    wall: float  # of the whole process
    peak: float  # resident memory, MB


def job_of(clients: int, rounds: int, steps: int, data: str = "builtin:stdlib") -> Job:
    """Eight to 64 clients on the small model; all examples of 128 tokens."""
    return checked_job(
        {
            "name": "bench",
            "clients": {"count": clients},
            "rounds": {"count": rounds},
            "train": {"steps": steps, "batch": 4},
            "data": {"path": data, "max_length": 128, "max_held_out": 16},
        },
        "bench",
    )


def ours(job: Job) -> float:
    """Seconds of a simulated run, from the first hello to the last adapter."""
    from server.watchers import Quiet
    from simulations.engine import resident_trainer, run_simulation

    trainer = resident_trainer(job, Quiet())
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run_simulation(trainer, Path(folder) / "run", Quiet())
        return time.perf_counter() - began


def on_ray(job: Job) -> float:
    """Seconds of the same job through `flwr run` and Ray."""
    from server.watchers import Quiet
    from simulations.flower_engine import run_with_flower

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run_with_flower(job, Path(folder) / "run", Quiet())
        return time.perf_counter() - began


def overhead() -> list[Ratio]:
    run, loop = _side_by_side(ours, plain_loop, job_of(clients=8, rounds=3, steps=10))
    return [("simulated run / plain PEFT loop, seconds", _least(run, "seconds"), _least(loop, "seconds"), "<= 1.05")]


def ray() -> list[Ratio]:
    run, flower = _side_by_side(ours, on_ray, job_of(clients=8, rounds=3, steps=5), repeats=1)
    return [("Ray engine / ours, seconds with start", _least(flower, "wall"), _least(run, "wall"), ">= 2")]


def memory() -> list[Ratio]:
    with tempfile.TemporaryDirectory() as folder:
        _write_clients(Path(folder), 64)
        many = _measured(ours, job_of(64, rounds=1, steps=2, data=folder))
        few = _measured(ours, job_of(2, rounds=1, steps=2, data=folder))
    return [("64 clients / 2 clients, peak MB", many.peak, few.peak, "<= 1.1")]


def _write_clients(folder: Path, count: int) -> None:
    """As many JSONL files of 60 kB of source text each as there are clients."""
    from client.data.stdlib import packages, read_package

    text = "".join(row["text"] for package in packages().values() for row in read_package(package))
    for number in range(count):
        part = text[number * 40_000 % (len(text) - 60_000) :][:60_000]
        rows = [json.dumps({"text": part[start : start + 600]}) for start in range(0, len(part), 600)]
        (folder / f"client{number:02d}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _side_by_side(
    first: Callable[[Job], float], second: Callable[[Job], float], job: Job, repeats: int = REPEATS
) -> tuple[list[Cost], list[Cost]]:
    """The two in turn, so that a slow minute of the machine falls on both."""
    pairs = [(_measured(first, job), _measured(second, job)) for _ in range(repeats)]
    return [one for one, _ in pairs], [other for _, other in pairs]


def _measured(work: Callable[[Job], float], job: Job) -> Cost:
    began = time.perf_counter()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        seconds, peak = pool.submit(_in_process, work, job).result()
    return Cost(seconds, time.perf_counter() - began, peak)


def _in_process(work: Callable[[Job], float], job: Job) -> tuple[float, float]:
    seconds = work(job)
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _least(costs: list[Cost], figure: str) -> float:
    return min(getattr(cost, figure) for cost in costs)


MEASURED = {
    "overhead": overhead,
    "ray": ray,
    "memory": memory,
    "refactoring": refactoring,
    "folding": folding,
    "replay": replay,
    "step": step,
    "step_memory": step_memory,
    "solver": solver,
    "layer_step": layer_step,
    "layer_memory": layer_memory,
    "probing": probing,
    "wire_stages": wire_stages,
    "wire_presets": wire_presets,
    "wire_memory": wire_memory,
}


def row(what: str, one: float, other: float, goal: str) -> list[str]:
    sign, bound = goal.split()
    ratio = one / other
    reached = ratio >= float(bound) if sign == ">=" else ratio <= float(bound)
    return [what, f"{one:,.2f}", f"{other:,.2f}", f"{ratio:.3f}", goal, "yes" if reached else "NO"]


def main(names: list[str]) -> None:
    table = Table("measured", "above", "below", "ratio", "goal", "reached")
    for name in names or MEASURED:
        for ratio in MEASURED[name]():
            table.add_row(*row(*ratio))
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
