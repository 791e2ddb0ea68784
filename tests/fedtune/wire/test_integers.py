"""int8, int4, int2: the same bits everywhere, the mean is right, no number is farther off than promised."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import JobError, MalformedMessage
from fedtune.wire import integers
from fedtune.wire.integers import LARGEST, LEAST, Int2, Int4, Int8
from fedtune.wire.stage import Array, Draw, Form
from fedtune.wire.stages import stage_from

STAGES = [cls(rounding=rounding) for cls in (Int8, Int4, Int2) for rounding in ("stochastic", "nearest")]
DRAW = Draw(7, "a.lora_A")
MOST = np.finfo(np.float32).max
each_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage.name}-{stage.rounding}")


def back(stage: integers._Integers, x: Array, draw: Draw = DRAW) -> Array:
    symbols, sides = stage.encode(x, draw)
    return stage.decode(symbols, sides, Form(x.shape), draw)


def normal(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """Of up to three blocks and any magnitude, a few numbers far larger, some 0."""
    count = draw(st.integers(0, 600))
    x = normal(count, draw(st.integers(0, 99))) ** draw(st.sampled_from([1, 5, 9]))
    x[: draw(st.integers(0, count))] *= draw(st.sampled_from([0, 1, 1e-6]))
    return (x * np.float32(10.0) ** draw(st.integers(-30, 30))).clip(-MOST, MOST)


@each_stage
@given(x=arrays(), key=st.integers(0, 2**32))
def test_error_is_a_bound(stage: integers._Integers, x: Array, key: int) -> None:
    off = back(stage, x, Draw(key, "t")).astype(np.float64) - x
    assert np.linalg.norm(off) <= stage.error(x)


@each_stage
def test_the_bound_is_near_what_happens_at_worst(stage: integers._Integers) -> None:
    """Half a step away from every multiple, or all but a step: nothing can be farther off."""
    away = 0.5 if stage.rounding == "nearest" else 1.0
    x = np.full(4096, 0.5 / stage.most, np.float32)  # between 0 and one step
    x[::256] = 1  # the scale of every block
    off = np.abs(back(stage, x) - x).reshape(-1, 256)[:, 1:]
    assert off.max() == pytest.approx(0.5 / stage.most)
    assert stage.error(x) == pytest.approx(64 * away / stage.most, rel=2e-3)  # 64 = sqrt(4096)


@each_stage
def test_whole_multiples_of_the_step_come_back_as_they_were(stage: integers._Integers) -> None:
    x = (np.arange(-stage.most, stage.most + 1) / np.float32(stage.most)).astype(np.float32)  # the scale is 1
    symbols, _ = stage.encode(x, DRAW)
    assert symbols.tolist() == list(range(-stage.most, stage.most + 1))


@pytest.mark.parametrize("cls", [Int8, Int4, Int2])
@pytest.mark.parametrize("part", [-0.9, -0.5, -0.013, 0.001, 0.3, 0.7501])
def test_the_mean_is_right(cls: type[integers._Integers], part: float) -> None:
    """One number in 400,000 places: the mean of as many draws, each off by half a step at most as standard deviation, lies
    within five standard errors; half a unit of the dither comes on top."""
    stage, n = cls(), 400_000
    x = np.full(n, part, np.float32)
    x[::256] = 1
    drawn = np.delete(back(stage, x), np.s_[::256])
    step = 1 / stage.most
    place = (part / step) % 1
    error = step * (place * (1 - place) / drawn.size) ** 0.5
    assert abs(drawn.mean(dtype=np.float64) - part) <= 5 * error + step * 256.0**-stage.dither / 2 + 1e-9


def test_nearest_is_not_unbiased_and_stochastic_is() -> None:
    assert [stage.unbiased for stage in STAGES] == [True, False] * 3


def test_neighbouring_draws_do_not_go_together() -> None:
    """The dither of one value says nothing about the next, nor about the same place of another tensor."""
    x = np.full(2**16, 0.5, np.float32)
    x[::256] = 1
    ups = [back(Int4(), x, Draw(7, name)) > 0.5 for name in ("a", "b")]
    flips = np.stack([*ups, np.roll(ups[0], 1), np.roll(ups[0], 256)])[:, np.arange(2**16) % 256 > 1]
    together = np.corrcoef(flips) - np.eye(4)
    assert np.abs(together).max() < 5 / 2**8  # five standard errors


GOLDEN = {  # of twelve numbers that fall by half, every third of them negative; the scale is 1
    ("int8", "stochastic"): [-127, 67, 35, -19, 10, 6, -3, 1, 1, 0, 0, 0],
    ("int4", "stochastic"): [-7, 3, 2, -1, 1, 1, 0, 0, 0, 0, 0, 0],
    ("int2", "stochastic"): [-1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0],
    ("int8", "nearest"): [-127, 67, 36, -19, 10, 5, -3, 1, 1, 0, 0, 0],
    ("int4", "nearest"): [-7, 4, 2, -1, 1, 0, 0, 0, 0, 0, 0, 0],
    ("int2", "nearest"): [-1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
}
SUMS = {"int8": (0x5A04AD6C, 0xBED439A6), "int4": (0x3F4E6933, 0xBED439A6), "int2": (0xF88FE8EF, 0xBED439A6)}  # CRC-32


@each_stage
def test_the_same_bits_on_every_machine(stage: integers._Integers) -> None:
    x = np.array([2.0**-i * (1 + i / 16) * (-1 if i % 3 == 0 else 1) for i in range(12)], np.float32)
    symbols, sides = stage.encode(x, Draw(2024, "layer.lora_B", 1))
    assert (symbols.tolist(), sides["scales"].tolist()) == (GOLDEN[stage.name, stage.rounding], [0x3F80])


@pytest.mark.parametrize("name", SUMS)
def test_the_same_bits_of_many_numbers(name: str) -> None:
    """Over several chunks: 300,000 numbers in no order, exact in float32 wherever they are computed."""
    i = np.arange(300_000)
    x = np.ldexp((i * 7919 % 65536 - 32768).astype(np.float32), -15 - i // 256 % 7)
    symbols, sides = stage_from(name, []).encode(x, Draw(2024, "layer.lora_B", 1))
    assert (zlib.crc32(symbols), zlib.crc32(sides["scales"])) == SUMS[name]


@each_stage
@pytest.mark.parametrize("block", [8, 9, 100, 256, 65536])
def test_chunks_do_not_show(stage: integers._Integers, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, x = type(stage)(block, stage.rounding), normal(200_001)
    streams = []
    for chunk in (integers.CHUNK, 1, 5000):
        monkeypatch.setattr(integers, "CHUNK", chunk)
        symbols, sides = stage.encode(x, DRAW)
        streams.append(
            (symbols.tobytes(), sides["scales"].tobytes(), stage.decode(symbols, sides, Form(x.shape), DRAW).tobytes())
        )
    assert len(set(streams)) == 1


def test_threads_do_not_show() -> None:
    x, before = normal(300_000), torch.get_num_threads()
    try:
        bits = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            bits.append(back(Int4(), x).tobytes())
    finally:
        torch.set_num_threads(before)
    assert bits[0] == bits[1]


@each_stage
def test_scales_are_rounded_up(stage: integers._Integers) -> None:
    x = normal(100 * 256)
    scales = integers._floats(stage.encode(x, DRAW)[1]["scales"])
    largest = np.abs(x).reshape(-1, 256).max(axis=1)
    assert (scales >= largest).all()
    assert (scales <= largest * (1 + 2**-7)).all()


@each_stage
def test_zeros_stay_zeros_beside_other_blocks(stage: integers._Integers) -> None:
    x = np.concatenate([np.zeros(256, np.float32), normal(256), np.zeros(100, np.float32)])
    there = back(stage, x)
    assert not there[:256].any()
    assert not there[512:].any()
    assert there[256:512].any()


@each_stage
@pytest.mark.parametrize("size", [1e-45, 1e-40, 2.0**-126, 2.0**-100])
def test_the_smallest_numbers_are_as_good_as_zero(stage: integers._Integers, size: float) -> None:
    """Their scale is 2^-100: off by at most a step of that."""
    x = np.full(300, -size, np.float32)
    symbols, sides = stage.encode(x, DRAW)
    assert (sides["scales"] == LEAST).all()
    assert np.abs(stage.decode(symbols, sides, Form((300,)), DRAW) - x).max() <= 2.0**-100 / stage.most


@each_stage
def test_the_largest_numbers_stay_finite(stage: integers._Integers) -> None:
    x = np.array([MOST, -MOST, MOST / 2, 0, -1], np.float32)
    symbols, sides = stage.encode(x, DRAW)
    assert sides["scales"].tolist() == [LARGEST]
    assert symbols[:2].tolist() == [stage.most, -stage.most]
    assert stage.decode(symbols, sides, Form((5,)), DRAW)[0] == pytest.approx(float(MOST), rel=2**-7)
    assert MOST - back(stage, x[:1])[0] <= stage.error(x[:1])


@each_stage
def test_how_numbers_lie_in_memory_does_not_show(stage: integers._Integers) -> None:
    x = normal(64 * 48).reshape(64, 48)
    for same in (np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x[::-1][::-1]):
        assert stage.encode(same, DRAW)[0].tobytes() == stage.encode(x, DRAW)[0].tobytes()


@pytest.mark.parametrize("word", [LARGEST + 1, 0x7FC0, 0x8000, 0xBF80, 0xFFFF])
def test_a_scale_that_is_none_is_refused(word: int) -> None:
    """Infinity, not a number, -0, -1, and the last."""
    with pytest.raises(MalformedMessage, match="a scale is negative or not finite"):
        Int8().decode(np.zeros(300, np.int8), {"scales": np.array([0x3F80, word], np.uint16)}, Form((300,)), DRAW)


@pytest.mark.parametrize("given", ["7", "65537", "x", "rounding=up", "block=3.5"])
def test_settings_that_cannot_be(given: str) -> None:
    with pytest.raises(JobError, match=r"stage 'int4', setting '(block|rounding)'"):
        stage_from("int4", [given])


def test_settings() -> None:
    assert stage_from("int4", ["rounding=nearest"]) == Int4(256, "nearest")
    assert stage_from("int2", ["64"]) == Int2(64, "stochastic")
