"""Writes updates.safetensors: what one client's adapter differs by from what it was sent, in round 4 of the demo job, bfloat16.

python -m tests.fedtune.wire.make_updates     (a minute; from the root of the repository)
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from client.trainer import Trainer
from fedtune.base import blueprint
from fedtune.job import load_job
from fedtune.memory import Memory
from fedtune.payload import adapter_of, payload_of
from fedtune.strategy import Ask

CLIENTS, ROUNDS = 2, 4
ROOT = Path(__file__).parents[3]


def update(trainer: Trainer) -> dict[str, Tensor]:
    """Of the first client, in the last round of FedAvg among the first few."""
    adapter = blueprint(trainer.job).adapter
    for number in range(1, ROUNDS + 1):
        sent = payload_of(adapter)
        asked = [trainer.local(client, number) for client in trainer.clients[:CLIENTS]]
        came = [trainer.strategy.answer(Ask("train", sent), local, Memory()).payload for local in asked]
        changes = [{name: tensor.clone() - sent.tensors[name] for name, tensor in one.tensors.items()} for one in came]
        mean = {name: tensor + sum(change[name] for change in changes) / CLIENTS for name, tensor in sent.tensors.items()}
        adapter = adapter_of(type(sent)(mean, sent.roles, sent.scalars), like=adapter)
    return changes[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    demo = load_job(ROOT / "simulations/scenarios/demo.toml", ["compare=false"])
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in update(Trainer.for_simulation(demo)).items()}
    save_file(tensors, Path(__file__).with_name("updates.safetensors"))
