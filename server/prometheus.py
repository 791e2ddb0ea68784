"""Figures of a server for Prometheus: `fedtune server --metrics HOST:PORT`, read from its folder whenever they are scraped.

So they cost a run nothing, and after a restart they count on: what is counted lies in `metrics.jsonl`, not in this process.
No client is named, unless that was asked for: each name would be a series of its own.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from fedtune.daemon import State
from fedtune.errors import UserError
from fedtune.growing import Growing
from fedtune.security.addresses import Address
from server.records import RoundRecord

# What the reason of an answer that did not count is summed up as, by words that it holds; the first that fits.
REASONS = {
    "not finite": "not_finite",
    "wanted a finite": "not_finite",
    "weight": "weight",
    "norm": "norm",
    "shape": "shape",
    "malformed": "malformed",
    "signed": "signature",
    "signature": "signature",
    "base model": "base_model",
    "no answer within": "no_answer",
    "not connected": "away",
    "policy.": "policy",
    "memory ran out": "memory",
    "sits out": "sits_out",
}
OTHER = "other"
PHASES = ("starting", "waiting", "running", "finished", "failed", "stopped")


@dataclass(frozen=True)
class Counted:
    """What is kept of a round, however many clients it had."""

    loss: float | None
    seconds: float
    down: int
    up: int
    outcomes: Mapping[tuple[str, str], int]  # (accepted, refused or failed; why) -> how many
    failed: Mapping[str, str]  # client -> the same why; empty unless clients are named

    @classmethod
    def of(cls, record: RoundRecord, names: bool) -> Counted:
        outcomes = {client: outcome(one.failed) for client, one in record.clients.items()}
        failed = {client: why for client, (what, why) in outcomes.items() if names and what != "accepted"}
        return cls(record.loss, record.seconds, record.bytes_down, record.bytes_up, Counter(outcomes.values()), failed)


def outcome(failed: str | None) -> tuple[str, str]:
    """Of an answer, from the reason in its record."""
    if failed is None:
        return "accepted", ""
    why = next((short for words, short in REASONS.items() if words in failed), OTHER)
    return ("refused" if failed.startswith("refused:") else "failed"), why


class ServerCollector(Collector):
    """Of the server whose folder it is."""

    def __init__(self, folder: Path, names: bool = False) -> None:
        self._folder, self._names = folder, names
        self._run, self._lines = "", Growing(folder / "metrics.jsonl")
        self._rounds: dict[int, Counted] = {}  # a round that is played again counts once

    def collect(self) -> Iterator[Metric]:
        try:
            state = State.read(self._folder)
        except UserError:
            return
        self._read(str(state.run.get("folder", "")))
        yield from _standing(state)
        yield from _rounds(self._rounds)
        yield _free(Path(self._run or self._folder))
        if self._names:
            yield from _named(state, self._rounds)

    def _read(self, run: str) -> None:
        """The lines of the run's rounds that were added since the last scrape."""
        if run != self._run:
            self._run, self._lines, self._rounds = run, Growing(Path(run) / "metrics.jsonl"), {}
        for line in self._lines.new() if run else ():
            try:
                record = RoundRecord.from_json(json.loads(line))
            except (ValueError, TypeError, LookupError, AttributeError):
                continue  # of another version, or half a line that a crash has left
            self._rounds[record.round] = Counted.of(record, self._names)


@contextmanager
def scraped_at(at: Address, folder: Path, names: bool = False) -> Iterator[int]:
    """Within, http://HOST:PORT/metrics tells the figures; yields the port. Raises UserError where nothing can listen there."""
    registry = CollectorRegistry()
    registry.register(ServerCollector(folder, names))
    try:
        server, thread = start_http_server(at.port, at.host, registry)
    except OSError as error:
        raise UserError(
            f"--metrics {at}: nothing can listen there ({error.strerror}); wanted an address of this machine"
        ) from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _standing(state: State) -> Iterator[Metric]:
    yield _gauge(
        "phase", "1 for the phase that the server is in", "phase", {name: float(state.phase == name) for name in PHASES}
    )
    counted = Counter(state.clients.values()) if state.alive else Counter[str]()
    clients = {word: float(counted[word]) for word in ("connected", "missing", "revoked")}
    yield _gauge("clients", "clients by how they stand", "state", clients)
    up = {name: float(process.get("pid") is not None) for name, process in state.processes.items()}
    yield _gauge("process_up", "whether a process of the server runs", "process", up)
    restarts = CounterMetricFamily("fedtune_process_restarts", "times that a process was started again", labels=["process"])
    for name, process in state.processes.items():
        restarts.add_metric([name], float(process.get("restarts", 0)))
    yield restarts
    if "rounds" in state.run:
        yield GaugeMetricFamily("fedtune_rounds_planned", "rounds of the run", value=float(state.run["rounds"]))


def _rounds(rounds: Mapping[int, Counted]) -> Iterator[Metric]:
    if not rounds:
        return
    last, losses = max(rounds), [one.loss for _, one in sorted(rounds.items()) if one.loss is not None]
    yield GaugeMetricFamily("fedtune_round", "the last round that was finished; 0 is before training", value=float(last))
    if losses:
        yield GaugeMetricFamily("fedtune_held_out_loss", "the last one, over all clients", value=losses[-1])
    yield GaugeMetricFamily("fedtune_last_round_seconds", "that the last round took", value=rounds[last].seconds)
    seconds = sum(one.seconds for one in rounds.values())
    yield SummaryMetricFamily("fedtune_round_seconds", "that rounds took", count_value=len(rounds), sum_value=seconds)
    sent = CounterMetricFamily("fedtune_bytes", "tensors and headers, to (down) and from (up) clients", labels=["direction"])
    sent.add_metric(["down"], float(sum(one.down for one in rounds.values())))
    sent.add_metric(["up"], float(sum(one.up for one in rounds.values())))
    yield sent
    answers = CounterMetricFamily(
        "fedtune_answers", "of clients in rounds, by what became of them", labels=["outcome", "reason"]
    )
    totals = sum((Counter(one.outcomes) for one in rounds.values()), Counter({("accepted", ""): 0}))
    for (what, why), count in sorted({("accepted", ""): 0, **totals}.items()):
        answers.add_metric([what, why], float(count))
    yield answers


def _named(state: State, rounds: Mapping[int, Counted]) -> Iterator[Metric]:
    there = {name: float(word == "connected") for name, word in state.clients.items()} if state.alive else {}
    yield _gauge("client_connected", "whether a client is connected", "client", there)
    failures = CounterMetricFamily(
        "fedtune_client_failures", "rounds in which a client did not count", labels=["client", "reason"]
    )
    for (client, why), count in sorted(Counter(pair for one in rounds.values() for pair in one.failed.items()).items()):
        failures.add_metric([client, why], float(count))
    yield failures


def _free(folder: Path) -> Metric:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return GaugeMetricFamily(
        "fedtune_free_disk_bytes", "on the disk of the run folder", value=float(shutil.disk_usage(there).free)
    )


def _gauge(name: str, about: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"fedtune_{name}", about, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
