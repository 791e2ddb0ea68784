"""common: the sum of the clients' integers is the sum of their updates."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import JobError
from fedtune.wire.common import CHUNK, Common
from fedtune.wire.stage import Array, Draw, Form
from fedtune.wire.stages import stage_from

DRAW = Draw(7, "t")
MOST = np.finfo(np.float32).max
settings = st.builds(Common, st.integers(2, 16), st.sampled_from([1e-30, 1e-3, 0.01, 0.3, 1.0, 17.0, 1e30]))


def back(stage: Common, x: Array, draw: Draw = DRAW) -> Array:
    return stage.decode(*stage.encode(x, draw), Form(x.shape), draw)


def normal(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


@given(stage=settings)
def test_the_step_spans_the_clip_with_eight_bits(stage: Common) -> None:
    exact = Fraction(stage.clip) / stage.most
    assert exact * (1 - Fraction(1, 2**23)) <= Fraction(stage.step) <= exact * (1 + Fraction(1, 2**7))
    numerator, denominator = Fraction(stage.step).as_integer_ratio()
    odd = numerator if denominator > 1 else numerator // (numerator & -numerator)
    assert odd < 2**8


@given(stage=settings, count=st.integers(0, 300), seed=st.integers(0, 99), exponent=st.integers(-30, 30))
def test_error_is_a_bound(stage: Common, count: int, seed: int, exponent: int) -> None:
    x = (normal(count, seed) * np.float32(10.0) ** np.float32(exponent)).clip(-MOST, MOST)
    assert np.linalg.norm(back(stage, x).astype(np.float64) - x) <= stage.error(x)


def test_the_bound_is_near_what_happens_at_worst() -> None:
    """A number just above 0 is sometimes rounded up to a whole step; four of them, to twice that."""
    stage = Common(8, 1.0)
    off = back(stage, np.full(100_000, stage.step / 1000, np.float32)).max() - stage.step / 1000
    assert off == pytest.approx(stage.error(np.zeros(1, np.float32)), rel=2e-3)
    assert stage.error(np.zeros(4, np.float32)) == 2 * stage.step


def test_what_is_beyond_the_clip_is_cut() -> None:
    stage = Common(4, 0.07)  # step 0.01, with eight bits
    symbols, _ = stage.encode(np.array([1, -1, MOST, -MOST, 0], np.float32), DRAW)
    assert symbols.tolist() == [7, -7, 7, -7, 0]


@given(stage=settings, clients=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_sum_of_integers_is_the_sum_of_what_they_mean(stage: Common, clients: int, seed: int) -> None:
    """In fractions, which round nothing; with one mask for each client that goes out in the sum, as in secure aggregation."""
    rng = np.random.default_rng(seed)
    updates = [(rng.standard_normal(5) * stage.clip).astype(np.float32) for _ in range(clients)]
    carriers = [stage.encode(x, Draw(seed, str(client)))[0] for client, x in enumerate(updates)]
    masks = rng.integers(0, stage.field(clients), (clients, 5))
    masked = [q.astype(np.int64) + mask for q, mask in zip(carriers, masks, strict=True)]
    there = stage.decoded_sum((stage.added(masked) - masks.sum(axis=0)) % stage.field(clients), clients)
    each = [stage.decode(q, {}, Form((5,)), DRAW) for q in carriers]
    assert [Fraction(float(value)) for value in there] == [sum(Fraction(float(x[i])) for x in each) for i in range(5)]


@pytest.mark.parametrize("clients", [1, 2, 1024])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_the_field_is_large_enough_for_the_worst_sums(bits: int, clients: int) -> None:
    """All clients at one end: m (2^(b-1) - 1) on either side of 0, which m (2^b - 1) + 1 integers tell apart."""
    stage = Common(bits, 1.0)
    assert stage.field(clients) == clients * (2**bits - 1) + 1
    for end in (stage.most, -stage.most):
        sums = stage.added([np.array([end])] * clients)
        assert 0 <= sums[0] < stage.field(clients)
        assert stage.decoded_sum(sums, clients).tolist() == [clients * end * stage.step]


@pytest.mark.parametrize("part", [-0.93, -0.2, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_the_mean_is_right_within_the_clip(bits: int, part: float) -> None:
    """The mean of 200,000 draws lies within five standard errors, and half a unit of the dither."""
    stage = Common(bits, 0.5)
    x = np.full(200_000, part * 0.5, np.float32)
    drawn = back(stage, x).astype(np.float64) / stage.step
    exact = float(x[0]) / stage.step
    error = (exact % 1 * (1 - exact % 1) / x.size) ** 0.5
    assert abs(drawn.mean() - exact) <= 5 * error + 2.0**-16


def test_it_is_not_said_to_be_unbiased() -> None:
    """Beyond the clip it is not, and a codec that counts on it would not know."""
    assert not Common.unbiased
    assert back(Common(8, 0.01), np.full(4, 0.5, np.float32)).max() < 0.0101


GOLDEN = {  # of twelve numbers that fall by half, every third of them negative
    2: [-1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0],
    8: [-126, 66, 36, -19, 10, 5, -3, 2, 1, -1, 1, 0],
    16: [-32514, 17273, 9145, -4826, 2541, 1334, -698, 365, 191, -100, 52, 27],
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_the_same_bits_on_every_machine(bits: int) -> None:
    x = np.array([2.0**-i * (1 + i / 16) * (-1 if i % 3 == 0 else 1) for i in range(12)], np.float32)
    symbols, _ = Common(bits, 1.0).encode(x, Draw(2024, "layer.lora_B", 1))
    assert symbols.tolist() == GOLDEN[bits]


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(CHUNK + 100)
    streams = []
    for chunk in (CHUNK, 16, 4096):
        monkeypatch.setattr("fedtune.wire.common.CHUNK", chunk)
        streams.append(Common(8, 1.0).encode(x, DRAW)[0].tobytes())
    assert len(set(streams)) == 1


@pytest.mark.parametrize("given", ["1", "17", "clip=0", "clip=-1", "clip=inf", "clip=nan", "x"])
def test_settings_that_cannot_be(given: str) -> None:
    with pytest.raises(JobError, match=r"stage 'common', setting '(bits|clip)'"):
        stage_from("common", [given])
