"""Random bits with a name: Philox4x64-10 (Salmon et al., SC 2011) as a function of (key, tensor, stream, position).

A counter-based generator has no state: any part of any stream is computed by itself, on any device, in pieces of any size, and
always comes out the same. Tests hold the published vectors and golden ones of our own.

    key      two words: the first 128 bits of SHA-256 of (run key, name of the tensor)
    counter  four words: block of 32 bytes within the stream, number of the stream, purpose, 0
    bytes    a block's four words, little endian
"""

from __future__ import annotations

import hashlib
import threading
from enum import IntEnum
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
BLOCK = 32  # bytes of one call of Philox4x64


class Purpose(IntEnum):
    """What the bits are for: the third word of the counter."""

    SIGNS = 0  # a byte for each position holds its signs in eight directions
    NORMALS = 1  # two bytes for each position: which of 65,536 equally likely steps of a normal distribution
    MASK = 2  # a byte for each position: whether a sparse direction moves it
    ROWS = 4  # words for which rows of a Hadamard matrix to take
    WIRE = 5  # what the stages of a codec draw: dither, positions, signs


@lru_cache(maxsize=4096)
def tensor_key(key: int, name: str) -> tuple[int, int]:
    """The generator's two key words for a tensor of the run with this key."""
    digest = hashlib.sha256(b"fedtune noise 1\x1f%d\x1f%s" % (key, name.encode())).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def noise_bytes(key: int, name: str, purpose: Purpose, stream: int, start: int, count: int) -> Bytes:
    """`count` bytes of a stream from byte `start` on, which is a multiple of 32."""
    words = _philox.at(tensor_key(key, name), start // BLOCK | stream << 64 | int(purpose) << 128, -(-count // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[:count]


class _Philox(threading.local):
    """numpy's generator, one for each thread: to set its state is ten times as fast as to make another."""

    def __init__(self) -> None:
        self.generator = np.random.Philox(key=0)
        self.state: Any = self.generator.state  # with an empty buffer

    def at(self, key: tuple[int, int], counter: int, count: int) -> npt.NDArray[np.uint64]:
        before = (counter - 1) % 2**256  # numpy counts up before it draws
        self.state["state"] = {"key": np.array(key, np.uint64), "counter": _words(before)}
        self.generator.state = self.state
        return self.generator.random_raw(count)


def _words(counter: int) -> npt.NDArray[np.uint64]:
    """The four words of a counter, the lowest first."""
    return np.frombuffer(counter.to_bytes(32, "little"), "<u8").astype(np.uint64, copy=False)


_philox = _Philox()


@lru_cache(maxsize=1)
def normal_steps() -> npt.NDArray[np.float32]:
    """The standard normal distribution in 65,536 equally likely steps: their middles, scaled to variance 1, in multiples of
    2^-20. Symmetric, so the mean is exactly 0; the largest is 4.3.

    A table and not a formula: logarithms and cosines differ in their last bit from device to device.
    """
    half = np.array([NormalDist().inv_cdf((i + 0.5) / 2**16) for i in range(2**15, 2**16)])
    scaled = half / np.sqrt((half**2).mean())
    rounded = np.round(scaled * 2**20) / 2**20
    return np.concatenate([-rounded[::-1], rounded]).astype(np.float32)
