"""One of two clients sends packed answers that no codec of the job made, or that hold what was not asked for. It is refused
with the reason, and the rounds go on with the other."""

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
from fedtune.strategy import Answer
from fedtune.wire import pack_answer, pack_failure
from fedtune.wire.codec import codec_from
from fedtune.wire.ends import RESEND
from fedtune.wire.packed import Codecs, pack
from fedtune.wire.reader import as_bytes
from fedtune.wire.schema import Line, Mode, Schema
from server.coordinator import run_job
from server.watchers import Quiet
from simulations.grid import InProcessGrid

MakeJob = Callable[..., Job]
Attack = Callable[[Envelope], Envelope]
UP = "int4 | entropy"
PROJ = "model.layers.0.self_attn.q_proj.lora_A"


def packed(data: bytes) -> Attack:
    return lambda given: replace(given, tensors=(replace(given.tensors[0], data=data),))


def headed(**changes: object) -> Attack:
    return lambda given: replace(given, header={**given.header, **changes})


def holding(name: str, tensor: torch.Tensor, role: Role = Role.DENSE) -> bytes:
    codec = codec_from(UP)
    return pack(Payload({name: tensor}, {name: role}), Codecs(codec, codec_from("int8 | entropy")), 0).data


def declaring(shape: tuple[int, ...], mode: Mode, dtype: str = "float32") -> bytes:
    about = Schema((Line("x", Role.DENSE, dtype, shape, mode),), {}).as_bytes()
    return b"\x01\x00" + as_bytes(len(about)) + about + bytes(100)


def as_it_is(given: Envelope) -> Envelope:
    header = {key: given.header[key] for key in ("ask", "run", "round", "client", "base")}
    return pack_answer(Answer(Payload({"x": torch.ones(3)}, {"x": Role.DENSE}), 1.0), header)


def wants_everything(given: Envelope) -> Envelope:
    header = {key: given.header[key] for key in ("ask", "run", "round", "client")}
    return pack_failure("I have forgotten it all", {**header, RESEND: True})


ATTACKS: dict[str, tuple[Attack, str]] = {
    "garbage": (packed(b"\xff" * 300), "refused: tensors packed in version 255 came, wanted 1"),
    "nothing": (packed(b""), "refused: a message ends 2 bytes too early"),
    "the usual schema and no streams": (packed(b"\x01\x01\x00"), "refused: a message ends 1 bytes too early"),
    "streams of zeros": (packed(b"\x01\x01\x00\x02\0\0\x02\0\0"), "refused: "),
    "another codec": (headed(codec="fp32"), f"refused: tensors came by codec 'fp32', this job's is '{UP}'"),
    "no codec": (headed(codec=None), "refused: tensors came by codec 'None'"),
    "tensors as they are": (as_it_is, "refused: tensors came as fedtune.raw, wanted fedtune.packed alone"),
    "another version of the wire": (headed(version=7), "refused: a message of wire version 7 came, wanted 1"),
    "2^40 numbers": (packed(declaring((2**20, 2**20), Mode.FIRST)), "refused: a message of 1099511627776 numbers came"),
    "2^40 numbers as they are": (packed(declaring((2**40,), Mode.RAW, "float64")), "refused: a message of 1099511627776"),
    "2^60 numbers": (packed(declaring((2**30, 2**30), Mode.RAW)), "refused: a message came whose schema cannot be read"),
    "what is not there": (packed(declaring((3,), Mode.SAME)), "refused: 'x' came as a difference to what is not known here"),
    "not asked for": (packed(holding("x", torch.ones(3))), "refused: 'x' is no part of the adapter"),
    "one tensor": (packed(holding(PROJ, torch.ones(4, 32), Role.A)), "refused: it lacks"),
    "of another shape": (
        packed(holding(PROJ, torch.ones(9), Role.A)),
        r"refused: 'model.layers.0.self_attn.q_proj.lora_A' is of",
    ),
    "not finite": (packed(holding(PROJ, torch.full((4, 32), torch.nan), Role.A)), "refused: "),
    "forgets, time and again": (wants_everything, "I have forgotten it all"),
}


class Attacker(Trainer):
    """ann, who comes first by name, answers every ask to train in her own way."""

    attack: Attack

    def answer(self, envelope: Envelope, client: str | None = None) -> Envelope:
        given = super().answer(envelope, client)
        honest = client != "ann" or envelope.header["kind"] in ("hello", "evaluate")
        return given if honest else self.attack(given)


@pytest.mark.parametrize("what", ATTACKS)
def test_the_round_goes_on_without_the_attacker(what: str, make_job: MakeJob, tmp_path: Path) -> None:
    keys = ["clients.names=['ann', 'bob']", "train.steps=1", "rounds.count=2", "rounds.evaluate_every=0", f"wire.up={UP}"]
    job = make_job(*keys, "wire.preset=balanced")
    trainer = Attacker.for_simulation(job)
    trainer.attack, reason = ATTACKS[what]
    result = run_job(job, InProcessGrid(trainer), tmp_path / "run", Quiet(), write_model=False)
    assert len(result.records) == 2
    for record in result.records:
        assert (record.clients["ann"].failed or "").startswith(reason)
        assert len(record.clients["ann"].failed or "") < 500
        assert record.clients["bob"].failed is None


def test_who_lost_its_memory_takes_part_again(make_job: MakeJob, tmp_path: Path) -> None:
    """ann's disk is new in each round: she says so, is sent everything, and answers."""

    class Forgetful(Trainer):
        def answer(self, envelope: Envelope, client: str | None = None) -> Envelope:
            given = super().answer(envelope, client)
            if client == "ann" and "failed" not in given.header and envelope.header["kind"] == "train":
                self.memory("ann").clear()
            return given

    job = make_job("clients.names=['ann', 'bob']", "train.steps=1", "rounds.count=3", "wire=tiny")
    result = run_job(job, InProcessGrid(Forgetful.for_simulation(job)), tmp_path / "run", Quiet(), write_model=False)
    assert [record.clients["ann"].failed for record in result.records] == [None] * len(result.records)
    assert result.records[-1].clients["ann"].bytes_down > 1.5 * result.records[-1].clients["bob"].bytes_down
