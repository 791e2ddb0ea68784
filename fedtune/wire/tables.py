"""Tables of frequencies, small enough for streams of a few hundred symbols.

A frequency is kept as a level: its distance to the least in use, on a scale of octaves, so that rare and frequent symbols are
as exact, and neighbours differ by little. A table is the differences of its levels, row by row; 0 stands for a symbol that is
not in use. The cheaper of several steps is taken: a sixteenth of an octave costs 10^-4 bit a symbol, an octave 0.03.

Costs are whole numbers, in 1024ths of a bit, so that all machines choose the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import constriction
import numpy as np

from fedtune.errors import MalformedMessage
from fedtune.wire.ans import Stack
from fedtune.wire.stage import Array

BIT = 1024  # costs
FINEST = 16  # parts of an octave
OCTAVES = 24
STEPS = (1, 2, 4, 8, 16)  # of a level, in parts of an octave
LEVELS = FINEST * OCTAVES + 1  # 1 is the least, 0 is not in use
RATIOS = (16, 32, 44, 52, 57, 60, 62, 63)  # 64ths: how much rarer a difference of levels is than the next smaller one


def _power(parts: int, of: int) -> int:
    """2^(parts / of), rounded down; `of` is a power of two. In whole numbers: no machine's `pow` is asked."""
    power = 1 << parts
    while of > 1:
        power, of = math.isqrt(power), of // 2
    return power


POWERS = np.array([_power(8 * FINEST + part, FINEST) for part in range(LEVELS)], np.int64)
BOUNDS = {  # between one level and the next, as 2^20 times the ratio to the least
    step: np.array(
        [_power(20 * 2 * FINEST + (2 * level + 1) * step, 2 * FINEST) for level in range((LEVELS - 1) // step)], np.int64
    )
    for step in STEPS
}


def _falling(ratio: int) -> Array:
    """Frequencies of differences 0, +1, -1, +2, ..., none of them 0."""
    falling = [2**16]
    for _ in range(2 * LEVELS):
        falling.append(max(falling[-1] * ratio // 64, 1))
    return np.array(falling, np.float64)


def _model(frequencies: Array) -> Any:
    return constriction.stream.model.Categorical(frequencies, perfect=False)


def _costs(frequencies: Array) -> Array:
    whole = math.log2(float(frequencies.sum()))
    return np.array([round(BIT * (whole - math.log2(one))) for one in frequencies.tolist()], np.int64)


DIFFERENCES = [_model(_falling(ratio)) for ratio in RATIOS]
DIFFERENCE_COSTS = np.stack([_costs(_falling(ratio)) for ratio in RATIOS])  # (ratio, difference)


@dataclass(frozen=True, eq=False)
class Table:
    """Of the symbols from `first` on, the first and the last of which are in use."""

    first: int
    levels: Array  # (symbols,)
    step: int  # one of STEPS

    @cached_property
    def model(self) -> Any:
        """None where one symbol alone is in use."""
        return _model(self._frequencies().astype(np.float64)) if self.levels.size > 1 else None

    def _frequencies(self) -> Array:
        parts = np.minimum((self.levels - 1) * self.step, LEVELS - 1)
        return np.where(self.levels > 0, POWERS[parts], 0)

    def cost(self, counts: Array) -> int:
        """Of the symbols, that come so often, and of the table."""
        whole = round(BIT * math.log2(int(self._frequencies().sum())))
        each = whole - 8 * BIT - (self.levels - 1) * (self.step * BIT // FINEST)
        own = counts[self.first : self.first + self.levels.size]
        head = round(BIT * math.log2(len(STEPS) * len(RATIOS) * counts.size**2))
        return head + int(own @ np.where(own > 0, each, 0)) + int(self._ratio_costs().min())

    def _ratio_costs(self) -> Array:
        costs: Array = DIFFERENCE_COSTS[:, _differences(self.levels)].sum(axis=1)
        return costs

    def push(self, stack: Stack, size: int) -> None:
        """`size`: how many symbols there could be."""
        ratio = int(self._ratio_costs().argmin())
        stack.push(_differences(self.levels), DIFFERENCES[ratio])
        stack.push_number(ratio, len(RATIOS))
        stack.push_number(STEPS.index(self.step), len(STEPS))
        stack.push_number(self.levels.size - 1, size)
        stack.push_number(self.first, size)

    def push_symbols(self, stack: Stack, symbols: Array) -> None:
        if self.model is not None:
            stack.push(symbols - np.int32(self.first), self.model)

    def pop_symbols(self, stack: Stack, count: int) -> Array:
        """int32, each a symbol of the table."""
        if self.model is None:
            return np.full(count, self.first, np.int32)
        symbols = stack.pop(count, self.model)
        symbols += np.int32(self.first)
        return symbols


def fitted(counts: Array, steps: Sequence[int] = STEPS) -> Table:
    """The cheapest table for symbols that come so often; one at least does."""
    used = np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1])
    own = counts[first : last + 1]
    ratios = (own << 20) // own[own > 0].min()
    tables = [Table(first, _levels(own, ratios, step), step) for step in steps]
    return min(tables, key=lambda table: table.cost(counts))


def _levels(counts: Array, ratios: Array, step: int) -> Array:
    return np.where(counts > 0, 1 + np.searchsorted(BOUNDS[step], ratios, side="right"), 0)


def _differences(levels: Array) -> Array:
    """Their signs in the lowest bit."""
    steps = np.diff(levels, prepend=0)
    return np.where(steps > 0, 2 * steps - 1, -2 * steps)


def popped(stack: Stack, size: int) -> Table:
    """What was pushed, of symbols below `size`. Raises MalformedMessage."""
    first, symbols = stack.pop_number(size), stack.pop_number(size) + 1
    step, ratio = STEPS[stack.pop_number(len(STEPS))], stack.pop_number(len(RATIOS))
    if first + symbols > size:
        raise MalformedMessage(f"a table of frequencies goes up to symbol {first + symbols - 1}, wanted below {size}")
    differences = stack.pop(symbols, DIFFERENCES[ratio])
    levels = np.cumsum(np.where(differences & 1, (differences + 1) >> 1, -(differences >> 1)))
    if levels.min() < 0 or levels.max() > 1 + (LEVELS - 1) // step or not (levels[0] and levels[-1]):
        raise MalformedMessage("a table of frequencies is damaged: a level is out of range")
    return Table(first, levels, step)
