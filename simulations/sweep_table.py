"""The table of a comparison, a row for each strategy or variant: for the terminal, and as Markdown in `table.md`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from rich.table import Table
from rich.text import Text

from server import report_units as units
from simulations.sweep_cell import Figures, Outcome

RATIO = "to plain"  # a column more, where somebody's messages are not plain
HEADERS = ("strategy", "loss, everybody's", "to the best", "loss, own files", "up", "down", "time", "aggregation error")
NOTE = (
    "Held-out loss after the last round, nats per token: mean ± sample standard deviation over the seeds. Everybody's: all "
    "clients' examples together; to the best: its difference to the first row, seed by seed; own files: each client's own, "
    "mean over the clients. Of personal models, everybody's is the mean over the clients' models. Bytes are per client and "
    "round, of training and evaluation both; time is of the whole run."
)
RATIO_NOTE = " To plain: how many times as large both directions of training rounds were, were every number sent as it is."


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None with one value)."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not all(map(math.isfinite, values)):
            return cls(math.nan, None)
        return cls(fmean(values), stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return self.written(lambda mean: f"{mean:.3f}")

    def written(self, mean: Callable[[float], str]) -> str:
        if math.isnan(self.mean):
            return "diverged"
        return mean(self.mean) if self.std is None else f"{mean(self.mean)} ± {self.std:.3f}"


@dataclass(frozen=True)
class Row:
    """One strategy or variant over its seeds; without figures where none of its cells ended well."""

    name: str
    figures: tuple[Figures, ...]
    notes: tuple[str, ...] = ()  # what cannot be or failed
    seeds: tuple[int, ...] = ()  # of the figures
    to_best: str = "-"
    coded: bool = False  # whether any row's messages are not plain

    def against(self, best: Row) -> str:
        """The difference of the losses to those of another row, over the seeds that both have."""
        theirs = {seed: figures.loss for seed, figures in zip(best.seeds, best.figures, strict=True)}
        both = [f.loss - theirs[seed] for seed, f in zip(self.seeds, self.figures, strict=True) if seed in theirs]
        return Spread.of(both).written(units.signed) if both and self is not best else "-"

    def spread(self, of: Callable[[Figures], float]) -> Spread:
        return Spread.of([of(figures) for figures in self.figures])

    @property
    def loss(self) -> Spread:
        return self.spread(lambda figures: figures.loss)

    @property
    def own(self) -> Spread:
        return self.spread(lambda figures: figures.own)

    @property
    def cells(self) -> tuple[str, ...]:
        """As `headers` names them."""
        if not self.figures:
            rest = len(headers([self])) - 2
            return (self.name, self.notes[0].partition(":")[0], *["-"] * rest)  # "failed" or "cannot"
        mean = lambda of: fmean(map(of, self.figures))  # noqa: E731
        return (
            self.name,
            str(self.loss),
            self.to_best,
            str(self.own),
            units.size(mean(lambda figures: figures.bytes_up)),
            units.size(mean(lambda figures: figures.bytes_down)),
            *([self._ratio()] if self.coded else []),
            units.duration(mean(lambda figures: figures.seconds)),
            self._aggregation_error(),
        )

    def _ratio(self) -> str:
        known = [figures.ratio for figures in self.figures if figures.ratio is not None]
        return units.ratio(fmean(known)) if known else "-"

    def _aggregation_error(self) -> str:
        errors = [figures.aggregation_error for figures in self.figures if figures.aggregation_error is not None]
        if errors:
            return units.metric(fmean(errors))
        return "exact" if self.figures[0].exact else "-"


def rows_of(outcomes: Iterable[Outcome], impossible: Mapping[str, str]) -> list[Row]:
    """Best loss first; what diverged, failed or cannot be comes last."""
    by_variant: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.seed):
        by_variant.setdefault(outcome.variant, []).append(outcome)
    rows = [_row(*item) for item in by_variant.items()]
    rows += [Row(name, (), (f"cannot: {reason}",)) for name, reason in impossible.items()]
    rows.sort(key=lambda row: (not row.figures, _last(row.loss.mean) if row.figures else 0.0, row.name))
    coded = any(is_coded(row) for row in rows)
    return [replace(row, coded=coded, to_best=row.against(rows[0]) if row.figures else row.to_best) for row in rows]


def is_coded(row: Row) -> bool:
    """Whether its messages are not as plain ones, as far as a ratio shows it."""
    return any(f"{figures.ratio:.1f}" != "1.0" for figures in row.figures if figures.ratio is not None)


def headers(rows: Sequence[Row]) -> tuple[str, ...]:
    coded = any(row.coded for row in rows)
    return (*HEADERS[:6], *([RATIO] if coded else []), *HEADERS[6:])


def note(rows: Sequence[Row]) -> str:
    return NOTE + (RATIO_NOTE if any(row.coded for row in rows) else "")


def _row(variant: str, outcomes: Sequence[Outcome]) -> Row:
    strategy = outcomes[0].strategy
    name = variant if variant == strategy else f"{variant} ({strategy})"
    troubles = dict.fromkeys(f"{outcome.state}: {outcome.reason}" for outcome in outcomes if outcome.state != "done")
    done = tuple(outcome.figures for outcome in outcomes if outcome.figures)
    seeds = tuple(outcome.seed for outcome in outcomes if outcome.figures)
    few = f"{len(done)} of {len(outcomes)} seeds, " if done else ""
    return Row(name, done, tuple(few + trouble for trouble in troubles), seeds)


def base_cells(rows: Sequence[Row]) -> tuple[str, ...] | None:
    """The base model's row. None where the variants do not evaluate on the same examples."""
    of = [(row.spread(lambda f: f.base), row.spread(lambda f: f.base_own)) for row in rows if len(row.figures) == _most(rows)]
    if not of or any(not math.isclose(base.mean, of[0][0].mean, rel_tol=1e-3) for base, _ in of):
        return None
    return ("base model", str(of[0][0]), "-", str(of[0][1]), *["-"] * (len(headers(rows)) - 4))


def rich_table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, header_style="bold", caption=note(rows), caption_justify="left")
    first, *others = headers(rows)
    table.add_column(first, no_wrap=True)
    for header in others:
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(*map(Text, row.cells))
    if base := base_cells(rows):
        table.add_row(*map(Text, base), style="dim")
    return table


def markdown(title: str, rows: Sequence[Row]) -> str:
    """As GitHub shows it."""
    heads = headers(rows)
    lines = [_line(heads), "|---|" + "---:|" * (len(heads) - 1)]
    lines += [_line(row.cells) for row in rows]
    if base := base_cells(rows):
        lines.append(_line(base))
    notes = [f"- {_escaped(note)}" for note in notes_of(rows)]
    return "\n".join([f"# {title}", "", *lines, "", note(rows), *["", *notes][: 2 * len(notes)], ""])


def notes_of(rows: Sequence[Row]) -> list[str]:
    """A line for each cell or strategy that has no figures."""
    return [f"{row.name}: {units.one_line(note, 300)}" for row in rows for note in row.notes]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _most(rows: Sequence[Row]) -> int:
    return max((len(row.figures) for row in rows), default=0) or 1


def _last(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
