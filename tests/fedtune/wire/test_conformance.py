"""The conformance kit of stages: all built-in ones pass, and a stage that breaks a rule is told which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest

from fedtune.errors import MalformedMessage
from fedtune.wire.conformance import check_stage
from fedtune.wire.stage import Array, Draw, Form, Kind, Stage
from fedtune.wire.stages import BUILT_IN, stage_from

SETTINGS = {
    "delta_come": ["", "1,2,3", "0,0,5", "0,0,0"],
    "int4": ["", "8,nearest"],
    "powersgd": ["", "1,3", "4"],
    "randk": ["", "0.01", "0.7", "1"],
    "topk": ["", "0.01", "0.7", "1"],
}


@pytest.mark.parametrize(("name", "given"), [(name, given) for name in BUILT_IN for given in SETTINGS.get(name, [""])])
def test_every_built_in_stage_keeps_every_rule(name: str, given: str) -> None:
    check_stage(stage_from(name, [text for text in given.split(",") if text]))


@dataclass(frozen=True)
class Halves(Stage):
    """Every second number, as in the docstring of the contract; the others are 0."""

    name: ClassVar[str] = "halves"

    def carrier(self, given: Form) -> Form:
        return Form((-(-given.count // 2),))

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        return x.reshape(-1)[::2], {}

    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        x = np.zeros(given.count, np.float32)
        x[::2] = carrier
        return x


def test_the_example_of_the_contract_passes() -> None:
    check_stage(Halves())


class Nameless(Halves):
    name = None  # type: ignore[assignment]


@dataclass
class Thawed(Stage):
    name: ClassVar[str] = "thawed"
    carrier, encode, decode = Halves.carrier, Halves.encode, Halves.decode


class TooMany(Halves):
    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        return x.reshape(-1), {}


class Unannounced(Halves):
    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        return x.reshape(-1)[::2], {"sum": np.zeros(1, np.int8)}


class Doubles(Halves):
    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        return x.reshape(-1)[::2].astype(np.float64), {}


class Sided(Halves):
    """With the number of entries beside, from 0 to 100 at most."""

    def sides(self, given: Form) -> Mapping[str, Form]:
        return {"count": Form((1,), Kind.GAPS, 0, 100)}

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        return x.reshape(-1)[::2], {"count": np.array([x.size])}


class FloatsBeside(Halves):
    def sides(self, given: Form) -> Mapping[str, Form]:
        return {"rest": Form((1,))}


class Overwrites(Halves):
    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        x *= 2
        return x.reshape(-1)[::2], {}


@dataclass(frozen=True)
class Counts(Halves):
    seen: list[int] = field(default_factory=list)

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        self.seen.append(1)
        return x.reshape(-1)[::2] * np.float32(len(self.seen)), {}


class AsItLies(Halves):
    """In the order of memory, which is not that of positions for every array."""

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        return x.ravel(order="K")[::2], {}


class Bold(Halves):
    def error(self, x: Array) -> float:
        return 0.1 * float(np.linalg.norm(x.astype(np.float64)))


class SaidExact(Halves):
    exact: ClassVar[bool] = True


class SaidUnbiased(Halves):
    unbiased: ClassVar[bool] = True


class Rounds(Halves):
    """To the nearest half: half of the error that rounding at random has, but the same in every draw."""

    unbiased: ClassVar[bool] = True

    def carrier(self, given: Form) -> Form:
        return Form((given.count,))

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        return (np.rint(2 * x) / 2).reshape(-1), {}

    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        return carrier

    def error(self, x: Array) -> float:
        return 0.25 * x.size**0.5 + 1e-6 * float(np.linalg.norm(x.astype(np.float64)))


class Negative(Halves):
    """-0 comes back as 0: the same number, but not the same bits."""

    exact: ClassVar[bool] = True

    def carrier(self, given: Form) -> Form:
        return Form((given.count,))

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        return x.reshape(-1), {}

    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        return np.where(np.abs(carrier) < 1e-30, 0, carrier).astype(np.float32)


@dataclass(frozen=True)
class Trusts(Stage):
    """Sends positions, and believes those that come."""

    name: ClassVar[str] = "trusts"

    def carrier(self, given: Form) -> Form:
        return Form((given.count,))

    def sides(self, given: Form) -> Mapping[str, Form]:
        return {"order": Form((given.count,), Kind.GAPS, 0, 2 * given.count)}

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        return x.reshape(-1), {"order": np.arange(x.size)}

    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        return carrier[sides["order"]]


class Refuses(Trusts):
    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        if (sides["order"] >= given.count).any():
            raise MalformedMessage("a position is out of range")
        return carrier[sides["order"]]


class Shortens(Refuses):
    """Nonsense makes it forget numbers."""

    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        return carrier[sides["order"][sides["order"] < given.count]]


class Writes(Halves):
    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        carrier *= 2
        return super().decode(carrier, sides, given, draw)


BROKEN = {
    Nameless: "has no name",
    Thawed: "is no frozen dataclass",
    TooMany: r"shape \(2,\), numbers up to .*, 'carrier': 2 numbers came, announced are 1",
    Unannounced: r"encode gave \['sum', 'carrier'\], announced are \['carrier'\]",
    Doubles: "wanted float32, float64 came",
    Sided: "'count': numbers from 256 to 256 came, announced are 0 to 100",
    FloatsBeside: "'rest' is of kind FLOATS: only the carrier can be",
    Overwrites: "encode changed what it was given; work on a copy",
    Counts: "encoded to another 'carrier' the second time",
    AsItLies: "encoded to another 'carrier' the second time",
    Bold: "its error promises",
    SaidExact: "said to be exact, but other bits came back",
    SaidUnbiased: "the mean of 400 draws is off by",
    Rounds: "the mean of 400 draws is off by",
    Writes: "decode changed 'carrier'; work on a copy",
    Trusts: "nonsense raised IndexError.*, wanted MalformedMessage",
    Shortens: r"nonsense: decode gave \d+ of float32, wanted 1 of float32",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda cls: cls.__name__)
def test_what_breaks_a_rule_is_named(broken: type[Stage]) -> None:
    with pytest.raises(AssertionError, match=BROKEN[broken]):
        check_stage(broken())


def test_refusing_nonsense_is_enough() -> None:
    check_stage(Refuses())


def test_a_stage_that_rounds_but_says_exact_is_found() -> None:
    with pytest.raises(AssertionError, match="said to be exact"):
        check_stage(Negative())
