"""FedSA-LoRA (Guo et al., ICLR 2025, arXiv 2410.01463): both factors train, only A is shared; a personal model for each.

    client i: trains A_i, B_i and its head from A, B_i, head_i        server: A = sum_i p_i A_i

B_i and head_i never leave the client: they stay in its Memory, and so does the model W_0 + s B_i A. There is no global
model and so no product that could be exact: `exact` stays False, though A is the exact mean. What is published is the
shared A with B = 0 and the head of the job, which computes what the base model computes: a start for new clients, no model.
Each client's own adapter lies with the client (`adapter` in the folder of its trainer; in simulation `clients/<name>/adapter`
in the run's folder).

A client that has not trained yet works with B = 0 and the head that the job begins with, which no client can know by itself.
The server does not know who has trained, so that head comes down in every broadcast (h numbers; 0 for language models).
All clients train with the server's scale.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedtune.adapter import Adapter, Factors
from fedtune.errors import ClientFailed
from fedtune.memory import Memory
from fedtune.payload import Payload, Role, adapter_of, payload_of
from fedtune.strategy import Answer, Answers, Ask, ClientInfo, LocalModel, ServerState, Strategy


@dataclass(frozen=True)
class FedSALoRA(Strategy):
    """FedSA-LoRA: A is averaged, B and the head stay with each client. Needs one rank for all clients."""

    name: ClassVar[str] = "fedsa_lora"
    paper: ClassVar[str] = "Guo et al., ICLR 2025, arXiv 2410.01463"
    up: ClassVar[str] = "r*k"
    down: ClassVar[str] = "r*k + h"
    secure_sum: ClassVar[bool] = True
    personal: ClassVar[bool] = True

    def round(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Generator[Ask, Answers, ServerState]:
        answers = yield Ask("train", self.broadcast(state), wants=(Role.A,))
        return replace(state, adapter=adapter_of(answers.mean(), like=state.adapter))

    def answer(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        self.use(ask.payload, local, memory)
        metrics = local.fit()
        trained = local.adapter()
        memory.update(payload_of(trained, (Role.B, Role.DENSE)).tensors)
        return Answer(payload_of(trained, (Role.A,)), local.examples, metrics)

    def use(self, payload: Payload, local: LocalModel, memory: Memory) -> None:
        local.load(with_own(self.received(payload), memory))

    def broadcast(self, state: ServerState) -> Payload:
        payload = payload_of(state.adapter, (Role.A, Role.DENSE))
        heights = {f"{path}.d": float(pair.shape[0]) for path, pair in state.adapter.lora.items()}
        return replace(payload, scalars={**payload.scalars, **heights})

    def received(self, payload: Payload) -> Adapter:
        lora = {}
        for name, A in payload.tensors.items():
            if payload.roles[name] is Role.A:
                path = name.removesuffix(f".{Role.A}")
                B = torch.zeros(int(payload.scalars[f"{path}.d"]), A.shape[0])  # (d, r)
                lora[path] = Factors(A, B, payload.scalars[f"{path}.scale"])
        return adapter_of(payload, like=Adapter(lora))


def with_own(shared: Adapter, memory: Memory) -> Adapter:
    """The shared A with the client's own B and head, as far as it has trained them."""
    payload = payload_of(shared)
    for name, tensor in payload.tensors.items():
        if name in memory and memory[name].shape != tensor.shape:
            raise ClientFailed(
                f"its memory holds '{name}' of shape {tuple(memory[name].shape)}, this job wants {tuple(tensor.shape)}: "
                "it is of another job; give each job a folder of its own (trainer --dir)"
            )
    return adapter_of(replace(payload, tensors={name: memory.get(name, tensor) for name, tensor in payload.tensors.items()}))
