"""What `make faults` says at its end: tables on the terminal, and between two marks of docs/reliability.md."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedtune import __version__
from fedtune.paths import app_root
from simulations.faults_seen import HEADER, Seen, rows

BEGIN, END = "<!-- from here: written by make faults FULL=1 -->", "<!-- to here -->"


@dataclass(frozen=True)
class Outcome:
    """Of all families, by their titles; `left_out` are reasons why something was not done."""

    seed: int
    seconds: float
    seen: Mapping[str, Sequence[Seen]]
    at: Mapping[tuple[str, str], int]  # process and line of the journal -> SIGKILLs over sockets
    left_out: Sequence[str] = ()

    @property
    def all(self) -> list[Seen]:
        return [seen for family in self.seen.values() for seen in family]

    @property
    def faultless(self) -> bool:
        return all(seen.faultless for seen in self.all)


def write(page: Path, outcome: Outcome) -> None:
    """Between the marks; what stands before and after them was written by hand."""
    text = page.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{markdown(outcome)}\n{END}{after}", encoding="utf-8")


def markdown(outcome: Outcome) -> str:
    parts = [f"{made_on(outcome)}\n\n{summary(outcome)}"]
    for title, seen in outcome.seen.items():
        parts.append(f"### {title}\n\n{table(HEADER, [row.cells() for row in rows(seen)])}")
    if outcome.at:
        parts.append(f"### Which process, killed after which line of the journal\n\n{which(outcome.at)}")
    if bad := [seen for seen in outcome.all if not seen.faultless]:
        parts.append("### Where something was lost\n\n" + "\n".join(f"- {seen.fault}, {seen.where}" for seen in bad))
    parts += [f"Left out: {reason}." for reason in outcome.left_out]
    return "\n\n".join(parts) + "\n"


def made_on(outcome: Outcome) -> str:
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    date = datetime.now(UTC).date()
    return f"{date}, fedtune {__version__} at {commit()}; {machine}; seed {outcome.seed}; {outcome.seconds / 60:.0f} minutes."


def summary(outcome: Outcome) -> str:
    times = sum(seen.times for seen in outcome.all)
    wrong = sum(seen.wrong for seen in outcome.all)
    lost = sum(seen.lost for seen in outcome.all)
    other = sum(not seen.well for seen in outcome.all)
    deployed = sum(outcome.at.values())
    gone = sum(seen.same is False and not seen.mendable for seen in outcome.all)
    besides = f" {gone} runs have other bits, since what one client alone had kept was destroyed." if gone else ""
    return (
        f"**{times:,} faults, {deployed} of them a SIGKILL to a process of a deployment. Answers lost: {lost}. "
        f"Wrong bits: {wrong}. Runs that did not end as they should: {other}.**{besides}"
    )


def commit() -> str:
    def said(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=app_root(), capture_output=True, text=True, check=False).stdout.strip()

    changed = [line for line in said("status", "--porcelain", "-uno").splitlines() if not line.endswith("docs/reliability.md")]
    return (said("rev-parse", "--short", "HEAD") or "no commit") + (" with changes" if changed else "")


def which(at: Mapping[tuple[str, str], int]) -> str:
    processes = list(dict.fromkeys(process for process, _ in at))
    lines = list(dict.fromkeys(line for _, line in at))
    body = [[f"`{line}`", *(str(at.get((process, line), 0)) for process in processes)] for line in lines]
    return table(["line", *processes], body)


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join(_lines(header, body))


def _lines(header: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for cells in body:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def show(outcome: Outcome, console: Console) -> None:
    for title, seen in outcome.seen.items():
        shown = Table(*HEADER, title=title)
        for row in rows(seen):
            shown.add_row(*row.cells(), style="" if row.faultless else "bold red")
        console.print(shown)
    for one in outcome.all:
        if not one.faultless:
            console.print(f"not as it should be: {one.fault}: {one.where}: {one.ending}", markup=False, style="red")
    for reason in outcome.left_out:
        console.print(f"left out: {reason}")
    console.print(summary(outcome).strip("*"))
