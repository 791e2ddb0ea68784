"""The noise is Philox4x64-10 as published, and any piece of any stream comes out the same however it is asked for."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune import noise
from fedtune.noise import BLOCK, Purpose, noise_bytes, normal_steps, tensor_key

Words = tuple[int, ...]
WORD = 2**64 - 1

# kat_vectors of Random123 (Salmon et al.): counter, key, result; the third are digits of pi
PUBLISHED = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)),
    "ones": ((WORD,) * 4, (WORD,) * 2, (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0)),
    "pi": (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
}

keys = st.integers(-(2**63), 2**63)
names = st.text(max_size=20)
purposes = st.sampled_from(Purpose)
streams = st.integers(0, 3) | st.integers(0, 2**64 - 1)
blocks = st.integers(0, 3) | st.integers(0, 2**40)


def philox(counter: Words, key: Words) -> Words:
    """Philox4x64-10 from its definition, in integers of any size."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        one, two = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = two >> 64 ^ c1 ^ k0, two & WORD, one >> 64 ^ c3 ^ k1, one & WORD
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & WORD, k1 + 0xBB67AE8584CAA73B & WORD
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "result"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_vectors(counter: Words, key: Words, result: Words) -> None:
    assert philox(counter, key) == result
    number = sum(word << 64 * place for place, word in enumerate(counter))
    assert tuple(noise._philox.at((key[0], key[1]), number, 4).tolist()) == result


@given(keys, names, purposes, streams, blocks, st.integers(0, 200))
def test_bytes_are_blocks_of_philox(key: int, name: str, purpose: Purpose, stream: int, block: int, count: int) -> None:
    counters = [(block + number, stream, int(purpose), 0) for number in range(-(-count // BLOCK))]
    words = [word for counter in counters for word in philox(counter, tensor_key(key, name))]
    expected = b"".join(word.to_bytes(8, "little") for word in words)[:count]
    assert noise_bytes(key, name, purpose, stream, BLOCK * block, count).tobytes() == expected


def test_a_tensors_key_is_the_first_16_bytes_of_a_sha256() -> None:
    digest = hashlib.sha256(b"fedtune noise 1\x1f7\x1fw").digest()
    assert tensor_key(7, "w") == (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little"))


def test_golden_bytes() -> None:
    """Never to change: old rounds could not be replayed."""
    golden = [noise_bytes(7, "model.layers.0.mlp.weight", purpose, 3, 64, 8).tobytes().hex() for purpose in Purpose]
    assert golden == ["a685ecd6eb394e04", "4571709aad096120", "1033d72c0ab40fea", "d7ca58d4b28d3792", "1a4d8814651048ae"]


@given(keys, names, st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 31))
def test_pieces_are_what_the_whole_is(key: int, name: str, lengths: list[int], rest: int) -> None:
    whole = noise_bytes(key, name, Purpose.SIGNS, 5, 0, BLOCK * sum(lengths) + rest)
    starts = np.cumsum([0, *lengths])
    counts = [BLOCK * length for length in lengths] + [rest]
    pieces = [noise_bytes(key, name, Purpose.SIGNS, 5, BLOCK * int(s), c) for s, c in zip(starts, counts, strict=True)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_threads_do_not_disturb_each_other() -> None:
    def drawn(stream: int) -> bytes:
        return noise_bytes(1, "w", Purpose.SIGNS, stream, 0, 2**14).tobytes()

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(drawn, [*range(20)] * 4))
    assert together == [drawn(stream) for stream in range(20)] * 4


def test_another_name_gives_other_bytes() -> None:
    given_ = [(1, "w"), (2, "w"), (1, "v"), (11, "w"), (1, "1w")]
    others = [
        noise_bytes(key, name, purpose, stream, 0, 16).tobytes()
        for key, name in given_
        for purpose in Purpose
        for stream in (0, 1)
    ]
    assert len(set(others)) == 5 * len(Purpose) * 2


def test_normal_steps_never_change() -> None:
    table = normal_steps()
    assert (table.shape, table.dtype) == ((2**16,), np.float32)
    golden = "e8cfff23047b7e58f6ae180f798c0bd13cfa7a46c5e6db798596865662071226"
    assert hashlib.sha256(table.astype("<f4").tobytes()).hexdigest() == golden


def test_normal_steps_are_a_normal_distribution() -> None:
    """Mean 0, variance 1, fourth moment 3; the share below x is that of the distribution, to within half a step."""
    table = normal_steps().astype(np.float64)
    np.testing.assert_array_equal(table, -table[::-1])
    assert (table**2).mean() == pytest.approx(1, abs=1e-8)
    assert (table**4).mean() == pytest.approx(3, abs=1e-2)  # the outermost step cuts the tail off
    assert (np.diff(table) >= 0).all()
    for x in (-3.0, -1.0, -0.1, 0.0, 0.5, 2.0):
        assert (table < x).mean() == pytest.approx(NormalDist().cdf(x), abs=3e-5)


def test_no_normal_step_hangs_on_the_last_bits_of_a_logarithm() -> None:
    """Before it is rounded to a multiple of 2^-20, each is further from the middle between two than any library could err:
    1e-11 is 10,000 times the last bit of the largest."""
    half = np.array([NormalDist().inv_cdf((i + 0.5) / 2**16) for i in range(2**15, 2**16)])
    steps = half / np.sqrt((half**2).mean()) * 2**20
    to_the_middle = np.abs(steps - np.floor(steps) - 0.5) / 2**20
    assert to_the_middle.min() > 1e-11 > 1e4 * np.spacing(normal_steps().max().astype(np.float64))
