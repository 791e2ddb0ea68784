"""`delta_come(first, middle, last)`: what many rounds have added up to, as singular vectors: the larger, the more bits.

M (d, k) = U S V^T;  column i of U sqrt(S) and of V sqrt(S) travels with
    8 bits   where i is among the `first`
    3 bits   in the `middle`
    2 bits   (-1, 0, 1) among the `last`; those behind are left out

in groups of 128 numbers with a bfloat16 scale each: of several, the one that leaves the least squares. What is no matrix, or
would not become smaller than that, travels as `int8(128, nearest)`.

After Delta-CoMe (Ping et al., NeurIPS 2024), whose bits and numbers of vectors for a model of 7 billion parameters are the
defaults. It differs in that nothing is calibrated on text (theirs rounds with GPTQ), and 968 is for every matrix (theirs
takes 1,428 in the feed-forward layers). The decomposition takes seconds for millions of numbers: for broadcasts of what is
kept long, not for updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedtune.errors import MalformedMessage
from fedtune.wire.grouped import GROUP, LARGEST, dequantised, groups_of, quantised, rounded_away
from fedtune.wire.integers import Int8
from fedtune.wire.powersgd import product
from fedtune.wire.stage import Array, Draw, Form, Kind, Stage

Number = Annotated[int, Field(ge=0)]
BITS = {"first": 8, "middle": 3, "last": 2}
PLAIN = Int8(GROUP, "nearest")


@dataclass(frozen=True)
class DeltaCoMe(Stage):
    name: ClassVar[str] = "delta_come"
    slow: ClassVar[bool] = True
    first: Number = 2
    middle: Number = 32
    last: Number = 968

    def carrier(self, given: Form) -> Form:
        return self._symbols(given, "last")

    def sides(self, given: Form) -> Mapping[str, Form]:
        if self._factors(given.shape):
            groups = sum(rows * groups_of(length) for _, rows, length in self._pieces(given.shape))
        else:
            groups = groups_of(given.count)
        scales = Form((groups,), Kind.WORDS, 0, 2**16 - 1)
        return {"first": self._symbols(given, "first"), "middle": self._symbols(given, "middle"), "scales": scales}

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        nothing = np.zeros(0, np.int8)
        if not self._factors(x.shape):
            symbols, sides = PLAIN.encode(x, draw)
            return nothing, {"first": symbols, "middle": nothing, **sides}
        parts: dict[str, list[Array]] = {part: [nothing] for part in BITS}
        scales = [np.zeros(0, np.uint16)]
        for (part, _, _), vectors in zip(self._pieces(x.shape), self._vectors(x), strict=True):
            symbols, words = quantised(vectors, most(part))
            parts[part].append(symbols)
            scales.append(words)
        streams = {part: np.concatenate(symbols) for part, symbols in parts.items()}
        return streams.pop("last"), {**streams, "scales": np.concatenate(scales)}

    @np.errstate(over="ignore", invalid="ignore")  # nonsense from the network ends as nonsense, which the gate refuses
    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        if not self._factors(given.shape):
            return PLAIN.decode(sides["first"], sides, given, draw)
        if (sides["scales"] > LARGEST).any():
            raise MalformedMessage("a scale is negative or not finite")
        left, vectors = {"last": carrier, **sides}, []
        for part, rows, length in self._pieces(given.shape):
            symbols, left[part] = np.split(left[part], [rows * length])
            words, left["scales"] = np.split(left["scales"], [rows * groups_of(length)])
            vectors.append(dequantised(symbols, words, (rows, length), most(part)))
        return product(np.concatenate(vectors[::2]), np.concatenate(vectors[1::2]))

    def error(self, x: Array) -> float:
        """What rounding U, V and both take from the product, each by itself; what is left out; and the rounding of float32."""
        if not self._factors(x.shape):
            return PLAIN.error(x)
        values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
        off = [rounded_away(v, most(part)) for (part, _, _), v in zip(self._pieces(x.shape), self._vectors(x), strict=True)]
        u, v = np.concatenate(off[::2]), np.concatenate(off[1::2])  # (rank, d), (rank, k)
        roots = np.sqrt(values[: len(u), None])
        one = np.linalg.norm(roots * u) + np.linalg.norm(roots * v)  # the partner's columns are orthogonal
        both = np.sqrt(np.sum((u @ u.T) * (v @ v.T)))
        whole = float(np.linalg.norm(values))
        return float(one + both + np.linalg.norm(values[len(u) :])) * (1 + 1e-6) + 1e-6 * whole

    def _ranks(self, shape: tuple[int, ...]) -> dict[str, int]:
        """How many columns each part has."""
        ranks, left = {}, min(shape)
        for part, wanted in (("first", self.first), ("middle", self.middle), ("last", self.last)):
            ranks[part] = min(wanted, left)
            left -= ranks[part]
        return ranks

    def _factors(self, shape: tuple[int, ...]) -> bool:
        if len(shape) != 2:
            return False
        return sum(BITS[part] * rows for part, rows in self._ranks(shape).items()) * sum(shape) < 8 * shape[0] * shape[1]

    def _pieces(self, shape: tuple[int, ...]) -> Iterator[tuple[str, int, int]]:
        """(part, number of columns, their length), of U and V by turns."""
        for part, rows in self._ranks(shape).items():
            for length in shape:
                yield part, rows, length

    def _vectors(self, x: Array) -> Iterator[Array]:
        """float32 (columns, length) for each piece."""
        u, values, v = np.linalg.svd(x.astype(np.float64, order="C"), full_matrices=False)
        roots, row = np.sqrt(values)[:, None], 0
        for rows in self._ranks(x.shape).values():
            some = slice(row, row + rows)
            yield (u.T[some] * roots[some]).astype(np.float32)
            yield (v[some] * roots[some]).astype(np.float32)
            row += rows

    def _symbols(self, given: Form, part: str) -> Form:
        if self._factors(given.shape):
            count = self._ranks(given.shape)[part] * sum(given.shape)
        else:
            count = given.count if part == "first" else 0
        return Form((count,), Kind.SYMBOLS, -most(part), most(part))


def most(part: str) -> int:
    """The largest symbol."""
    return int(2 ** (BITS[part] - 1) - 1)
