"""The geometry of the charts, in per cent of the plot: x from the left, y from the top. The template draws it.

The plot stretches with the page while labels, which are text beside it, keep their size: it reads well on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from server.records import RoundRecord
from server.report_units import known


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    series: int
    title: str


@dataclass(frozen=True)
class Chart:
    title: str
    summary: str  # what the picture says, for those who do not see it
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    path: str = ""
    dots: list[Dot] = field(default_factory=list)
    ends: list[Dot] = field(default_factory=list)  # dots whose number is written beside them
    bars: list[Bar] = field(default_factory=list)
    legend: tuple[str, ...] = ()
    reference: Tick | None = None  # a level to compare with


@dataclass(frozen=True)
class Scale:
    """Values from `low` at the bottom to `high` at the top."""

    low: float
    high: float

    def y(self, value: float) -> float:
        return round(100 * (self.high - value) / (self.high - self.low), 2)

    def ticks(self, label: Callable[[float], str] | None = None, unit: str = "", about: int = 5) -> list[Tick]:
        """At round numbers; without a `label`, with as many digits as tell them apart."""
        step = nice_step((self.high - self.low) / about)
        digits = max(0, -math.floor(math.log10(step)))
        label = label or (lambda value: f"{value:.{digits}f}{unit}")
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [Tick(self.y(n * step), label(n * step)) for n in range(first, last + 1)]


def nice_step(wanted: float) -> float:
    """1, 2 or 5 times a power of ten, not below `wanted`."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= wanted * (1 - 1e-9))


def around(values: Sequence[float]) -> Scale:
    """For lines: the range of the values and a little air; a single level gets room on both sides."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    air = 0.08 * (high - low) or max(abs(high) * 0.05, 0.05)
    return Scale(low - air, high + air)


def from_zero(values: Sequence[float]) -> Scale:
    """For bars, whose length is the number: from 0."""
    high = max(values, default=0.0)
    return Scale(0.0, high * 1.06 if high > 0 else 1.0)


@dataclass(frozen=True)
class Rounds:
    """The x axis: a slot for each round of the run, its label in the middle of it."""

    numbers: tuple[int, ...]

    @classmethod
    def of(cls, rounds: Iterable[RoundRecord]) -> Rounds:
        return cls(tuple(record.round for record in rounds))

    @property
    def slot(self) -> float:
        return 100 / len(self.numbers)

    def x(self, number: int) -> float:
        return round((self.numbers.index(number) + 0.5) * self.slot, 3)

    def ticks(self, at_most: int = 11) -> list[Tick]:
        step = max(1, math.ceil(nice_step(max(1.0, len(self.numbers) / at_most))))
        return [Tick(self.x(n), str(n)) for n in self.numbers[::step]]


def line(x: Rounds, scale: Scale, values: Mapping[int, float | None]) -> str:
    """An SVG path through what was measured; a round without a loss is bridged, not drawn as 0."""
    points = [f"{x.x(n)} {scale.y(v)}" for n, v in measured(values)]
    return "M" + "L".join(points) + "h0" * (len(points) == 1) if points else ""  # h0: a point is seen, too


def dots(x: Rounds, scale: Scale, values: Mapping[int, float | None], label: Callable[[float], str]) -> list[Dot]:
    return [Dot(x.x(n), scale.y(v), f"round {n}: {label(v)}") for n, v in measured(values)]


def measured(values: Mapping[int, float | None]) -> list[tuple[int, float]]:
    return [(number, value) for number, value in values.items() if known(value) is not None and value is not None]


def bars(
    x: Rounds, scale: Scale, series: Sequence[tuple[str, Mapping[int, float]]], label: Callable[[float], str]
) -> list[Bar]:
    """Grouped: one bar a series beside the other in the slot of a round, three quarters of it filled."""
    width = 0.75 * x.slot / len(series)
    found: list[Bar] = []
    for index, (name, values) in enumerate(series):
        for number, value in values.items():
            left = x.x(number) - 0.375 * x.slot + index * width
            top = scale.y(value)
            title = f"round {number}, {name}: {label(value)}"
            found.append(Bar(round(left, 3), top, round(width * 0.94, 3), round(100 - top, 2), index, title))
    return found
