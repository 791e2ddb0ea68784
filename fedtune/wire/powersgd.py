"""`powersgd(rank, iterations)`: a matrix as the product of two thin ones, found by a step or more of the power method.

M (d, k) ~ P Q^T,  P (d, rank) with orthonormal columns: M Q for a Q drawn by both sides,  Q (k, rank) = M^T P

P and Q travel as floats: rank (d + k) numbers, which a quantiser may follow. Each column lies in one piece, since their sizes
differ. What is no matrix, or would not become smaller, passes as it is. The encoder's products of matrices can differ in
their last bits from machine to machine; but they travel, and the decoder sums in a fixed order: all make the same of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedtune.noise import normal_steps
from fedtune.wire.stage import Array, Draw, Form, Stage

AtLeastOne = Annotated[int, Field(ge=1)]
PIECE = 2**14  # numbers that are summed at once


@dataclass(frozen=True)
class PowerSGD(Stage):
    name: ClassVar[str] = "powersgd"
    rank: AtLeastOne = 2
    iterations: AtLeastOne = 1

    def carrier(self, given: Form) -> Form:
        return Form((self.rank * sum(given.shape) if self._thins(given.shape) else given.count,))

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        if not self._thins(x.shape):
            return x.reshape(-1), {}
        matrix = x.astype(np.float64, order="C")  # (d, k), the same bits however x lies in memory
        q = drawn_normals((x.shape[1], self.rank), draw)
        for _ in range(self.iterations):
            p = np.linalg.qr(matrix @ q).Q  # (d, rank)
            q = matrix.T @ p  # (k, rank)
        return np.concatenate([p.T.reshape(-1), q.T.reshape(-1)]).astype(np.float32), {}

    @np.errstate(over="ignore", invalid="ignore")  # nonsense from the network ends as nonsense, which the gate refuses
    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        if not self._thins(given.shape):
            return carrier
        d, k = given.shape
        p, q = np.split(carrier, [self.rank * d])
        return product(p.reshape(self.rank, d), q.reshape(self.rank, k))

    def error(self, x: Array) -> float:
        """All of it, where what was drawn misses it; and the rounding of P, Q and their product."""
        if not self._thins(x.shape):
            return 0.0
        rounding = (2 + math.sqrt(self.rank)) * 2.0**-24
        return 1.01 * rounding * _norm(x) + _norm(x) + x.size * 2.0**-149

    def _thins(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and self.rank * sum(shape) < shape[0] * shape[1]


def drawn_normals(shape: tuple[int, int], draw: Draw) -> Array:
    drawn: Array = normal_steps()[draw.bytes(2 * shape[0] * shape[1]).view("<u2")].reshape(shape).astype(np.float64)
    return drawn


def product(left: Array, right: Array) -> Array:
    """The sum over r of left (r, d) times right (r, k): float32 (d, k), summed in float64 from the first to the last."""
    whole = np.empty((left.shape[1], right.shape[1]), np.float32)
    width = max(min(right.shape[1], PIECE), 1)
    height = PIECE // width
    for row in range(0, left.shape[1], height):
        for column in range(0, right.shape[1], width):
            part = whole[row : row + height, column : column + width]
            part[...] = _summed(left[:, row : row + height], right[:, column : column + width])
    return whole


def _summed(left: Array, right: Array) -> Array:
    """float64 (height, width). Products and sums one by one: a product of matrices would choose its own order."""
    total = np.zeros((left.shape[1], right.shape[1]))
    one = np.empty_like(total)
    for a, b in zip(left.astype(np.float64), right.astype(np.float64), strict=True):
        total += np.multiply(a[:, None], b, out=one)
    return total


def _norm(x: Array) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))
