"""How a server or client stands, read from its folder alone: what `fedtune status` shows and `fedtune stop` looks at."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedtune.daemon import OVER, State
from fedtune.processes import tail
from server.journal import NAME, entry_of
from server.report_units import duration, loss, one_line, plural

AT_WORK = ("waiting", "running")
FAR = 1 << 16  # bytes of the journal in which its last line is looked for
GONE = "gone"  # ended without a last word: killed, or the machine was


@dataclass(frozen=True)
class Standing:
    state: State
    last: Mapping[str, Any]  # the last line of `metrics.jsonl`
    event: Mapping[str, Any] = field(default_factory=dict)  # the last of `journal.jsonl`: what, at, and which

    @classmethod
    def read(cls, folder: Path) -> Standing:
        """Raises UserError where nothing was started."""
        state = State.read(folder)
        run = state.run.get("folder")
        return cls(state, last_line(Path(run) / "metrics.jsonl"), last_event(Path(run) / NAME)) if run else cls(state, {})

    @property
    def phase(self) -> str:
        return self.state.phase if self.state.alive or self.state.phase in OVER else GONE

    @property
    def well(self) -> bool:
        return self.state.alive or self.state.phase == "finished"

    @property
    def ready(self) -> bool:
        """It is at work, and none of its processes is down."""
        up = all(process.get("pid") for process in self.state.processes.values())
        return self.state.alive and self.state.phase in AT_WORK and up

    @property
    def refused(self) -> dict[str, str]:
        """Clients that did not count in the last round, each with the reason."""
        clients = self.last.get("clients", {})
        return {name: str(one["failed"]) for name, one in clients.items() if one.get("failed")}

    def as_json(self) -> dict[str, Any]:
        run = {**self.state.run, **({"round": self.last["round"], "loss": self.last["loss"]} if self.last else {})}
        found = {"phase": self.phase, "alive": self.state.alive, "ready": self.ready, "run": run, "clients": self._clients}
        return {**asdict(self.state), **found, "refused": self.refused, "journal": dict(self.event)}

    @property
    def _clients(self) -> Mapping[str, str]:
        """Nobody is connected to a server that has ended."""
        return self.state.clients if self.state.alive else {}

    def lines(self) -> Iterator[str]:
        state = self.state
        named = f" {state.name}" if state.name else ""
        yield f"{state.role}{named}: {self.phase}{': ' * bool(state.why)}{one_line(state.why, 1000)}"
        if state.alive:
            yield f"  since      {duration(time.time() - state.started)}, pid {state.pid}"
        if state.address:
            yield f"  address    {state.address}"
        if state.run:
            yield f"  run        {self._run()}"
        if self.event:
            yield f"  journal    {one_line(event_words(self.event, time.time()), 200)}"
        groups = {"clients": self._clients, "not counted": self.refused, "guards": state.guards}
        for title, group in groups.items():
            for words, names in by_word(group).items():
                yield f"  {title:<10} {one_line(words, 200)}: {one_line(', '.join(names), 1000)}"
        for name, process in state.processes.items():
            yield f"  {'process':<10} {name}: {process_words(process)}"

    def _run(self) -> str:
        """A client knows neither how many rounds there are nor the run's folder."""
        run, last = self.as_json()["run"], self.last
        words = f"{run.get('name')}: round {run.get('round', 0)}"
        words += f" of {run['rounds']}" if "rounds" in run else ""
        words += f", held-out loss {loss(last['loss'])}" if last and last["loss"] is not None else ""
        words += f", in {run['folder']}" if "folder" in run else ""
        return one_line(words, 1000)


def process_words(process: Mapping[str, Any]) -> str:
    pid, restarts = process.get("pid"), process.get("restarts", 0)
    return (f"pid {pid}" if pid else "not running") + (f", started again {plural(restarts, 'time')}" if restarts else "")


def by_word(group: Mapping[str, str]) -> dict[str, list[str]]:
    """connected: a, b; missing: c."""
    found: dict[str, list[str]] = {}
    for name, word in group.items():
        found.setdefault(word, []).append(name)
    return found


def last_event(journal: Path) -> dict[str, Any]:
    """The last whole line, without its lists of clients; nothing where there is none."""
    entries = (entry_of(f"{line}\n".encode()) for line in reversed(tail(journal, FAR).split("\n")))
    entry = next((entry for entry in entries if entry is not None), None)
    if entry is None:
        return {}
    return {"what": entry.what, **{name: value for name, value in entry.about.items() if isinstance(value, str | int | float)}}


def event_words(event: Mapping[str, Any], now: float) -> str:
    """Such as `answered 7.0 north, 12 s ago`."""
    which = " ".join(str(event[name]) for name in ("number", "round", "ask", "client", "reason") if name in event)
    return f"{event['what']} {which}".strip() + (f", {duration(max(now - event['at'], 0.0))} ago" if "at" in event else "")


def last_line(metrics: Path) -> dict[str, Any]:
    """The last whole record; nothing where there is none."""
    if not metrics.is_file():
        return {}
    lines = metrics.read_bytes().split(b"\n")[:-1]  # what follows the last line break is still being written
    return next(filter(None, map(_record, reversed(lines))), {})


def _record(line: bytes) -> dict[str, Any]:
    """Nothing of a line that a crash has left half written."""
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return {}
