"""The pieces of the live table: rows, the line of what is being done, failures, the comparison."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedtune.job import Job
from server import report_figures as figures
from server import report_units as units
from server.records import Comparison, RoundRecord

FAILURES_SHOWN = NOTES_SHOWN = 4


@dataclass(frozen=True)
class Doing:
    """'training', 3 of 8, for so long already."""

    what: str
    done: int
    total: int
    since: float  # time.monotonic()


class Words:
    """Renders records for one console: nothing that its encoding cannot say, no control codes of a stranger."""

    def __init__(self, console: Console):
        self._encoding = console.encoding

    def say(self, text: str, limit: int = 200) -> str:
        text = units.one_line(text.replace("−", "-").replace("–", "-"), limit)
        return text.encode(self._encoding, "replace").decode(self._encoding)

    def title(self, job: Job, clients: Mapping[str, int]) -> str:
        name = self.say(f"{job.name}: {job.strategy.name}", 60)
        words = [name, units.plural(job.rounds.count, "round"), units.plural(len(clients), "client")]
        if examples := sum(clients.values()):  # across machines only the coordinator's process knows
            words.append(units.plural(examples, "training example"))
        return ", ".join(words)

    def line(self, record: RoundRecord, change: float | None, planned: int) -> str:
        """One round as one plain line."""
        number = f"round {record.round:>{len(str(planned))}}/{planned}" if planned else f"round {record.round}"
        loss = f"loss {units.loss(record.loss)}" + (f" ({units.signed(change)})" if change is not None else "")
        traffic = f"down {units.size(record.bytes_down):>7}  up {units.size(record.bytes_up):>7}"
        traffic += f"  {units.ratio(record.ratio):>6} smaller" if figures.compressed([record]) else ""
        words = f"{number}  {loss:<19}  {traffic}  {units.duration(record.seconds):>6}  {_answered(record)} clients"
        failed = [f"{client}: {reason}" for _, client, reason in figures.failures([record])]
        more = f"; and {len(failed) - FAILURES_SHOWN} more" if len(failed) > FAILURES_SHOWN else ""
        words += "  failed: " + "; ".join(failed[:FAILURES_SHOWN]) + more if failed else ""
        notes = [self.say(note) for note in record.notes[:NOTES_SHOWN]]
        return self.say(words + ("  note: " + "; ".join(notes) if notes else ""), 1000)

    def table(self, title: str, rounds: Sequence[RoundRecord], room: int) -> Table:
        """The newest `room` rounds."""
        smaller = figures.compressed(rounds)  # a column more, which must find its room in 80
        table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        table.collapse_padding = smaller
        for heading in ("round", "held-out loss", "change", "down", "up", *(["ratio"] if smaller else []), "time", "clients"):
            table.add_column(heading, justify="right", no_wrap=True)
        for record, change in list(zip(rounds, figures.changes(rounds), strict=True))[-room:]:
            table.add_row(*self._cells(record, change, smaller))
        return table

    def _cells(self, record: RoundRecord, change: float | None, smaller: bool) -> list[Text]:
        answered = Text(_answered(record), style="bold red" if record.answered < len(record.clients) else "")
        better = "green" if change is not None and change < 0 else "yellow"
        return [
            Text(str(record.round)),
            Text(self.say(units.loss(record.loss)), style="bold"),
            Text(self.say(units.signed(change)) if change is not None else "", style=better),
            Text(units.size(record.bytes_down)),
            Text(units.size(record.bytes_up)),
            *([Text(self.say(units.ratio(record.ratio)))] if smaller else []),
            Text(units.duration(record.seconds)),
            answered,
        ]

    def failures(self, failed: Sequence[tuple[int, str, str]], limit: int, wrap: bool = False) -> Text:
        """The newest `limit` failures; a line each, or their whole reasons."""
        lines = [self.say(f"round {number}, {client}: {reason}") for number, client, reason in failed[-limit:]]
        if len(failed) > limit:
            lines.insert(0, f"{len(failed) - limit} failures before these")
        return Text("\n".join(lines), style="red", no_wrap=not wrap, overflow="fold" if wrap else "ellipsis")

    def notes(self, noted: Sequence[tuple[int, str]], limit: int, wrap: bool = False) -> Text:
        """The newest `limit` notes, a line each."""
        lines = [self.say(f"round {number}: {note}") for number, note in noted[-limit:]]
        return Text("\n".join(lines), style="yellow", no_wrap=not wrap, overflow="fold" if wrap else "ellipsis")

    def doing(self, now: Doing | None, round: int, planned: int) -> RenderableType:
        if now is None:
            return Text("")
        grid = Table.grid(padding=(0, 1))
        where = f"round {round} of {planned}" if round <= planned else ""
        bar = ProgressBar(total=max(now.total, 1), completed=now.done, width=20)
        seconds = units.duration(time.monotonic() - now.since)
        grid.add_row(Text(where), Text(self.say(now.what, 30), style="bold"), bar, Text(f"{now.done} of {now.total}"), seconds)
        return grid

    def comparison(self, comparison: Comparison, rounds: Sequence[RoundRecord]) -> Table:
        title = "On everybody's held-out examples"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("model", no_wrap=True)
        for heading in ("loss", "perplexity", "to federated"):
            table.add_column(heading, justify="right", no_wrap=True)
        for standing in figures.summary(comparison):
            cells = self._standing(standing, comparison.federated)
            table.add_row(*map(Text, cells), style="bold" if standing.kind == "federated" else None)
        table.caption = Text(self._traffic(rounds))
        table.caption_justify = "left"
        return table

    def comparison_lines(self, comparison: Comparison, rounds: Sequence[RoundRecord]) -> list[str]:
        lines = ["on everybody's held-out examples: loss, perplexity, difference to federated"]
        for standing in figures.summary(comparison):
            name, loss, perplexity, difference = self._standing(standing, comparison.federated)
            lines.append(f"  {name:<32} {loss:>8} {perplexity:>10} {difference:>8}")
        return [*lines, self._traffic(rounds)]

    def _standing(self, standing: figures.Standing, federated: float) -> tuple[str, str, str, str]:
        name = standing.name + (f" ({standing.note})" if standing.note else "")
        difference = "" if standing.kind == "federated" else units.signed(standing.loss - federated)
        loss, perplexity = units.loss(standing.loss), units.perplexity(standing.loss)
        return self.say(name, 32), self.say(loss), self.say(perplexity), self.say(difference)

    def _traffic(self, rounds: Sequence[RoundRecord]) -> str:
        traffic = figures.bytes_per_client(rounds)
        if traffic is None:
            return ""
        words = f"{units.size(traffic[0])} down and {units.size(traffic[1])} up per client and round"
        smaller = figures.compressed(rounds)
        return words + (f", {units.ratio(figures.ratio(rounds))} smaller than plain numbers" if smaller else "")


def _answered(record: RoundRecord) -> str:
    return f"{record.answered}/{len(record.clients)}"
