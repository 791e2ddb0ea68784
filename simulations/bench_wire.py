"""What the stages of codecs cost: float32 bytes a second on one core, as a share of numpy's copy of the same array."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import numpy as np

from fedtune.wire.stage import Array, Draw, Form, Stage
from fedtune.wire.stages import BUILT_IN, stage_from
from simulations.bench_algebra import Ratio

SHAPE = (4096, 2048)  # 8.4 M numbers: as many as an adapter of rank 16 for q and v of a model of 7 B parameters has
GOALS = {"int8": ">= 0.15", "int4": ">= 0.08", "ternary": ">= 0.08"}
NO_GOAL = ">= 0"
REPEATS = 9
COPIES = 8  # take about as long as a stage: of something shorter a lucky moment would be found sooner
LONG = 2.0  # seconds: what takes as long is measured once


def wire_stages() -> list[Ratio]:
    """MB a second of every built-in stage, each way; in a process of its own, whose libraries start with one thread."""
    with (
        patch.dict(os.environ, OMP_NUM_THREADS="1"),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        return pool.submit(stages).result()


def stages() -> list[Ratio]:
    """With as many threads as this process has."""
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32) * np.float32(1e-3)
    return [ratio for name, stage in _built_in() for ratio in _ratios(name, stage, x)]


def _built_in() -> Iterator[tuple[str, Stage]]:
    for name, place in BUILT_IN.items():
        if find_spec(place.partition(":")[0]):
            yield name, stage_from(name, ())


def _ratios(name: str, stage: Stage, x: Array) -> list[Ratio]:
    """Copies, encode and decode in turn, so that a slow second falls on all of them; the fastest of each."""
    times: list[tuple[float, float, float]] = []
    while not times or (len(times) < REPEATS and sum(times[-1]) < LONG):
        copying = _timed(_copies, x)[0] / COPIES
        encoding, (carrier, sides) = _timed(stage.encode, x, Draw(0, name))
        decoding, _ = _timed(stage.decode, carrier, sides, Form(SHAPE), Draw(0, name))
        times.append((copying, encoding, decoding))
    copy, encode, decode = (x.nbytes / 1e6 / min(column) for column in zip(*times, strict=True))
    goal = GOALS.get(name, NO_GOAL)
    return [(f"{name}: encode / copy, MB/s", encode, copy, goal), (f"{name}: decode / copy, MB/s", decode, copy, goal)]


def _copies(x: Array) -> None:
    for _ in range(COPIES):
        x.copy()


def _timed(work: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    """Seconds of this core: what other processes took meanwhile does not count."""
    began = time.thread_time()
    result = work(*given)
    return time.thread_time() - began, result
