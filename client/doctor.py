"""`fedtune doctor` on a client: whether the server is the right one, the data can be learnt from, the model fits the machine.

Nothing trains, no weights are loaded, and no text of the data is printed.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

from client.admission import Own
from client.allowance import Allowance, within
from client.data.classes import in_order, name_of
from client.data.examples import ClientData, Labelled
from client.data.formats import format_of
from client.data.load import split_rows
from client.data.readers import Row
from client.data.sources import Source, clients_in, rows_of
from client.loading import load_tokenizer
from client.policy import Policy
from fedtune.base import base_hash, model_folder
from fedtune.checks import Finding, Look, clock, disk, ram, versions, vram
from fedtune.errors import DataError, FedtuneError, ModelError, nearest
from fedtune.job import Clients, Job
from fedtune.needs import Needs
from fedtune.paths import app_root
from fedtune.security.certificates import days_left, expires
from fedtune.security.handover import Bundle
from fedtune.security.probe import Probe, probe

SOON = 30  # days
GUARDS = (
    "import json; from client.guards import raise_guards; print(json.dumps([[g.name, g.on, g.why] for g in raise_guards()]))"
)


@dataclass(frozen=True)
class Examined:
    """What a client would be started with; what is not given is not looked at."""

    bundle: Path | None = None
    data: str | None = None
    model: str | None = None
    policy: Path | None = None
    job: Job | None = None
    folder: Path | None = None  # its --dir

    def checks(self) -> dict[str, Look]:
        looks: dict[str, Look] = {"versions": versions, "guards": self.guards}
        looks |= {"keys": self.keyed, "server": self.server} if self.bundle else {}
        looks |= {"policy": self.allowed} if self.policy or self.job else {}
        looks |= {"base": self.base} if self.model or self.job else {}
        looks |= {"data": self.learnt} if self.data or self.job else {}
        return looks | ({"memory": self.memory, "disk": self.room} if self.job else {})

    @cached_property
    def _job(self) -> Job:
        """With this node's own model and data, as its trainer has it."""
        job = self.job or Job()
        model = job.model.model_copy(update={"path": self.model} if self.model else {})
        return job.model_copy(
            update={"model": model, "data": job.data.model_copy(update={"path": self.data} if self.data else {})}
        )

    @cached_property
    def _keys(self) -> Bundle:
        assert self.bundle is not None
        return Bundle.load(self.bundle, "both")

    @cached_property
    def _rules(self) -> Policy:
        return Policy.load(self.policy) if self.policy else Policy()

    @cached_property
    def _needs(self) -> Needs:
        return Needs.of(self._job)

    @cached_property
    def _name(self) -> str | None:
        """None where the bundle, if one was given, cannot be read: that is said once, by `keys`."""
        try:
            return self._keys.name if self.bundle else ""
        except (FedtuneError, OSError):
            return None

    def guards(self) -> Iterator[Finding]:
        """Raised in a process of its own, which ends with them."""
        environment = os.environ | {"PYTHONPATH": str(app_root())}
        done = subprocess.run([sys.executable, "-c", GUARDS], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            yield Finding("guards", "warn", f"cannot be raised: {done.stderr.strip()[-200:]}")
            return
        for name, on, why in json.loads(done.stdout):
            yield Finding("guards", "ok" if on else "warn", f"{name} {'on' if on else 'OFF'}: {why}")

    def keyed(self) -> Iterator[Finding]:
        """Their modes were looked at when they were read."""
        keys = self._keys
        assert keys.ca is not None
        pem = keys.ca.read_bytes()
        left = days_left(pem)
        found = f"client '{keys.name}' for {keys.server}; the authority holds until {expires(pem):%Y-%m-%d}, {left} days"
        result = "fail" if left < 0 else "warn" if left < SOON else "ok"
        yield Finding("keys", result, found, "" if result == "ok" else "ask the coordinator for a new bundle")

    def server(self) -> Iterator[Finding]:
        if self._name is None:
            return
        seen = probe(self._keys.server, self._keys.ca)
        yield from self._reached(seen)
        if seen.reachable:
            yield clock(seen.clock, f"the clock of {self._keys.server}")

    def _reached(self, seen: Probe) -> Iterator[Finding]:
        if seen.refused:
            yield Finding("server", "warn", seen.problem or "", "a client that is started before its server waits for it")
        elif seen.problem:
            yield Finding("server", "fail", seen.problem)
        else:
            until = f", its certificate holds until {seen.expires:%Y-%m-%d}" if seen.expires else ""
            yield Finding("server", "ok", f"{self._keys.server} answers by TLS and is the coordinator's{until}")

    def allowed(self) -> Iterator[Finding]:
        rules = self._rules
        if self.policy:
            on = sorted(rules.model_fields_set)
            yield Finding("policy", "ok", f"{self.policy} can be read: {', '.join(on) or 'no rule is on'}")
            if self.policy.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                yield Finding("policy", "warn", f"others can write {self.policy}", f"chmod go-w {self.policy}")
        if self.job:
            rules.admit_job(self.job, Own(self._name or "", bool(self.model), bool(self.data)))
            yield Finding("policy", "ok", "the job is allowed; hours and rounds of a day are looked at when it asks")

    def base(self) -> Iterator[Finding]:
        found = base_hash(model_folder(self._job.model))
        self._rules.admit_base(found)
        load_tokenizer(self._job)
        yield Finding("base", "ok", f"{found} of {self._job.model.path}; `fedtune doctor` on the coordinator must say the same")
        if self.job and self.model:
            yield from self._like_the_job(self.job, found)

    def _like_the_job(self, job: Job, found: str) -> Iterator[Finding]:
        """Where the job's own model can be found here without a network."""
        if not (job.model.path.startswith("builtin:") or Path(job.model.path).expanduser().is_dir()):
            return
        try:
            wanted = base_hash(model_folder(job.model))
        except ModelError:
            return
        if wanted != found:
            yield Finding("base", "fail", f"the job's model {job.model.path} is {wanted}", "give this client the same files")

    def learnt(self) -> Iterator[Finding]:
        with within(Allowance(columns=self._rules.reads)):  # so no error quotes a text
            source, job = self._source(), self._job
            rows = rows_of(source)
            columns = format_of(rows[0], job.model.task, str(source.path)).columns
            labels = job.model.label_names or _labels(rows, job.model.task, str(source.path))
            read = split_rows(source, job.data, job.model.task, load_tokenizer(job), job.seed, labels)
        yield Finding("data", "ok", f"{source.path}: {len(rows)} rows, {_counted(read)}; columns {', '.join(columns)}")
        yield from _lengths(read, job)
        if job.model.task == "classification":
            yield _classes(read)
        self._rules.admit_steps(job.train.steps_for(len(read.train)))

    def _source(self) -> Source:
        found = clients_in(self._job.data, Clients())
        if self._name is not None and self._name not in found and len(found) > 1:
            raise DataError(
                f"{self._job.data.path} holds {len(found)} clients, none of them '{self._name}'{nearest(self._name, found)}"
            )
        return found.get(self._name or "") or next(iter(found.values()))

    def memory(self) -> Iterator[Finding]:
        import torch

        gpu = torch.cuda.is_available() and not self._job.machine.device.startswith("cpu")
        yield vram(self._needs.training(gpu=True), "a step") if gpu else ram(self._needs.training(gpu=False), "a step")

    def room(self) -> Iterator[Finding]:
        yield disk(self.folder or Path.cwd(), self._needs.client_folder(), "what this client keeps")


def _counted(read: ClientData) -> str:
    return f"{len(read.train)} examples to train on, {len(read.held_out)} held out"


def _lengths(read: ClientData, job: Job) -> Iterator[Finding]:
    lengths = [len(example.input_ids) for example in [*read.train, *read.held_out]]
    longest, most = max(lengths), job.data.max_length
    found = f"{min(lengths)} to {longest} tokens an example, {median(lengths):g} in the middle; data.max_length is {most}"
    cut = sum(length >= most for length in lengths)
    yield Finding(
        "data",
        "ok",
        f"{found}; {cut} of {len(lengths)} are as long: longer texts end there, or go on in the next" if cut else found,
    )


def _labels(rows: Sequence[Row], task: str, where: str) -> list[str] | None:
    """Of this client alone, where the job does not name them: enough to count."""
    if task != "classification":
        return None
    return in_order({name_of(row.get("label"), f"{where}, row {number}") for number, row in enumerate(rows, 1)})


def _classes(read: ClientData) -> Finding:
    counts = Counter(one.label for one in [*read.train, *read.held_out] if isinstance(one, Labelled))
    few, most = min(counts.values()), max(counts.values())
    words = f"{len(counts)} labels, the rarest has {few} examples and the most frequent {most}"
    if len(counts) < 2:
        return Finding("data", "warn", words, "one label alone teaches little")
    return Finding("data", "ok", words)
