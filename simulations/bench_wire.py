"""What the wire costs on one core, in MB of float32 a second: the stages of codecs and the entropy coder behind them, as a
share of numpy's copy of the same array; and whole presets, from a client's answer to the server's, with the memory of a fold.

All of it in processes of their own, whose libraries start with one thread.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from fedtune.envelope import Envelope
from fedtune.job import checked_job
from fedtune.memory import Memory
from fedtune.payload import Payload, Role
from fedtune.strategy import Answer, Ask, ClientInfo, Fold
from fedtune.wire.ends import ClientEnd, ServerEnd
from fedtune.wire.presets import PRESETS, wire_of
from fedtune.wire.stage import Array, Draw, Form, Stage
from fedtune.wire.stages import BUILT_IN, stage_from
from fedtune.wire.streams import read, written
from server.spool import Spool, SpooledAnswers
from simulations.bench_algebra import Ratio
from strategies.fedavg import FedAvg

RANK, WIDTH, MODULES = 16, 4096, 64  # an adapter for q and v of 32 layers
SHAPE = (WIDTH, 2 * RANK * MODULES)  # as many numbers in one array: 8.4 M
GOALS = {"int8": ">= 0.15", "int4": ">= 0.08", "ternary": ">= 0.08", "uniform": ">= 0.08"}
NO_GOAL = ">= 0"
BEFORE_ENTROPY = {"int8": (), "int4": (), "uniform": ("0.7",)}  # stages, and their settings
REPEATS = 9
COPIES = 8  # take about as long as a stage: of something shorter a lucky moment would be found sooner
LONG = 2.0  # seconds: what takes as long is measured once
ROUNDS = 4  # of a preset; the first has nothing to feed back
FAST = 50.0  # MB a second, each way
ANSWERS = 100
ANN = ClientInfo("ann", examples=1, rank=RANK)


def wire_stages() -> list[Ratio]:
    """MB a second of every built-in stage, each way, and of the entropy coder."""
    return _alone(stages)


def wire_presets() -> list[Ratio]:
    """MB a second of every preset: a client encodes what it has trained, and the server decodes that."""
    return [ratio for preset in PRESETS for ratio in _alone(rounds, preset)]


def wire_memory() -> list[Ratio]:
    """Resident memory at the peak of a fold, beyond what the server has before, less the sums: these are float64, and twice as
    large as an answer. What is left is an answer as it lies in the spool, what it is decoded to and on the way to that, the
    mean at the end, and what the allocator does not give back."""
    ratios = []
    for preset in PRESETS:
        with tempfile.TemporaryDirectory() as folder:
            _alone(spool, preset, folder)
            beyond, one = _alone(fold, preset, folder)
        what = f"{preset}: peak of a fold of {ANSWERS} answers less its sums / one decoded answer, MB"
        ratios.append((what, (beyond - 2 * one) / 1e6, one / 1e6, "<= 2"))
    return ratios


def _alone(work: Callable[..., Any], *given: Any) -> Any:
    """In a process of its own."""
    with (
        patch.dict(os.environ, OMP_NUM_THREADS="1"),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        return pool.submit(work, *given).result()


# stages, and the entropy coder


def stages() -> list[Ratio]:
    """With as many threads as this process has."""
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32) * np.float32(1e-3)
    built_in = [ratio for name, stage in _built_in() for ratio in _ratios(name, stage, x)]
    return built_in + [ratio for name, given in BEFORE_ENTROPY.items() for ratio in _coded(name, stage_from(name, given), x)]


def _built_in() -> Iterator[tuple[str, Stage]]:
    for name, place in BUILT_IN.items():
        if find_spec(place.partition(":")[0]):
            yield name, stage_from(name, ())


def _ratios(name: str, stage: Stage, x: Array) -> list[Ratio]:
    return _compared(
        name, x, lambda: stage.encode(x, Draw(0, name)), lambda made: stage.decode(*made, Form(x.shape), Draw(0, name))
    )


def _coded(name: str, stage: Stage, x: Array) -> list[Ratio]:
    """Behind a stage: of its symbols, which are coded in MB of the float32 numbers that they stand for."""
    form = stage.carrier(Form(x.shape))
    symbols = stage.encode(x, Draw(0, name))[0].astype(form.dtype)
    return _compared(
        f"{name}, its entropy", x, lambda: written(symbols, form, coded=True), lambda data: read(data, form, coded=True)
    )


def _compared(name: str, x: Array, encode: Callable[[], Any], decode: Callable[[Any], Any]) -> list[Ratio]:
    """Copies, encode and decode in turn, so that a slow second falls on all of them; the fastest of each."""
    times: list[tuple[float, float, float]] = []
    while not times or (len(times) < REPEATS and sum(times[-1]) < LONG):
        copying = _timed(_copies, x)[0] / COPIES
        encoding, made = _timed(encode)
        decoding, _ = _timed(decode, made)
        times.append((copying, encoding, decoding))
    copy, encoded, decoded = (x.nbytes / 1e6 / min(column) for column in zip(*times, strict=True))
    goal = GOALS.get(name, NO_GOAL)
    return [(f"{name}: encode / copy, MB/s", encoded, copy, goal), (f"{name}: decode / copy, MB/s", decoded, copy, goal)]


def _copies(x: Array) -> None:
    for _ in range(COPIES):
        x.copy()


def _timed(work: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    """Seconds of this core: what other processes took meanwhile does not count."""
    began = time.thread_time()
    result = work(*given)
    return time.thread_time() - began, result


# presets, from end to end


class Ends:
    """A server, and a client that has what the server has, and trained it."""

    def __init__(self, preset: str, modules: int = MODULES) -> None:
        wire = wire_of(checked_job({"name": "bench", "wire": {"preset": preset}}, "bench"), FedAvg())
        self.start = _adapter(modules, 1e-2, 0)
        self.size = sum(tensor.nbytes for tensor in self.start.tensors.values())
        self.server = ServerEnd(wire, FedAvg(), self.start)
        self.client = ClientEnd(wire, FedAvg(), Memory(), ANN.id, lambda: self.start, self.size)

    def trained(self) -> Answer:
        update = _adapter(len(self.start.tensors) // 2, 1e-3, 1).tensors
        return Answer(replace(self.start, tensors={name: w + update[name] for name, w in self.start.tensors.items()}))

    def asked(self, round: int) -> tuple[dict[str, Any], Ask]:
        """The header of the answer, and the ask as it came."""
        header = {"ask": f"{round}.0", "run": "bench", "round": round, "base": ""}
        return header, self.client.ask(self.server.ask(Ask("train", self.start), ANN.id, header))

    def read(self, envelope: Envelope) -> Answer:
        return self.server.answer(envelope, ANN, self.size)


def _adapter(modules: int, size: float, seed: int) -> Payload:
    """Normal numbers."""
    rng = np.random.default_rng(seed)
    shapes = {Role.A: (RANK, WIDTH), Role.B: (WIDTH, RANK)}
    drawn = {
        (number, role): rng.standard_normal(shape, np.float32) * np.float32(size)
        for number in range(modules)
        for role, shape in shapes.items()
    }
    tensors = {f"{number}.{role}": torch.from_numpy(values) for (number, role), values in drawn.items()}
    return Payload(tensors, dict(zip(tensors, (role for _, role in drawn), strict=True)))


def rounds(preset: str, modules: int = MODULES) -> list[Ratio]:
    ends, times = Ends(preset, modules), []
    trained = ends.trained()
    for round in range(ROUNDS):
        header, came = ends.asked(round)
        encoding, envelope = _timed(ends.client.answer, trained, came, ANN, header)
        decoding, _ = _timed(ends.read, envelope)
        times.append((encoding, decoding))
    encode, decode = (min(column) for column in zip(*times, strict=True))
    name = f"{preset}, {8 * envelope.size() / (ends.size / 4):.2f} bits a number"
    return [
        (f"{name}: a client encodes / goal, MB/s", ends.size / 1e6 / encode, FAST, ">= 1"),
        (f"{name}: the server decodes / goal, MB/s", ends.size / 1e6 / decode, FAST, ">= 1"),
        (f"{preset}: encodes {ends.size / 4e6:.1f} M numbers / goal, s", encode, 1.0, "<= 1"),
    ]


class OneForAll(Spool):
    """Every client's answer is Ann's, read from the disk each time; its digest, which lies beside it, too."""

    def get(self, client: str, digest: str) -> Envelope:
        return super().get(ANN.id, (self._folder / "digest").read_text())

    def put(self, client: str, envelope: Envelope) -> str:
        digest = super().put(client, envelope)
        (self._folder / "digest").write_text(digest)
        return digest


def spool(preset: str, folder: str, modules: int = MODULES) -> None:
    ends = Ends(preset, modules)
    header, came = ends.asked(0)
    OneForAll(Path(folder)).put(ANN.id, ends.client.answer(ends.trained(), came, ANN, header))


def fold(preset: str, folder: str, modules: int = MODULES) -> tuple[int, int]:
    """Bytes: beyond what was there before, and of one decoded answer."""
    ends = Ends(preset, modules)
    ends.asked(0)
    mean_of(ends, folder, 1)  # what is loaded or made once is there
    return peak_beyond(lambda: mean_of(ends, folder, ANSWERS)), ends.size


def mean_of(ends: Ends, folder: str, count: int) -> Payload:
    weights = {str(number): 1.0 for number in range(count)}
    answers = OneForAll(Path(folder)), dict.fromkeys(weights, ""), weights, Fold.SUM
    return SpooledAnswers(*answers, lambda _, envelope: ends.read(envelope)).mean()


def peak_beyond(work: Callable[[], Any]) -> int:
    """Bytes of resident memory at the peak, beyond what is there before. Linux counts them for each process."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system: else it would be used again, and not be seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is there now
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    (kilobytes,) = re.findall(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024
