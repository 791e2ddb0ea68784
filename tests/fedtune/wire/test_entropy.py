"""Coded streams: as many bits as their entropy says, the table included; the same bytes on every machine."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from fedtune.wire.entropy import coded, decoded
from fedtune.wire.slices import PIECE
from fedtune.wire.stage import Array, Form, Kind
from fedtune.wire.streams import read, written

WORD = 2**32 - 1


def entropy(values: Array) -> float:
    """Bits of all values together, where each is as likely as it is frequent here."""
    counts = np.unique(values, return_counts=True)[1]
    return float(counts @ np.log2(values.size / counts))


def bits_of(values: Array, form: Form) -> int:
    """Measured, after the way back."""
    data = written(values, form, coded=True)
    assert np.array_equal(read(data, form, coded=True), values)
    return 8 * len(data)


def integers(most: int, count: int) -> tuple[Array, Form]:
    """Normal numbers, a scale for each 256, as an int8, int4 or int2 codec makes them."""
    rng = np.random.default_rng(most)
    blocks = rng.normal(size=(-(-count // 256), 256))
    blocks *= most / np.abs(blocks).max(axis=1, keepdims=True)
    values = np.floor(blocks + rng.random(blocks.shape)).clip(-most, most).astype(np.int8)
    return values.reshape(-1)[:count], Form((count,), Kind.SYMBOLS, -most, most)


@pytest.mark.parametrize("count", [10_000, 144_000])
@pytest.mark.parametrize("most", [127, 7, 1])
def test_integers_take_their_entropy(most: int, count: int) -> None:
    values, form = integers(most, count)
    assert bits_of(values, form) <= 1.03 * entropy(values)


@pytest.mark.parametrize("count", [10_000, 144_000])
@pytest.mark.parametrize("share", [0.5, 0.3, 0.04])
def test_signs_take_their_entropy(share: float, count: int) -> None:
    values = (np.random.default_rng(0).random(count) < share).astype(np.uint8)
    assert bits_of(values, Form((count,), Kind.SYMBOLS, 0, 1)) <= 1.03 * entropy(values)


@pytest.mark.parametrize(
    ("count", "density", "most"),
    [
        (144_000, 0.01, 1.03),
        (144_000, 0.1, 1.03),
        (144_000, 0.5, 1.03),
        (10_000, 0.01, 1.12),  # a hundred gaps in a hundred bytes: the table is ten
        (10_000, 0.1, 1.03),
        (10_000, 0.5, 1.03),
    ],
)
def test_gaps_take_what_says_which_are_kept(count: int, density: float, most: float) -> None:
    """n H(k / n) bits: any k of n are as likely."""
    kept = np.flatnonzero(np.random.default_rng(0).random(count) < density)
    gaps = (np.diff(kept, prepend=-1) - 1).astype(np.uint32)
    p = kept.size / count
    wanted = count * (p * math.log2(1 / p) + (1 - p) * math.log2(1 / (1 - p)))
    assert bits_of(gaps, Form((kept.size,), Kind.GAPS, 0, WORD)) <= most * wanted


def test_gaps_of_all_sizes_are_coded_together() -> None:
    """Most are 0, some are far: a share of 0.1, and 20 bits each."""
    rng = np.random.default_rng(0)
    far = rng.random(50_000) < 0.1
    gaps = np.where(far, rng.integers(2**20, 2**21, far.size), 0).astype(np.uint32)
    wanted = far.size * (0.1 * math.log2(10) + 0.9 * math.log2(1 / 0.9)) + 20 * far.sum()
    assert bits_of(gaps, Form((far.size,), Kind.GAPS, 0, WORD)) <= 1.03 * wanted


def test_of_floats_the_exponents_are_coded() -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    wanted = entropy(np.frexp(values)[1]) + 24 * values.size  # sign and mantissa as they are
    assert bits_of(values.view(np.uint32), Form(values.shape, Kind.WORDS, 0, WORD)) <= 1.005 * wanted
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    assert bits_of(halves, Form(values.shape, Kind.WORDS, 0, 2**16 - 1)) <= 1.03 * entropy(halves)


def test_floats_of_fewer_digits_cost_no_more_than_their_digits() -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    assert bits_of(values, Form(values.shape, Kind.WORDS, 0, WORD)) <= 1.03 * entropy(values)


def test_small_differences_of_words_are_numbers() -> None:
    values = np.random.default_rng(0).geometric(0.001, 100_000).astype(np.uint32)
    wanted = values.size * (math.log2(1000) + 999 * math.log2(1000 / 999))
    assert bits_of(values, Form(values.shape, Kind.WORDS, 0, WORD)) <= 1.01 * wanted


def test_large_numbers_of_both_signs() -> None:
    values = np.rint(np.random.default_rng(0).normal(0, 1000, 100_000)).astype(np.int16)
    wanted = values.size * math.log2(1000 * math.sqrt(2 * math.pi * math.e))  # of a normal number, in steps of one
    assert bits_of(values, Form(values.shape, Kind.SYMBOLS, -32767, 32767)) <= 1.01 * wanted


@pytest.mark.parametrize("count", [1, 1000, 10**6])
@pytest.mark.parametrize(
    "form", [Form((1,), Kind.SYMBOLS, -7, 7), Form((1,), Kind.GAPS, 0, 10**6), Form((1,), Kind.WORDS, 0, WORD)]
)
def test_what_is_always_the_same_costs_a_few_bytes(form: Form, count: int) -> None:
    values = np.full(count, 5, form.dtype)
    form = Form((count,), form.kind, form.low, form.high)
    assert len(coded(values, form)) <= 8
    assert np.array_equal(decoded(coded(values, form), form), values)


def powers(count: int, modulus: int = 2**31 - 1) -> Array:
    """Numbers that every machine makes alike."""
    row = [1]
    for _ in range(count - 1):
        row.append(row[-1] * 48271 % modulus)
    return np.array(row, np.int64)


GOLDEN = {
    "symbols": (Form((40_000,), Kind.SYMBOLS, -15, 15), "38590515b82c9f21"),
    "gaps": (Form((40_000,), Kind.GAPS, 0, 2**31), "a977de6d9f9cd4de"),
    "wide": (Form((40_000,), Kind.SYMBOLS, -(2**20), 2**20), "8decd2bef5991d65"),
    "words": (Form((40_000,), Kind.WORDS, 0, WORD), "2f9c4761093dd9e0"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    """The format: a change of it, here or in the library, needs another version of the message."""
    form, digest = GOLDEN[name]
    numbers = powers(40_000)
    values = {
        "symbols": (numbers[:, None] >> np.arange(31) & 1).sum(axis=1) - 15,
        "gaps": numbers >> (numbers & 31),
        "wide": (numbers >> (11 + numbers % 7)) * np.where(numbers & 64, 1, -1),
        "words": (numbers % 5 + 118 << 23) + (numbers >> 8),
    }[name]
    assert form.count > 2 * PIECE
    data = coded(values.astype(form.dtype), form)
    assert hashlib.sha256(data).hexdigest()[:16] == digest
    assert np.array_equal(decoded(data, form), values)


def test_golden_of_a_few() -> None:
    form = Form((12,), Kind.SYMBOLS, -7, 7)
    assert coded(np.array([0, 0, 1, 0, -1, 0, 0, 0, 2, 0, 0, 0], np.int8), form).hex() == "0a4e22743828390f40"
