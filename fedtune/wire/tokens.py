"""Whole numbers as tokens: small numbers are their own, larger ones share a token and keep their lowest bits as they are.

With m mantissa bits, v of 2^e <= v < 2^(e+1), e > m, becomes the token of (e, the m bits below the highest); the e - m bits
below these are as good as uniform, and travel so. What m costs least is found by trial. Ranges up to 256 are all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedtune.errors import MalformedMessage
from fedtune.wire.ans import Stack
from fedtune.wire.slices import slices
from fedtune.wire.stage import Array, Form
from fedtune.wire.tables import BIT, STEPS, Table, fitted, popped

NARROW = 8  # bits: mantissa of a range whose numbers are all tokens
FINE = 7  # the most that others have; coarser ones follow from its counts
TRIAL = 4  # step of the tables by which they are compared


@dataclass(frozen=True)
class Tokens:
    """One way to write a stream."""

    mantissa: int
    table: Table
    cost: int  # 1024ths of a bit

    @classmethod
    def fitted(cls, values: Array, form: Form) -> Tokens:
        """The cheapest; there is a value."""
        if _narrow(form):
            return cls._of(_counts(values, form, NARROW), NARROW)
        fine = _counts(values, form, FINE)
        base, _ = _ladder(FINE, fine.size)
        used = np.flatnonzero(fine)
        coarser = (np.bincount(_tokens(base[used], m), fine[used]).astype(np.int64) for m in range(FINE + 1))
        trials = [(cls._of(counts, m, [TRIAL]).cost, m, counts) for m, counts in enumerate(coarser)]
        _, mantissa, counts = min(trials, key=lambda trial: trial[:2])
        return cls._of(counts, mantissa)

    @classmethod
    def _of(cls, counts: Array, mantissa: int, steps: Sequence[int] = STEPS) -> Tokens:
        table, (_, widths) = fitted(counts, steps), _ladder(mantissa, counts.size)
        return cls(mantissa, table, table.cost(counts) + BIT * int(counts @ widths))

    def written(self, values: Array, form: Form) -> bytes:
        stack, size = Stack(), _size(form, self.mantissa)
        base, widths = _ladder(self.mantissa, size)
        for piece in reversed(slices(values.size)):
            natural = _natural(values[piece], form)
            tokens = _tokens(natural, self.mantissa)
            if widths[-1]:
                stack.push_bits(natural - base[tokens], widths[tokens])
            self.table.push_symbols(stack, tokens)
        self.table.push(stack, size)
        return stack.sealed()


def read_tokens(data: bytes | memoryview, form: Form, mantissa: int) -> Array:
    """Raises MalformedMessage."""
    if not (mantissa == NARROW if _narrow(form) else 0 <= mantissa <= FINE):
        raise MalformedMessage(f"a stream came with tokens of {mantissa} bits")
    stack, size = Stack.opened(data), _size(form, mantissa)
    table, (base, widths) = popped(stack, size), _ladder(mantissa, size)
    values = np.empty(form.count, form.dtype)
    for piece in slices(form.count):
        tokens = table.pop_symbols(stack, piece.stop - piece.start)
        if _narrow(form):
            np.add(tokens, form.low, out=values[piece], casting="unsafe", dtype=np.int64)
        else:
            values[piece] = _within(base[tokens] + stack.pop_bits(widths[tokens]), form)
    stack.require_empty()
    return values


def _narrow(form: Form) -> bool:
    return form.high - form.low < 1 << NARROW


def _natural(values: Array, form: Form) -> Array:
    """int64, from 0 on: in a wide range, numbers of both signs by magnitude, the sign in the lowest bit."""
    wide = values.astype(np.int64)
    if form.low < 0 and not _narrow(form):
        return (wide << 1) ^ (wide >> 63)
    return wide - form.low


def _within(natural: Array, form: Form) -> Array:
    """Raises MalformedMessage where what was read is out of range."""
    values = (natural >> 1) ^ -(natural & 1) if form.low < 0 else natural + form.low
    if values.min() < form.low or values.max() > form.high:
        raise MalformedMessage(f"a number of a stream is not from {form.low} to {form.high}")
    return values


def _size(form: Form, mantissa: int) -> int:
    """How many tokens there can be."""
    ends = _natural(np.array([form.low, form.high], np.int64), form)
    return int(_tokens(ends, mantissa).max()) + 1


def _counts(values: Array, form: Form, mantissa: int) -> Array:
    """How often each token comes."""
    counts = np.zeros(_size(form, mantissa), np.int64)
    for piece in slices(values.size):
        counts += np.bincount(_tokens(_natural(values[piece], form), mantissa), minlength=counts.size)
    return counts


def _tokens(natural: Array, mantissa: int) -> Array:
    """int64. Exponent and mantissa of a float64 stand side by side, below a sign of 0: numbers below 2^53 are exact."""
    if mantissa == NARROW:
        return natural
    tokens = (natural.astype(np.float64).view(np.int64) >> (52 - mantissa)) - ((1022 + mantissa) << mantissa)
    return np.where(natural < 2**mantissa, natural, tokens)


@lru_cache(maxsize=64)
def _ladder(mantissa: int, size: int) -> tuple[Array, Array]:
    """Of each token, its least number and how many bits lie below."""
    tokens = np.arange(size, dtype=np.int64)
    widths = np.maximum((tokens >> mantissa) - 1, 0)
    lead = np.where(tokens < 2**mantissa, tokens, 2**mantissa + (tokens & (2**mantissa - 1)))
    return lead << widths, widths
