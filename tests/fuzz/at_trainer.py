"""Asks at a client's doors: signature, memory of asks, policy, job, and the trainer behind them with its wire and its memory.

Whatever comes, an envelope goes back; and where that says that nothing was answered, nothing has changed, in memory or on disk.
"""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal
from unittest.mock import patch

import torch
from google.protobuf.message import DecodeError

from client import doors, trainer_pb2
from client.kept import HOME, MANIFEST, Kept
from client.local import Local
from client.resident import Resident
from client.service import Service
from client.signed import Signed
from client.transport import from_proto, to_proto
from fedtune.envelope import Envelope
from fedtune.errors import ClientFailed, MalformedMessage, UserError
from fedtune.job import checked_job
from fedtune.security.sealing import is_sealed, opened
from fedtune.security.signing import ASK, Stamp, signed
from fedtune.strategy import Penalty
from simulations.stand import FIGURES, StandMovable
from tests.fuzz.mutations import damaged, mutated, rewritten
from tests.fuzz.postbox import COORDINATOR, HEADERS, KEYS, SEALING, STRANGER
from tests.fuzz.recorded import Recorded, plant, tree
from tests.fuzz.watch import Broken

CLIENT = "ann"
NOW = 18 * 10**17  # nanoseconds
MOMENTS = ((), ("hello",), ("hello", "0.evaluate", "1.0", "1.evaluate"), ("hello", "0.evaluate", "1.0", "1.evaluate", "2.0"))
MODES = ("own", "own", "own", "own", "changed after", "by another", "old", "of another run")
JOB = "job.json"
Job = dict[str, Any]


class AtTrainer:
    """`asks` come as envelopes, and nothing is trained; in `trained` it is, one step each. `messages` come as the relay sends
    them, as bytes."""

    def __init__(self, runs: Sequence[Recorded], folder: Path) -> None:
        self._clients = [
            _Client(run, folder / run.name / str(place), asks) for run in runs for place, asks in enumerate(MOMENTS)
        ]

    def asks(self, draw: Random) -> str:
        return self._asked(draw, trains=False)

    def trained(self, draw: Random) -> str:
        return self._asked(draw, trains=True)

    def _asked(self, draw: Random, trains: bool) -> str:
        client = draw.choice(self._clients)
        client.trains(trains, fails=draw.random() < 0.1)
        try:
            ask = from_proto(to_proto(client.ask(draw)))
        except (MalformedMessage, TypeError, ValueError):
            return "refused on its way"
        return client.judged(client.door.answer, ask)

    def messages(self, draw: Random) -> str:
        client = draw.choice(self._clients)
        client.trains(False)
        ask = client.ask(draw)
        try:
            message = _message(draw, ask)
        except (DecodeError, TypeError, ValueError):
            return "refused by protobuf"
        served = Service(client.door.answer)
        return client.judged(lambda ask: from_proto(served.Answer(message, None)), ask)

    def files(self, draw: Random) -> str:
        """What the client has stored is damaged, and it begins anew with what it finds."""
        client = draw.choice([client for client in self._clients if client.has_stored])
        client.trains(False)
        return client.begun_anew(draw)


class _Client:
    """One client of a run, after some of its asks. It is put back there after each case."""

    def __init__(self, run: Recorded, folder: Path, asks: Sequence[str]) -> None:
        self._run, self._folder = run, folder
        self._known = run.to(CLIENT)[0].ask.header["job"]
        self._is_real = True
        folder.mkdir(parents=True)
        self.door = self._opened()
        self._trainer = self._build_really(self._known)
        for serial, id in enumerate(asks, 1):
            stamp = Stamp(run.federation.run, NOW - 10**9 + serial, CLIENT)
            answer = self.door.answer(signed(run.message(CLIENT, id).ask, stamp, COORDINATOR, ASK))
            assert "failed" not in answer.header, answer.header
        self._all = tree(folder)
        self._files, self._serial = self._stored(), NOW - 10**9 + len(asks)
        self._heard, self._had = dict(vars(self.door._heard)), self._resident.__dict__.copy()
        self._state = self._remembered()

    def trains(self, really: bool, fails: bool = False) -> None:
        """Not really: nothing is trained, or its work `fails` in the midst."""
        self._is_real, self._fails = really, fails
        self._trainer.__dict__.pop("local", None)
        if not really:
            self._trainer.local = self._untrained  # type: ignore[method-assign]

    def ask(self, draw: Random) -> Envelope:
        """Mutated, then signed by the coordinator; or as the mode says."""
        mode, message = draw.choice(MODES), draw.choice(self._run.to(CLIENT))
        others = [other.ask for other in self._run.messages] + [other.answer for other in self._run.to(CLIENT)]
        ask = mutated(draw, message.ask, others) if draw.random() < 0.98 else message.ask
        run, serial = self._run.federation.run, self._serial + draw.choice((1, 1, 1, 10**6))
        if mode == "old":
            serial = draw.choice((self._serial, self._serial - 1, 0, -1, NOW * 2, 10**30))
        stamp = Stamp(
            "other.0" if mode == "of another run" else run, serial, draw.choice((CLIENT, CLIENT, "")), draw.random() < 0.2
        )
        made = signed(ask, stamp, STRANGER if mode == "by another" else COORDINATOR, ASK)
        return mutated(draw, made) if mode == "changed after" else made

    @property
    def has_stored(self) -> bool:
        return bool(self._files)

    def begun_anew(self, draw: Random) -> str:
        """An ask comes that it can answer with what it has, or without."""
        files = self._all
        name = draw.choice(sorted(files))
        data = _rewritten(draw, name, files[name])
        plant(self._folder, {**files, name: data})
        door, message = self.door, draw.choice(self._run.to(CLIENT))
        try:
            self.door = self._opened()
            self._trainer._memories.reread(CLIENT)
            stamp = Stamp(self._run.federation.run, self._serial + 1, CLIENT)
            answer = self.door.answer(signed(message.ask, stamp, COORDINATOR, ASK))
            self._require_same_on_disk()
            return f"{Path(name).suffix or Path(name).name}: {answer.header.get('failed', 'answered')}"
        except UserError as error:
            if "\n" in str(error):
                raise Broken(f"not one line: {error}") from error
            return f"{Path(name).name}: {error}"
        finally:
            self.door = door
            plant(self._folder, files)
            self._put_back()
            self._trainer._memories.reread(CLIENT)

    def judged(self, act: Callable[[Envelope], Envelope], ask: Envelope) -> str:
        try:
            answer = self._inside(act(ask), ask)
            return self._checked(answer, ask)
        finally:
            self._put_back()

    def _checked(self, answer: Envelope, ask: Envelope) -> str:
        stored, failed = self._stored(), answer.header.get("failed")
        if failed is None:
            self._require_whole()
            return "answered" if stored != self._files else "answered, and nothing to be kept"
        changed = sorted(name for name in stored.keys() | self._files.keys() if stored.get(name) != self._files.get(name))
        if changed and not (changed == [JOB] and ask.header.get("kind") == "hello"):  # which ends another run in any case
            raise Broken(f"{changed} changed on disk, though it said: {failed}")
        if self._remembered() != self._state:
            raise Broken(f"what it remembers has changed, though it said: {failed}")
        return str(failed)

    def _inside(self, answer: Envelope, ask: Envelope) -> Envelope:
        if not is_sealed(answer):
            return answer
        header = answer.header
        return opened(answer, Stamp(header["run"], header["serial"], CLIENT), SEALING)

    def _require_whole(self) -> None:
        """What is stored is what it remembers, and each answer can be given again."""
        kept = Kept(self._folder, CLIENT)
        if damaged := [entry.answer for entry in kept.read().entries if kept.answer(entry.answer) is None]:
            raise Broken(f"stored answers are not whole: {damaged}")
        self._require_same_on_disk()

    def _require_same_on_disk(self) -> None:
        known = self._remembered()
        self._trainer._memories.reread(CLIENT)
        if self._remembered() != known:
            raise Broken("what is on disk is not what it remembers")

    def _remembered(self) -> str:
        memory, digest = self._trainer.memory(CLIENT), hashlib.sha256()
        for name in sorted(memory):
            digest.update(name.encode() + str(memory[name].dtype).encode() + memory[name].numpy().tobytes())
        return digest.hexdigest()

    def _stored(self) -> dict[str, bytes]:
        return {name: content for name, content in tree(self._folder).items() if name == JOB or name.startswith(HOME)}

    def _put_back(self) -> None:
        vars(self.door._heard).update(self._heard)
        vars(self._resident).update(self._had)
        self.door._inner._inner._diary._rounds.clear()
        stored = self._stored()
        for name in stored.keys() - self._files.keys():
            (self._folder / name).unlink()
        plant(self._folder, {name: content for name, content in self._files.items() if stored.get(name) != content})
        if stored != self._files or self._remembered() != self._state:
            self._trainer._memories.reread(CLIENT)

    @property
    def _resident(self) -> Resident:
        """Behind the signatures, the memory of asks, and the policy."""
        resident: Resident = self.door._inner._inner._answers
        return resident

    def _opened(self) -> Any:
        absent = dict.fromkeys(("bundle", "policy", "budget", "layers", "memory", "seconds"))
        job = self._run.job
        given = Namespace(client=CLIENT, dir=self._folder, model=job.model.path, data=job.data.path, **absent)
        self._build_really = doors.builder(given)
        with patch.object(doors, "builder", lambda given: self._build):
            inner = doors.doors_of(given)
        return Signed(inner, _Keys(), self._folder, clock=lambda: NOW)

    def _build(self, job: Job) -> Any:
        """The trainer of the run's own job is made once; of others when all is real."""
        if job == self._known:
            return self._trainer
        if self._is_real:
            return self._build_really(job)
        checked_job(job, "the coordinator's job")
        raise ClientFailed("it is a job, and another one")

    def _untrained(self, client: str, round: int) -> Local:
        kind = _Failing if self._fails else _Untrained
        return kind(self._trainer.resident, self._trainer.data(client), self._trainer.job, client, round)


def _message(draw: Random, ask: Envelope) -> trainer_pb2.Envelope:
    """Bytes that are damaged, or a part of it."""
    message = to_proto(ask)
    if draw.random() < 0.3:
        return trainer_pb2.Envelope.FromString(damaged(draw, message.SerializeToString()))
    header = damaged(draw, message.header_json.encode()) if draw.random() < 0.5 else message.header_json.encode()
    message.header_json = draw.choice(HEADERS) if draw.random() < 0.05 else header.decode(errors="replace")
    for tensor in message.tensors:
        tensor.shape.extend(draw.choices((0, -1, 2**63 - 1), k=draw.choice((0, 0, 0, 1))))
    return message


def _rewritten(draw: Random, name: str, data: bytes) -> bytes:
    """Damaged bytes, or other JSON, of a manifest under the right digest."""
    if draw.random() < 0.5 or not name.endswith((MANIFEST, ".json")):
        return damaged(draw, data)
    stored = json.loads(data.partition(b" ")[2] if name.endswith(MANIFEST) else data)
    line = json.dumps(rewritten(draw, stored)).encode()
    return hashlib.sha256(line).hexdigest().encode() + b" " + line if name.endswith(MANIFEST) else line


class _Untrained(Local):
    """A model that is loaded, and not trained."""

    def fit(self, penalty: Penalty | None = None) -> Mapping[str, float]:
        return FIGURES

    def evaluate(self) -> Mapping[str, float]:
        return {"loss": 3.0, "tokens": 7.0}

    def movable(self, where: Literal["whole", "adapter"]) -> Any:
        return StandMovable({}, self.steps(), torch.Generator())


class _Failing(_Untrained):
    def fit(self, penalty: Penalty | None = None) -> Mapping[str, float]:
        raise RuntimeError("it failed in the midst of its work")

    def evaluate(self) -> Mapping[str, float]:
        raise RuntimeError("it failed in the midst of its work")

    def movable(self, where: Literal["whole", "adapter"]) -> Any:
        raise RuntimeError("it failed in the midst of its work")


class _Keys:
    """As much of a bundle as the door needs."""

    name, verify, seal, signing = CLIENT, COORDINATOR.public_key(), SEALING.public_key(), KEYS[CLIENT]
