"""Loss against bytes: a point for each strategy or variant, where they differ in what they send."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from server import report_units as units
from server.report_charts import Scale, Tick, around
from simulations.sweep_charts import Across, base_loss, ends, uncut
from simulations.sweep_table import Row

DIFFERENT = 2.0  # times as many bytes: below it there is nothing to see
NEAR, LINE = 22.0, 5.0  # per cent of the plot that a name takes, across and down


@dataclass(frozen=True)
class Mark:
    """A point with its name; `name_at` is the height of the name, which gives way to those above it."""

    look: int
    name: str
    x: float
    y: float
    name_at: float
    deviation: tuple[float, float] | None
    title: str

    @property
    def left(self) -> bool:
        """Whether the name stands on the left, since on the right there is no room."""
        return self.x > 70


@dataclass(frozen=True)
class Frontier:
    title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark]
    base: Tick | None


def loss_by_cost(rows: Sequence[Row]) -> Frontier | None:
    """Means over the seeds; bytes per client and round, both directions. None where nobody differs much in bytes."""
    drawn = [(look, row, _sent(row)) for look, row in enumerate(rows) if row.figures and math.isfinite(row.loss.mean)]
    drawn = [one for one in drawn if one[2] > 0]
    sent = [bytes for _, _, bytes in drawn]
    if not sent or max(sent) <= DIFFERENT * min(sent):
        return None
    base = base_loss(rows)
    losses = [value for _, row, _ in drawn for value in (row.loss.mean, *ends(row.loss))]
    scale = around(uncut(losses, base))
    across = Across(min(sent) / 1.3, max(sent) * 1.3, log=True)
    reference = Tick(scale.y(base), f"base model {units.loss(base)}") if base is not None and base <= scale.high else None
    marks = _apart([_mark(look, row, bytes, across, scale) for look, row, bytes in drawn])
    title = "Held-out loss after the last round, by bytes per client and round, both directions, logarithmic"
    return Frontier(title, across.ticks(units.size_tick), scale.ticks(), marks, reference)


def _sent(row: Row) -> float:
    return row.spread(lambda figures: figures.bytes_up + figures.bytes_down).mean


def _mark(look: int, row: Row, sent: float, across: Across, scale: Scale) -> Mark:
    x, y = across.x(sent), scale.y(min(row.loss.mean, scale.high))
    deviation = [scale.y(min(value, scale.high)) for value in ends(row.loss)]
    title = f"{row.name}: {row.loss}, {units.size(sent)}"
    return Mark(look, row.name, x, y, y, (deviation[0], deviation[1]) if deviation else None, title)


def _apart(marks: Sequence[Mark]) -> list[Mark]:
    """From above: a name that would stand on another goes below it."""
    placed: list[Mark] = []
    for mark in sorted(marks, key=lambda one: one.y):
        height = mark.y
        for other in placed:
            if abs(mark.x - other.x) < NEAR and mark.left == other.left and abs(height - other.name_at) < LINE:
                height = other.name_at + LINE
        placed.append(Mark(mark.look, mark.name, mark.x, mark.y, round(height, 2), mark.deviation, mark.title))
    return placed
