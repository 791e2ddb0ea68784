"""One of two clients sends what it should not, to every method. No majority helps: the gate must know by itself what was asked
for. The run goes on with the honest one, and says why the other was refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from client.trainer import Trainer
from fedtune.envelope import Envelope
from fedtune.job import Job
from fedtune.payload import Payload, Role
from fedtune.registry import BUILT_IN
from fedtune.wire import pack_answer, unpack_answer
from server.coordinator import run_job
from server.watchers import Quiet
from simulations.grid import InProcessGrid

MakeJob = Callable[..., Job]
Attack = Callable[[Payload], Payload]
SGD = ["train.optimizer=sgd", "train.clip=0"]


def only(payload: Payload, keep: Callable[[str], bool]) -> Payload:
    """The tensors and scalars whose names are kept."""
    tensors = {name: tensor for name, tensor in payload.tensors.items() if keep(name)}
    scalars = {name: value for name, value in payload.scalars.items() if keep(name)}
    return Payload(tensors, {name: payload.roles[name] for name in tensors}, scalars)


ATTACKS: dict[str, Attack] = {
    "nothing at all": lambda payload: Payload(),
    "without a module": lambda payload: only(payload, lambda name: "layers.0.self_attn.q_proj" not in name),
    "a scale of its own": lambda p: replace(p, scalars={n: 1e30 if n.endswith(".scale") else v for n, v in p.scalars.items()}),
    "not finite": lambda p: replace(p, tensors={name: torch.full_like(t, torch.nan) for name, t in p.tensors.items()}),
    "of another shape": lambda p: replace(p, tensors={name: t[..., :-1] for name, t in p.tensors.items()}),
    "of another role": lambda p: replace(p, roles=dict.fromkeys(p.roles, Role.VECTOR)),
}


class Attacker(Trainer):
    """ann, who comes first by name, answers every ask but the hello and evaluations in her own way."""

    attack: Attack

    def answer(self, envelope: Envelope, client: str | None = None) -> Envelope:
        given = super().answer(envelope, client)
        if client != "ann" or envelope.header["kind"] in ("hello", "evaluate"):
            return given
        answer = unpack_answer(given)
        header = {key: given.header[key] for key in ("ask", "run", "round", "client", "base")}
        return pack_answer(replace(answer, payload=self.attack(answer.payload)), header)


# Fed-SB's answers to the ask to train carry no scale.
PAIRS = [(method, attack) for method in BUILT_IN for attack in ATTACKS if (method, attack) != ("fed_sb", "a scale of its own")]


@pytest.mark.parametrize(("method", "attack"), PAIRS)
def test_the_run_goes_on_without_the_attacker(method: str, attack: str, make_job: MakeJob, tmp_path: Path) -> None:
    keys = ["clients.names=['ann', 'bob']", "train.steps=1", "rounds.count=2", "rounds.evaluate_every=0"]
    job = make_job(*keys, f"strategy.name={method}", *(SGD if method == "scaffold" else []))
    trainer = Attacker.for_simulation(job)
    trainer.attack = ATTACKS[attack]
    result = run_job(job, InProcessGrid(trainer), tmp_path / "run", Quiet())
    for record in result.records:
        assert (record.clients["ann"].failed or "").startswith("refused: ")
        assert record.clients["bob"].failed is None
