"""The geometry of a comparison's charts, in per cent of the plot: x from the left, y from the top."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from server import report_units as units
from server.report_charts import Scale, Tick, around, nice_step
from simulations.sweep_table import Row, Spread


@dataclass(frozen=True)
class Stop:
    """One evaluated round of a strategy, over its seeds."""

    round: int
    loss: Spread
    bytes_up: float


@dataclass(frozen=True)
class Line:
    """A strategy in a plot; `look` says which colour and dashes it has in all of them."""

    look: int
    name: str
    path: str
    band: str  # mean ± standard deviation; empty with one seed
    dots: list[tuple[float, float, str]]
    end: str


@dataclass(frozen=True)
class Plot:
    title: str
    unit: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    base: Tick | None


@dataclass(frozen=True)
class Pair:
    """A strategy's two losses on one scale, with the ends of the deviation of the first."""

    look: int
    name: str
    loss: float
    own: float
    deviation: tuple[float, float] | None
    title: str


@dataclass(frozen=True)
class Across:
    """Values from `low` at the left to `high` at the right, on a logarithm or not."""

    low: float
    high: float
    log: bool = False

    def x(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(100 * (value - low) / (high - low), 2)

    def ticks(self, label: Callable[[float], str], about: int = 6) -> list[Tick]:
        if self.log:
            return [Tick(self.x(value), label(value)) for value in self._decades(about)]
        step = nice_step((self.high - self.low) / about)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [Tick(self.x(n * step), label(n * step)) for n in range(first, last + 1)]

    def _decades(self, about: int) -> list[float]:
        """1, 2 and 5 times the powers of ten, or, where those are many, the powers alone."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1, 2, 5), (1,)):
            ticks = [m * 10.0**power for power in powers for m in steps if self.low <= m * 10.0**power <= self.high]
            if len(ticks) <= about:
                break
        return ticks


def stops(row: Row) -> list[Stop]:
    """Of the rounds that every seed evaluated."""
    by_seed = [{point.round: point for point in figures.curve} for figures in row.figures]
    common = sorted(set.intersection(*map(set, by_seed)))
    return [
        Stop(number, Spread.of([c[number].loss for c in by_seed]), fmean(c[number].bytes_up for c in by_seed))
        for number in common
    ]


def loss_by_round(rows: Sequence[Row]) -> Plot | None:
    found = {row.name: _drawable(stops(row)) for row in rows if row.figures}
    last = max((stop.round for found_stops in found.values() for stop in found_stops), default=0)
    if not last:
        return None
    across = Across(0, last)
    ticks = across.ticks(lambda number: f"{number:.0f}", min(10, last))
    return _plot("Held-out loss by round", "round", rows, found, across, lambda stop: stop.round, ticks)


def loss_by_bytes(rows: Sequence[Row]) -> Plot | None:
    """Round 0 is left out: before training nothing has come up but figures."""
    found = {row.name: [stop for stop in _drawable(stops(row)) if stop.round and stop.bytes_up] for row in rows if row.figures}
    sent = [stop.bytes_up for found_stops in found.values() for stop in found_stops]
    if not sent:
        return None
    across = Across(min(sent) / 1.15, max(sent) * 1.15, log=True)
    title = "Held-out loss by the bytes that a client has sent so far, logarithmic"
    return _plot(title, "sent", rows, found, across, lambda stop: stop.bytes_up, across.ticks(units.size_tick))


def pairs(rows: Sequence[Row]) -> tuple[list[Pair], Across, list[Tick]] | None:
    """Everybody's and own loss of each strategy, on one scale."""
    drawn = [(look, row) for look, row in enumerate(rows) if row.figures and math.isfinite(row.loss.mean + row.own.mean)]
    if not drawn:
        return None
    values = [value for _, row in drawn for value in (row.loss.mean, row.own.mean, *ends(row.loss))]
    values += [base for base in (base_loss(rows),) if base is not None]
    scale = around(uncut(values, base_loss(rows)))
    across = Across(scale.low, scale.high)
    found = [
        Pair(
            look,
            row.name,
            across.x(min(row.loss.mean, scale.high)),
            across.x(min(row.own.mean, scale.high)),
            _drawn_ends(row.loss, across),
            f"{row.name}: everybody's {row.loss}, own files {row.own}",
        )
        for look, row in drawn
    ]
    step = nice_step((across.high - across.low) / 6)
    digits = max(0, -math.floor(math.log10(step)))
    return found, across, across.ticks(lambda value: f"{value:.{digits}f}")


def base_loss(rows: Sequence[Row]) -> float | None:
    """Of the base model; None where the rows do not agree on it (they may have different seeds)."""
    means = [row.spread(lambda figures: figures.base).mean for row in rows if row.figures]
    if not means or not all(math.isclose(mean, means[0], rel_tol=1e-2) for mean in means):
        return None
    return means[0]


def _plot(
    title: str,
    unit: str,
    rows: Sequence[Row],
    found: dict[str, list[Stop]],
    across: Across,
    of: Callable[[Stop], float],
    ticks: list[Tick],
) -> Plot:
    base = base_loss(rows)
    losses = [value for line in found.values() for stop in line for value in (stop.loss.mean, *ends(stop.loss))]
    scale = around(uncut([*losses, *([base] if base is not None else [])], base))
    lines = [_line(look, row, found[row.name], across, scale, of) for look, row in enumerate(rows) if found.get(row.name)]
    reference = Tick(scale.y(base), f"base model {units.loss(base)}") if base is not None else None
    return Plot(title, unit, ticks, scale.ticks(), lines, reference)


def _line(look: int, row: Row, line: list[Stop], across: Across, scale: Scale, of: Callable[[Stop], float]) -> Line:
    at = [(across.x(of(stop)), stop) for stop in line]
    path = "M" + "L".join(f"{x} {scale.y(stop.loss.mean)}" for x, stop in at) + "h0" * (len(at) == 1)
    spread = [(x, *ends(stop.loss)) for x, stop in at if stop.loss.std is not None]
    around_it = [*((x, high) for x, _, high in spread), *((x, low) for x, low, _ in reversed(spread))]
    band = "M" + "L".join(f"{x} {scale.y(value)}" for x, value in around_it) + "z" if len(spread) > 1 else ""
    dots = [(x, scale.y(stop.loss.mean), f"{row.name}, round {stop.round}: {stop.loss}") for x, stop in at]
    end = units.loss(line[-1].loss.mean) if math.isfinite(row.loss.mean) else "diverged"
    return Line(look, row.name, path, band, dots, end)


def _drawable(found: Iterable[Stop]) -> list[Stop]:
    return [stop for stop in found if math.isfinite(stop.loss.mean)]


def uncut(values: Sequence[float], base: float | None) -> list[float]:
    """One method that went astray does not flatten the others: nothing is drawn far above the base model."""
    low = min(values)
    most = base + (base - low) / 4 if base is not None and base > low else math.inf
    return [min(value, most) for value in values]


def ends(spread: Spread) -> tuple[float, ...]:
    return () if spread.std is None else (spread.mean - spread.std, spread.mean + spread.std)


def _drawn_ends(spread: Spread, across: Across) -> tuple[float, float] | None:
    found = [across.x(min(value, across.high)) for value in ends(spread)]
    return (found[0], found[1]) if found else None
