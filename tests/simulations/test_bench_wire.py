"""The bench of the wire moves what it says, and counts what is allocated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.wire.presets import PRESETS
from fedtune.wire.stages import stage_from
from simulations import bench_wire
from simulations.bench import MEASURED
from simulations.bench_wire import ANN, MODULES, RANK, SHAPE, WIDTH, Ends, mean_of, peak_beyond, rounds, spool

LOST = {"plain": 0.0, "lossless": 0.0, "balanced": 0.36 * 1e-3, "tiny": 2 * 1e-3}  # at most: half a step, or one, of 1e-3


def test_all_are_in_the_table() -> None:
    assert {"wire_stages", "wire_presets", "wire_memory"} <= MEASURED.keys()


def test_as_many_numbers_as_the_adapter_of_a_large_model_has() -> None:
    """q and v of 32 layers, 4096 x 4096, rank 16: 32 * 2 * (16 * 4096 + 4096 * 16) = 8.4 M."""
    assert MODULES * 2 * RANK * WIDTH == SHAPE[0] * SHAPE[1] == 8_388_608
    ends = Ends("plain", modules=2)
    assert ends.size == 4 * 2 * 2 * RANK * WIDTH
    assert [tuple(tensor.shape) for tensor in ends.start.tensors.values()] == [(RANK, WIDTH), (WIDTH, RANK)] * 2


@pytest.mark.parametrize("preset", PRESETS)
def test_the_server_gets_what_the_client_trained(preset: str) -> None:
    """The first time, when nothing waits to be sent. An update has a standard deviation of 1e-3, the weights one of 1e-2."""
    ends = Ends(preset, modules=1)
    header, came = ends.asked(0)
    trained = ends.trained()
    answer = ends.read(ends.client.answer(trained, came, ANN, header))
    for name, tensor in trained.payload.tensors.items():
        assert float((tensor - ends.start.tensors[name]).std()) == pytest.approx(1e-3, rel=0.02)
        assert float((answer.payload.tensors[name] - tensor).abs().max()) <= LOST[preset] * 1.02


def test_rates_of_a_preset() -> None:
    (_, encode, goal, _), (_, decode, _, _), (_, seconds, _, _) = rounds("balanced", modules=1)
    assert goal == 50
    assert encode == pytest.approx(4 * 2 * RANK * WIDTH / 1e6 / seconds)
    assert decode > 0


def test_the_mean_of_copies_is_the_copy(tmp_path: Path) -> None:
    spool("balanced", str(tmp_path), modules=1)
    ends = Ends("balanced", modules=1)
    ends.asked(0)
    once, often = (mean_of(ends, str(tmp_path), count) for count in (1, 4))
    assert all(torch.equal(once.tensors[name], often.tensors[name]) for name in ends.start.tensors)


@pytest.mark.parametrize("make", [np.ones, torch.ones], ids=["numpy", "torch"])
def test_the_peak_is_what_was_there_at_a_time(make: object) -> None:
    """Float64 or float32 of 64 MB, and then of 96: not both."""

    def work() -> None:
        for megabytes in (64, 96):
            assert callable(make)
            make(megabytes * 2**17 if make is np.ones else megabytes * 2**18)

    assert peak_beyond(work) == pytest.approx(96 * 2**20, rel=0.1)


def test_the_entropy_coder_is_behind_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_wire, "REPEATS", 1)
    x = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    rows = bench_wire._coded("int4", stage_from("int4", ()), x)
    assert [name for name, *_ in rows] == [f"int4, its entropy: {way} / copy, MB/s" for way in ("encode", "decode")]
    assert all(figure > 0 for _, figure, *_ in rows)
