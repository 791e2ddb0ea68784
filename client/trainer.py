"""The trainer: answers asks for one client or, in simulation, for many on one resident model.

An ask that cannot be answered becomes a failure with its reason; nothing that a client meets ends the trainer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from client.allowance import check, shown_names, uncounted
from client.data.compact import compact
from client.data.examples import ClientData
from client.data.load import labels_in, load_client
from client.data.sources import Source, clients_in
from client.local import Local
from client.memories import Memories, schema_of
from client.model import ResidentModel
from client.personal import write_own
from fedtune.base import Blueprint, blueprint
from fedtune.envelope import Envelope
from fedtune.errors import ClientFailed, DataError, FedtuneError, JobError, RunFolderError
from fedtune.job import Clients, Job
from fedtune.memory import Memory
from fedtune.payload import Payload, payload_of
from fedtune.strategy import Answer, Ask
from fedtune.wire import pack_answer, pack_failure
from fedtune.wire.ends import ClientEnd, outdated
from fedtune.wire.presets import Wire
from fedtune.wire.versions import KEPT, Outdated

MODELS = 4  # of which an ask has no more numbers


class Trainer:
    """One resident model, and each client's data and memory beside it. Data is read when a client is first asked."""

    def __init__(
        self, job: Job, sources: Mapping[str, Source], directory: Path | None = None, *, is_node: bool = False
    ) -> None:
        """Memory lies in `directory`, or lasts as long as the process. A node's answers lie there too."""
        if job.machine.threads:
            torch.set_num_threads(job.machine.threads)
        self.job = job
        self.resident = ResidentModel(job)
        self.strategy = job.make_strategy()
        self._sources, self._directory, self._is_node = sources, directory, is_node
        self._data: dict[str, ClientData] = {}
        self._memories = Memories(directory, self._schema, shared=not is_node, answers=is_node)

    @classmethod
    def for_simulation(cls, job: Job, directory: Path | None = None) -> Trainer:
        """All clients of the job; in a `directory` their memories outlive the process. Raises DataError and ModelError for what
        is wrong with the job."""
        sources = clients_in(job.data, job.clients)
        return cls(with_labels(job, sources), sources, directory)

    @classmethod
    def for_node(
        cls,
        client: str,
        job: Job,
        *,
        model: str | None,
        data: str | None,
        directory: Path | None,
        budget: float | None = None,
        limits: Mapping[str, float | str] | None = None,
    ) -> Trainer:
        """One client with the node's own model, data, budget and `limits` (layers, memory, seconds) in place of those that the
        job names. Raises JobError for a partition: no node has what others hold."""
        if job.data.partition != "natural":
            raise JobError(
                f"data.partition = '{job.data.partition}' is for simulation, where all data is in one place; "
                f"a node trains on its own: leave data.partition out of the job, or type --set data.partition=natural"
            )
        local_model = job.model.model_copy(update={"path": model} if model else {})
        local_data = job.data.model_copy(update={"path": data} if data else {})
        own = {**(limits or {}), **({"budgets": budget} if budget else {})}
        known = {name: {**getattr(job.clients, name), client: value} for name, value in own.items()}
        clients = job.clients.model_copy(update=known)
        job = job.model_copy(update={"model": local_model, "data": local_data, "clients": clients})
        source = _own_source(client, clients_in(job.data, Clients()))
        if directory:
            directory.mkdir(parents=True, exist_ok=True)
        return cls(job, {client: source}, directory, is_node=True)

    @property
    def clients(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def data(self, client: str) -> ClientData:
        if client not in self._sources:
            raise ClientFailed(f"client '{client}' was asked, this trainer has {', '.join(self._sources)}")
        if client not in self._data:
            job, tokenizer = self.job, self.resident.tokenizer
            read = load_client(self._sources[client], job.data, job.model.task, tokenizer, job.seed, job.model.label_names)
            self._data[client] = ClientData(compact(read.train), compact(read.held_out))
        return self._data[client]

    def answer(self, envelope: Envelope, client: str | None = None) -> Envelope:
        """The answer to one ask, or a failure with its reason. `client` names one of many in simulation."""
        client = client or self.clients[0]
        header = {key: envelope.header.get(key) for key in ("ask", "run", "round")} | {"client": client}
        try:
            if envelope.header.get("kind") == "hello":
                self._memories.begin(client, str(envelope.header.get("run")))
                return pack_answer(Answer(), header | self._hello(client))
            return self._answered(envelope, client, header)
        except Outdated as error:
            return outdated(pack_failure(str(error), header))
        except RunFolderError:
            raise
        except Exception as error:  # whatever a strategy's half may raise
            return pack_failure(_reason(error), header)

    def local(self, client: str, round: int) -> Local:
        return Local(self.resident, self.data(client), self.job, client, round)

    def write_own(self, client: str, round: int, folder: Path) -> None:
        """Write what the client uses now, its own adapter where the method is personal, as a PEFT folder."""
        write_own(folder, self.resident.adapter(), self.job, self._plan, self.strategy, client, round)

    @cached_property
    def _plan(self) -> Blueprint:
        return blueprint(self.job)

    def _hello(self, client: str) -> dict[str, Any]:
        rank, scale = self.job.rank_of(client), self.job.scale_of(client)
        own = {"examples": len(self.data(client).train), "rank": rank, "scale": scale, "base": self.resident.base}
        return own | {"limits": self.job.limits_of(client)}

    def as_it_came(self, client: str, payload: Payload) -> Payload:
        """A broadcast as the client has it, who was sent it last: coarser than it was meant, where a codec made it so."""
        memory = self.memory(client)
        kept = {name: memory[KEPT + name] for name in payload.tensors if KEPT + name in memory}
        return replace(payload, tensors={**payload.tensors, **kept})

    def _answered(self, envelope: Envelope, client: str, header: dict[str, Any]) -> Envelope:
        began = time.perf_counter()
        if envelope.header.get("base") != self.resident.base:
            asked = envelope.header.get("base")
            raise ClientFailed(
                f"the ask is for base model {asked}, this client has {self.resident.base}: use the same model files"
            )
        round, work = int(envelope.header["round"]), self._memories.work(client, envelope)
        wire = ClientEnd(self._wire, self.strategy, work.memory, client, self._start, self._most, len(self._plan.shapes))
        ask = wire.ask(envelope)
        local = self.local(client, round)
        answer = self._half(ask, local, work.memory)
        about = header | {"base": self.resident.base, "seconds": time.perf_counter() - began}
        packed = wire.answer(answer, ask, local, about)
        own = self._own_folder(client)
        if own and self.strategy.personal and ask.kind == "evaluate":  # then what it uses lies in the slot
            self.write_own(client, round, own)
        check()  # what took too long is not kept
        with uncounted():
            self._memories.commit(work, packed)
        return packed

    @cached_property
    def _wire(self) -> Wire:
        return self.job.make_wire()

    def _start(self) -> Payload:
        """The adapter that the job starts from, which the server knows too."""
        return payload_of(self._plan.adapter)

    @cached_property
    def _most(self) -> int:
        """Numbers that an ask can have: nothing that a method sends is as large as a few models."""
        return MODELS * sum(self._plan.sizes.values())

    def _own_folder(self, client: str) -> Path | None:
        """In simulation they are written at the end."""
        return self._directory / "adapter" if self._directory and self._is_node else None

    def _half(self, ask: Ask, local: Local, memory: Memory) -> Answer:
        half = self.strategy.evaluate if ask.kind == "evaluate" else self.strategy.answer
        return half(ask, local, memory)

    def memory(self, client: str) -> Memory:
        return self._memories.of(client)

    def _schema(self, client: str) -> str:
        """What a memory fits to."""
        strategy = {"name": self.job.strategy.name, **asdict(self.strategy)}  # type: ignore[call-overload]
        adapter = {name: tuple(tensor.shape) for name, tensor in self._start().tensors.items()}
        return schema_of(self.resident.base, strategy, adapter, self.job.rank_of(client), self.job.scale_of(client))


def _own_source(client: str, found: Mapping[str, Source]) -> Source:
    """The client's own among those in the data; data of one client needs not bear its name."""
    if client not in found and len(found) > 1:
        raise DataError(f"the data holds {shown_names(found)}, but no client '{client}'; name one of them with --client")
    return found.get(client) or next(iter(found.values()))


def with_labels(job: Job, sources: Mapping[str, Source]) -> Job:
    """For classification, the job with the names of the classes that the data of all clients has."""
    if job.model.task != "classification" or job.model.labels:
        return job
    names = tuple(labels_in(sources, job.data))
    return job.model_copy(update={"model": job.model.model_copy(update={"labels": names})})


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, FedtuneError) else f"{type(error).__name__}: {error}"
