"""`uniform`: derived numbers, the error, the mean, the rate, the same bits everywhere, and streams that nobody encoded."""

from __future__ import annotations

import math
import zlib
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import JobError, MalformedMessage
from fedtune.wire import uniform
from fedtune.wire.codec import codec_from
from fedtune.wire.stage import Array, Draw, Form
from fedtune.wire.stages import stage_from
from fedtune.wire.streams import written
from fedtune.wire.uniform import LEAST, Uniform

STAGES = [Uniform(step, dither) for step in (0.02, 0.7, 2, 16) for dither in (False, True)]
DRAW = Draw(7, "a.lora_A")
MOST = np.finfo(np.float32).max
each_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage.step}-{'dither' if stage.dither else 'plain'}")


def back(stage: Uniform, x: Array, draw: Draw = DRAW) -> Array:
    symbols, sides = stage.encode(x, draw)
    return stage.decode(symbols, sides, Form(x.shape), draw)


def normal(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def sent(stage: Uniform, x: Array) -> tuple[list[int], float, float]:
    """Symbols, step and centre."""
    symbols, sides = stage.encode(x, DRAW)
    step, centre = sides["step"].view(np.float32)
    return symbols.tolist(), float(step), float(centre)


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """Of any magnitude, a few numbers far larger, some 0."""
    count = draw(st.integers(0, 400))
    x = normal(count, draw(st.integers(0, 99))) ** draw(st.sampled_from([1, 5, 9]))
    x[: draw(st.integers(0, count))] *= draw(st.sampled_from([0, 1, 1e-6]))
    return (x.astype(np.float64) * 10.0 ** draw(st.integers(-48, 38))).clip(-MOST, MOST).astype(np.float32)


def test_by_hand() -> None:
    """rms = sqrt((9 + 7) / 8) = sqrt(2), half of it is 0.7071: 3 is 4.24 steps, and 1 is 1.41. All lie farther out than the
    middles of their steps, and the centre is never there."""
    symbols, step, centre = sent(Uniform(0.5), np.array([3, -1, 1, 1, -1, 1, -1, 1], np.float32))
    assert (symbols, step, centre) == ([4, -1, 1, 1, -1, 1, -1, 1], float(np.float32(0.5 * math.sqrt(2))), 0)


def test_the_centre_by_hand() -> None:
    """rms = sqrt(4 * 4 / 16) = 1: 2 is 1.6 steps of 1.25, so 0.4 closer to 0 than the middle, 2; 0.4 * 256 = 102.4."""
    x = np.array([2, 0, 0, 0, -2, 0, 0, 0] * 2, np.float32)
    assert sent(Uniform(1.25), x) == ([2, 0, 0, 0, -2, 0, 0, 0] * 2, 1.25, 102 / 256)
    assert back(Uniform(1.25), x)[:5].tolist() == [(2 - 102 / 256) * 1.25, 0, 0, 0, -(2 - 102 / 256) * 1.25]


@each_stage
def test_one_number_far_out_makes_the_step_wider(stage: Uniform) -> None:
    """rms = 100 / sqrt(10^6) = 0.1, of which 7 steps of the widest setting are below 100 / 126 = 0.79 (16 * 0.1 = 1.6)."""
    x = np.zeros(10**6, np.float32)
    x[3] = -100
    symbols, step, _ = sent(stage, x)
    assert step == float(np.float32(max(stage.step * 0.1, 100 / 126)))
    assert abs(symbols[3] - -100 / step) <= 0.51 + 0.5 * stage.dither


@each_stage
@given(x=arrays(), key=st.integers(0, 2**32))
def test_error_is_a_bound(stage: Uniform, x: Array, key: int) -> None:
    off = back(stage, x, Draw(key, "t")).astype(np.float64) - x
    assert np.linalg.norm(off) <= stage.error(x)


@each_stage
@given(x=arrays())
def test_symbols_are_in_their_range(stage: Uniform, x: Array) -> None:
    symbols, sides = stage.encode(x, DRAW)
    assert symbols.size == 0 or np.abs(symbols.astype(np.int64)).max() <= 127
    assert (np.abs(back(stage, x).astype(np.float64) - x) <= sides["step"].view(np.float32)[0].astype(np.float64) * 1.01).all()


def test_both_ends_of_the_range_are_used_with_dither() -> None:
    """The largest number is 126 steps, and half a step more or less is added: 126 or 127 comes, and nothing else."""
    x = np.zeros(10**5, np.float32)
    x[::1000] = 1
    x[1::1000] = -1
    symbols, _ = Uniform(0.02, True).encode(x, DRAW)
    assert set(np.abs(symbols[x != 0]).tolist()) <= {125, 126, 127}


@pytest.mark.parametrize("step", [0.3, 1.0, 2.0])
def test_the_mean_is_right_with_dither(step: float) -> None:
    """What is lost of each number is uniform in half a step to both sides, whatever the number is: its variance is
    step^2 / 12, and its correlation with the number 0. Five standard errors."""
    n, stage = 400_000, Uniform(step, True)
    x = normal(n)
    off = back(stage, x).astype(np.float64) - x
    width = sent(stage, x)[1]
    assert abs(off.mean()) <= 5 * width / math.sqrt(12 * n)
    assert abs((off * x).mean()) <= 5 * width / math.sqrt(12 * n)
    assert off.var() == pytest.approx(width**2 / 12, rel=5 / math.sqrt(n))
    for inside in (np.abs(x) < 0.1, x > 1.5):  # not only over all
        assert abs(off[inside].mean()) <= 5 * width / math.sqrt(12 * inside.sum())


def test_only_dither_is_unbiased() -> None:
    assert [stage.unbiased for stage in STAGES] == [False, True] * 4
    off = back(Uniform(2), normal(10**5)).astype(np.float64) - normal(10**5)
    assert abs((off * normal(10**5)).mean()) > 0.1  # a quarter of the energy is not sent


@pytest.mark.parametrize("step", [0.7, 1.5, 2.0])
def test_the_centre_is_where_the_squared_error_is_least(step: float) -> None:
    """Of all 129 that can be sent, tried one by one."""
    x = normal(50_000) ** 3
    symbols, width, centre = sent(Uniform(step), x)
    q = np.array(symbols, np.float64)
    losses = [np.square(np.sign(q) * (np.abs(q) - tried / 256) * width - x).sum() for tried in range(129)]
    assert 0 < centre == int(np.argmin(losses)) / 256


def in_theory(step: float) -> tuple[float, float]:
    """Bits and squared error of a standard normal number, from the shares of its steps and its means within them: those of
    one step, on both sides, are told apart from the others', but sent with one centre."""
    phi, share = NormalDist().pdf, NormalDist().cdf
    edges = [(q, (q - 0.5) * step, (q + 0.5) * step) for q in range(-200, 201)]
    shares = {q: share(high) - share(low) for q, low, high in edges}
    bits = -sum(p * math.log2(p) for p in shares.values() if p > 0)
    first = {q: phi(low) - phi(high) for q, low, high in edges}  # integral of x
    outer = 1 - shares[0]
    centre = sum(abs(q) * step * shares[q] - abs(first[q]) for q in shares if q) / outer / step
    sizes = {q: math.copysign(abs(q) - centre, q) * step if q else 0.0 for q in shares}
    return bits, 1 + sum(sizes[q] ** 2 * shares[q] - 2 * sizes[q] * first[q] for q in shares)


@pytest.mark.parametrize("step", [0.7, 1.0, 2.0])
def test_rate_and_error_are_those_of_the_theory(step: float) -> None:
    """Normal numbers; at 2 rms 1.25 bits each, and a quarter of the energy lost. Gish and Pierce: a fine step takes a quarter
    of a bit more than the least that any coder can, 1/2 log2 (1 / D); a wide one less more than that."""
    n = 400_000
    x, stage = normal(n), Uniform(step)
    symbols, sides = stage.encode(x, DRAW)
    bits = 8 * len(written(symbols, stage.carrier(Form((n,))), coded=True)) / n
    lost = np.square(stage.decode(symbols, sides, Form((n,)), DRAW).astype(np.float64) - x).mean()
    wanted_bits, wanted_loss = in_theory(step)
    assert bits == pytest.approx(wanted_bits, rel=0.005)
    assert lost == pytest.approx(wanted_loss, rel=0.02)
    assert 0 < wanted_bits - 0.5 * math.log2(1 / wanted_loss) < 0.27


def test_the_theory_at_two_rms() -> None:
    assert in_theory(2.0) == pytest.approx((1.25, 0.25), abs=0.01)


GOLDEN = {  # of twelve numbers that fall by half, every third of them negative: symbols, and the words of step and centre
    (0.7, True): ([-4, 2, 1, -1, 0, 0, 0, 0, 0, 0, 0, 0], [0x3E741D3B, 0]),
    (0.7, False): ([-4, 2, 1, -1, 0, 0, 0, 0, 0, 0, 0, 0], [0x3E741D3B, 0]),
    (2, False): ([-1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0x3F2E5E05, 0]),
}
SUMS = {  # of 300,000 numbers: CRC-32 of the symbols, the two words, and CRC-32 of what comes back
    (0.7, True): (0x76D3357D, [0x3E34EA93, 0], 0x41156FEB),
    (0.7, False): (0x3E276C79, [0x3E34EA93, 0x3D980000], 0xED01A4FA),
    (2, False): (0xC0C5071A, [0x3F0139D7, 0x3E1C0000], 0x0F175A16),
}


@pytest.mark.parametrize(("step", "dither"), GOLDEN)
def test_the_same_bits_on_every_machine(step: float, dither: bool) -> None:
    x = np.array([2.0**-i * (1 + i / 16) * (-1 if i % 3 == 0 else 1) for i in range(12)], np.float32)
    symbols, sides = Uniform(step, dither).encode(x, Draw(2024, "layer.lora_B", 1))
    assert (symbols.tolist(), sides["step"].tolist()) == GOLDEN[step, dither]


@pytest.mark.parametrize(("step", "dither"), SUMS)
def test_the_same_bits_of_many_numbers(step: float, dither: bool) -> None:
    """Over several pieces: in no order, exact in float32 wherever they are computed."""
    i = np.arange(300_000)
    x = np.ldexp((i * 7919 % 65536 - 32768).astype(np.float32), -15 - i // 256 % 7)
    stage, draw = Uniform(step, dither), Draw(2024, "layer.lora_B", 1)
    symbols, sides = stage.encode(x, draw)
    there = stage.decode(symbols, sides, Form(x.shape), draw)
    assert (zlib.crc32(symbols), sides["step"].tolist(), zlib.crc32(there)) == SUMS[step, dither]


@each_stage
def test_pieces_do_not_show(stage: Uniform, monkeypatch: pytest.MonkeyPatch) -> None:
    x, streams = normal(200_001) ** 3, set()
    for piece in (uniform.PIECE, 2**17, 16, 4800):
        monkeypatch.setattr(uniform, "PIECE", piece)
        symbols, sides = stage.encode(x[:20_001] if piece == 16 else x, DRAW)
        there = stage.decode(symbols, sides, Form(symbols.shape), DRAW)
        if piece != 16:
            streams.add((symbols.tobytes(), sides["step"].tobytes(), there.tobytes()))
    assert len(streams) == 1


@given(x=arrays(), seed=st.integers(0, 99))
def test_sums_are_the_same_in_any_order(x: Array, seed: int) -> None:
    """To the last bit of float64, not only of what is sent."""
    other = np.random.default_rng(seed).permutation(x)
    exponent = uniform.UNITS - math.frexp(float(np.abs(x).max(initial=0)))[1]
    assert uniform._squares(x, exponent) == uniform._squares(other, exponent)
    assert uniform._squares(x, exponent) == sum(round(float(one) * 2.0**exponent) ** 2 for one in x.tolist())
    steps = x / max(np.abs(x).max(initial=0) / 126, np.float32(LEAST))
    exact = sum((abs(round(s)) - abs(s)) * 2**24 for s in steps.tolist() if round(s))
    assert uniform._closer(steps.copy(), np.rint(steps)) == exact


@each_stage
@pytest.mark.parametrize("size", [1e-41, 1e-38, 1e-30, 1e30, 1e37])
def test_no_magnitude_is_less_exact(stage: Uniform, size: float) -> None:
    """What is lost is, relative to the numbers, what is lost at 1. Of 1e-41, float32 itself keeps but four digits."""
    x = normal(1000).clip(-3, 3)
    relative = [float(np.linalg.norm((back(stage, one).astype(np.float64) - one) / scale))
                for one, scale in ((x, 1), (x * np.float32(size), size))]  # fmt: skip
    assert relative[1] == pytest.approx(relative[0], rel=0.01)


@each_stage
@pytest.mark.parametrize("size", [1e-45, 1e-44, 1e-43])
def test_the_smallest_numbers_have_the_smallest_step(stage: Uniform, size: float) -> None:
    x = normal(1000) * np.float32(size)
    away = np.abs(back(stage, x).astype(np.float64) - x).max()
    assert away <= 0.51 * sent(stage, x)[1] * (1 if stage.dither else 1.5)  # the centre moves numbers beyond the half
    assert sent(stage, x)[1] == pytest.approx(
        max(LEAST, stage.step * np.sqrt(np.square(x.astype(np.float64)).mean())), rel=0.01
    )


@each_stage
def test_the_largest_numbers_stay_finite(stage: Uniform) -> None:
    x = np.array([MOST, -MOST, MOST / 2, 0, -1], np.float32)
    there = back(stage, x)
    assert np.isfinite(there).all()
    assert np.abs(there.astype(np.float64) - x).max() <= 1.01 * sent(stage, x)[1]


@each_stage
@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 4), (1000,), (70_000,)])
def test_zeros_come_back_as_zeros(stage: Uniform, shape: tuple[int, ...]) -> None:
    symbols, sides = stage.encode(np.zeros(shape, np.float32), DRAW)
    assert not symbols.any()
    assert sides["step"].tolist() == [0, 0]
    assert stage.decode(symbols, sides, Form(shape), DRAW).tobytes() == bytes(4 * math.prod(shape))
    assert stage.error(np.zeros(shape, np.float32)) == 0


def test_one_number_comes_back() -> None:
    """Its rms is its size, but for the 18 bits in which squares are added: it is one step of 1, and 1.43 steps of 0.7."""
    assert back(Uniform(1.0), np.array([-0.3], np.float32)).tolist() == [pytest.approx(-0.3, rel=2**-17)]
    assert back(Uniform(0.7), np.array([-0.3], np.float32)).tolist() == [pytest.approx(-0.21, rel=2**-17)]


@each_stage
def test_how_numbers_lie_in_memory_does_not_show(stage: Uniform) -> None:
    x = normal(64 * 48).reshape(64, 48)
    for same in (np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x[::-1][::-1]):
        assert stage.encode(same, DRAW)[0].tobytes() == stage.encode(x, DRAW)[0].tobytes()
        assert stage.error(same) == stage.error(x)


@pytest.mark.parametrize("step", [-1.0, -1e-45, math.nan, math.inf, -math.inf])
def test_a_step_that_is_none_is_refused(step: float) -> None:
    with pytest.raises(MalformedMessage, match=r"a step is .*, wanted a finite number from 0 on"):
        decoded(step, 0)


@pytest.mark.parametrize("centre", [-0.25, 0.5001, math.nan, math.inf])
def test_a_centre_that_is_none_is_refused(centre: float) -> None:
    with pytest.raises(MalformedMessage, match=r"a step's centre is .*, wanted 0 to 0.5"):
        decoded(1, centre)


@pytest.mark.parametrize("dither", [False, True])
@pytest.mark.parametrize("step", [0, 1e-45, 1, float(MOST)])
def test_a_step_that_could_be_gives_finite_numbers(step: float, dither: bool) -> None:
    assert np.isfinite(decoded(step, 0.5, dither)).all()


def decoded(step: float, centre: float, dither: bool = False) -> Array:
    words = np.array([step, centre], np.float32).view(np.uint32)
    return Uniform(1.0, dither).decode(np.arange(-127, 128, dtype=np.int8), {"step": words}, Form((255,)), DRAW)


@pytest.mark.parametrize("given", ["0", "-1", "17", "nan", "x", "dither=2"])
def test_settings_that_cannot_be(given: str) -> None:
    with pytest.raises(JobError, match=r"stage 'uniform', setting '(step|dither)'"):
        stage_from("uniform", [given])


def test_settings() -> None:
    assert codec_from("uniform(0.7, dither=true) | entropy").stages == (Uniform(0.7, True),)
    assert stage_from("uniform", []) == Uniform(1.0, False)
