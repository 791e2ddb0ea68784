"""What the report shows, ready for the template: headline figures, charts, the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server import report_charts as charts
from server import report_figures as figures
from server import report_units as units
from server.records import Comparison, RoundRecord
from server.report_clients import SHOWN
from server.report_folder import RecordedRun


@dataclass(frozen=True)
class Headline:
    name: str
    value: str
    note: str


def lede(run: RecordedRun) -> str:
    """What ran, in one line."""
    method = section(run.job, "strategy").get("name") or run.job.get("strategy")
    rounds, clients = run.rounds[-1].round, len(figures.client_names(run.rounds))
    parts = [str(method)] if isinstance(method, str) else []
    parts += [units.plural(rounds, "round"), units.plural(clients, "client")]
    base = run.base_model or section(run.job, "model").get("path")
    return ", ".join(parts) + (f", on {base}" if base else "")


def section(job: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = job.get(name)
    return found if isinstance(found, Mapping) else {}


def metric_names(rounds: Sequence[RoundRecord]) -> list[str]:
    """The method's own metrics; perplexity has its column already."""
    return sorted({name for r in rounds for name in r.metrics} - {"perplexity", "loss"})


def layers(rounds: Sequence[RoundRecord]) -> list[str]:
    """The modules whose aggregation error was measured, in the model's order."""
    return list(dict.fromkeys(path for record in rounds for path in record.layer_errors))


def headlines(run: RecordedRun) -> list[Headline]:
    return [_loss(run), _traffic(run.rounds), _time(run), _answers(run.rounds)]


def _loss(run: RecordedRun) -> Headline:
    ends = figures.first_and_last(r.loss for r in run.rounds)
    last = figures.last(r.loss for r in run.rounds)
    note = f"perplexity {units.perplexity(last)}" if last is not None else "not measured"
    if ends is not None:
        begin = "the base model" if units.known(run.rounds[0].loss) is not None and run.rounds[0].round == 0 else "the first"
        note = f"{units.signed(ends[1] - ends[0])} to {begin} ({units.loss(ends[0])}), {note}"
    return Headline("held-out loss, nats per token", units.loss(last), note)


def _traffic(rounds: Sequence[RoundRecord]) -> Headline:
    total = sum(r.bytes_down + r.bytes_up for r in rounds)
    mean = figures.bytes_per_client(rounds)
    if mean is None:
        return Headline("bytes in all", units.size(total), "no training round yet")
    note = f"{units.size(mean[0])} down, {units.size(mean[1])} up; {units.size(total)} in the whole run"
    if figures.compressed(rounds):
        note += f"; {units.ratio(figures.ratio(rounds))} smaller than plain numbers"
    return Headline("bytes per client and round", units.size(sum(mean)), note)


def _time(run: RecordedRun) -> Headline:
    training = [r.seconds for r in run.rounds if r.round > 0]
    mean = f"{units.duration(sum(training) / len(training))} a round" if training else "no training round yet"
    return Headline("time", units.duration(sum(r.seconds for r in run.rounds)), mean)


def _answers(rounds: Sequence[RoundRecord]) -> Headline:
    failed, asked = len(figures.failures(rounds)), sum(len(r.clients) for r in rounds)
    return Headline("failures", units.count(failed), f"of {units.count(asked)} times that a client was asked")


def loss_chart(run: RecordedRun) -> charts.Chart | None:
    values = {r.round: units.known(r.loss) for r in run.rounds}
    found = [value for _, value in charts.measured(values)]
    if not found:
        return None
    central = units.known(run.comparison.central) if run.comparison else None
    scale = charts.around([*found, *([central] if central is not None else [])])
    x = charts.Rounds.of(run.rounds)
    reference = charts.Tick(scale.y(central), f"central training {units.loss(central)}") if central is not None else None
    return charts.Chart(
        title="Held-out loss by round",
        summary=f"Line chart: held-out loss from {units.loss(found[0])} to {units.loss(found[-1])}.",
        x_ticks=x.ticks(),
        y_ticks=scale.ticks(),
        path=charts.line(x, scale, values),
        dots=charts.dots(x, scale, values, units.loss),
        ends=_ends(x, scale, charts.measured(values)),
        reference=reference,
    )


def _ends(x: charts.Rounds, scale: charts.Scale, found: Sequence[tuple[int, float]]) -> list[charts.Dot]:
    """The first and the last loss are written beside their dots."""
    return [charts.Dot(x.x(n), scale.y(v), units.loss(v)) for n, v in dict.fromkeys((found[0], found[-1]))]


def bytes_chart(rounds: Sequence[RoundRecord]) -> charts.Chart:
    down: dict[int, float] = {r.round: r.bytes_down for r in rounds}
    up: dict[int, float] = {r.round: r.bytes_up for r in rounds}
    scale, x = charts.from_zero([*down.values(), *up.values()]), charts.Rounds.of(rounds)
    return charts.Chart(
        title="Bytes by round, all clients",
        summary=f"Bar chart: {units.size(sum(down.values()))} down and {units.size(sum(up.values()))} up in all.",
        x_ticks=x.ticks(),
        y_ticks=scale.ticks(units.size_tick),
        bars=charts.bars(x, scale, [("down", down), ("up", up)], units.size),
        legend=("down", "up"),
    )


def seconds_chart(rounds: Sequence[RoundRecord]) -> charts.Chart:
    seconds = {r.round: units.known(r.seconds) or 0.0 for r in rounds}
    scale, x = charts.from_zero(list(seconds.values())), charts.Rounds.of(rounds)
    return charts.Chart(
        title="Seconds by round",
        summary=f"Bar chart: {units.duration(sum(seconds.values()))} in all.",
        x_ticks=x.ticks(),
        y_ticks=scale.ticks(unit=" s"),
        bars=charts.bars(x, scale, [("time", seconds)], units.duration),
    )


def comparison_rows(comparison: Comparison | None) -> list[tuple[figures.Standing, float]]:
    """Each line with the length of its bar in per cent; bars start at 0."""
    if comparison is None:
        return []
    many = len(comparison.alone) > SHOWN
    standings = figures.summary(comparison) if many else figures.everybody(comparison)
    longest = max((units.known(s.loss) or 0.0 for s in standings), default=0.0) or 1.0
    return [(s, round(100 * max(units.known(s.loss) or 0.0, 0.0) / longest, 2)) for s in standings]


def verdict(comparison: Comparison | None) -> str:
    """The two questions of federated training: better than alone, and how far from pooling everything."""
    if comparison is None:
        return ""
    beaten, alone = sum(comparison.federated < loss for loss in comparison.alone.values()), len(comparison.alone)
    words = f"Federated training is better than {beaten} of {units.plural(alone, 'client')} alone" if alone else ""
    if not comparison.central > 0:
        return words + "." if words else ""
    gap = 100 * (comparison.federated / comparison.central - 1)
    distance = f"{abs(gap):.1f} % {'above' if gap >= 0 else 'below'} central training"
    return f"{words}, and {distance}." if words else f"Federated training is {distance}."
