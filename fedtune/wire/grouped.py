"""Vectors as small whole numbers, in groups of 128 with a bfloat16 scale each, rounded to nearest.

Of several scales a group takes the one that leaves the least squares: with three levels, the largest number as the scale would
leave most others at 0.
"""

from __future__ import annotations

import numpy as np

from fedtune.wire.stage import Array

GROUP = 128
LARGEST = 0x7F7F  # of the finite bfloat16 words from 0 on
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of a group's largest number: the scales that are tried
TINY = 2.0**-100  # groups below it are 0: no singular vector of float32 numbers that counts is as small


def groups_of(length: int) -> int:
    return -(-length // GROUP)


def quantised(vectors: Array, most: int) -> tuple[Array, Array]:
    """int8 symbols of vectors (n, length), and the bfloat16 words of their scales, a group after the other."""
    groups = _grouped(vectors)  # (g, 128)
    sizes = np.abs(groups).max(axis=1, initial=0)
    least = np.full(sizes.size, np.inf)
    symbols, words = np.zeros(groups.shape, np.int8), np.zeros(sizes.size, np.uint16)
    for share in SHARES:
        tried = rounded_up(np.where(sizes < TINY, 0, sizes * np.float32(share)))
        steps = (floats(tried) / np.float32(most))[:, None]
        near = np.clip(np.rint(np.divide(groups, steps, out=np.zeros_like(groups), where=steps > 0)), -most, most)
        squares = np.square(groups - near * steps, dtype=np.float64).sum(axis=1)
        better = squares < least
        symbols[better], words[better], least[better] = near[better], tried[better], squares[better]
    return symbols.reshape(len(vectors), groups_of(vectors.shape[1]) * GROUP)[:, : vectors.shape[1]].reshape(-1), words


def dequantised(symbols: Array, words: Array, shape: tuple[int, int], most: int) -> Array:
    """float32 vectors (n, length)."""
    steps = floats(words).reshape(shape[0], groups_of(shape[1])) / np.float32(most)
    plain: Array = symbols.reshape(shape) * np.repeat(steps, GROUP, axis=1)[:, : shape[1]]
    return plain


def rounded_away(vectors: Array, most: int) -> Array:
    """float64 (n, length)."""
    there = dequantised(*quantised(vectors, most), vectors.shape, most)
    away: Array = there.astype(np.float64) - vectors
    return away


def rounded_up(sizes: Array) -> Array:
    """The bfloat16 words of the next larger numbers, of floats from 0 on."""
    return ((sizes.astype(np.float32).view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)


def floats(words: Array) -> Array:
    plain: Array = (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return plain


def _grouped(vectors: Array) -> Array:
    """(groups, 128): each vector filled up with zeros."""
    return np.pad(vectors, ((0, 0), (0, -vectors.shape[1] % GROUP))).reshape(-1, GROUP)
