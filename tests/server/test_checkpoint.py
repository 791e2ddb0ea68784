"""A checkpoint holds all that the coordinator remembers, bit for bit; a damaged one is never believed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedtune.adapter import Adapter, Factors
from fedtune.errors import Damaged, RunFolderError
from fedtune.payload import Payload, Role
from fedtune.strategy import ServerState
from fedtune.wire.versions import Held, Known
from server import checkpoint as module
from server.checkpoint import KEPT, Checkpoint, Checkpoints, read
from server.records import ClientRecord, RoundRecord


def everything(round: int = 7) -> Checkpoint:
    draw = torch.Generator().manual_seed(round)
    A, B, head = (torch.randn(*shape, generator=draw) for shape in ((2, 5), (3, 2), (4, 3)))
    odd = {"bf16": A.bfloat16(), "t": B.T, "int": torch.tensor([2**40]), "scalar": torch.tensor(0.1), "none": torch.zeros(0, 2)}
    state = ServerState(
        Adapter({"m.q": Factors(A, B, 0.1 + round)}, {"head": head}, "base"),
        odd,
        {"step": 1e-300},
        {"x": 2.0},
        {"ann": {"0": 0.5}},
    )
    payload = Payload({"m.q.lora_A": A, "new": head[1:]}, {"m.q.lora_A": Role.A, "new": Role.DENSE}, {"m.q.scale": 1 / 3})
    held = Held("0123456789abcdef", payload, {"m.q.lora_A": b"\x00\xff"})
    known = Known({"ann": held, "bob": held}, {held.version: 4}, 9)
    record = RoundRecord(round, 1.5, {"a": 1.0}, 2.0, {"ann": ClientRecord(bytes_up=5, failed="why")}, notes=("begun 2 times",))
    return Checkpoint("demo.00", round, state, known, record, {"undone": [3]})


def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    state, held = checkpoint.state, checkpoint.known.held["ann"]
    pair = state.adapter.lora["m.q"]
    return {"A": pair.A, "B": pair.B, **state.adapter.dense, **state.tensors, **held.payload.tensors}


def test_all_of_it_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoints, sent = Checkpoints(tmp_path / "state"), everything()
    checkpoints.write(sent)
    got = checkpoints.last()
    assert got is not None
    for name, tensor in tensors_of(sent).items():
        other = tensors_of(got)[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
        assert torch.equal(tensor, other)
    assert (got.run, got.round, got.record, got.notes) == (sent.run, sent.round, sent.record, sent.notes)
    for part in ("scalars", "metrics", "selected"):
        assert getattr(got.state, part) == getattr(sent.state, part)
    assert got.state.adapter.lora["m.q"].scale == 7.1
    assert got.state.adapter.base == "base"
    assert (got.known.since, got.known.asked) == (sent.known.since, 9)
    held = got.known.held
    assert held["ann"] is held["bob"], "clients of one version share it, as they did"
    assert held["ann"].sources == {"m.q.lora_A": b"\x00\xff"}
    assert held["ann"].payload.roles == sent.known.held["ann"].payload.roles
    assert held["ann"].payload.scalars == {"m.q.scale": 1 / 3}


def test_nothing_that_the_coordinator_remembers_is_forgotten() -> None:
    """Who adds a field to these must add it to the checkpoint too."""
    fields = {kind: [field.name for field in dataclasses.fields(kind)] for kind in (ServerState, Known, Held, Factors, Adapter)}
    assert fields == {
        ServerState: ["adapter", "tensors", "scalars", "metrics", "selected"],
        Known: ["held", "since", "asked"],
        Held: ["version", "payload", "sources"],
        Factors: ["A", "B", "scale"],
        Adapter: ["lora", "dense", "base"],
    }


def test_a_tensor_that_many_hold_is_written_once(tmp_path: Path) -> None:
    """A of shape (2, 5) is in the adapter and in what two clients have: 40 bytes of float32, once."""
    Checkpoints(tmp_path).write(everything())
    (file,) = tmp_path.rglob("tensors.safetensors")
    A = everything().state.adapter.lora["m.q"].A
    assert file.read_bytes().count(A.numpy().tobytes()) == 1


def test_the_last_ones_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.last() is None
    for round in (8, 9, 10, 11):
        checkpoints.write(everything(round))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0010", "0011"]
    assert KEPT == 2
    last = checkpoints.last()
    assert last is not None
    assert last.round == 11


@pytest.mark.parametrize("file", ["checkpoint.json", "tensors.safetensors"])
@pytest.mark.parametrize("how", ["a bit", "cut", "gone", "empty"])
def test_of_a_damaged_one_nothing_is_believed(file: str, how: str, tmp_path: Path) -> None:
    checkpoints, told = Checkpoints(tmp_path), list[str]()
    for round in (1, 2):
        checkpoints.write(everything(round))
    path = tmp_path / "0002" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes({"a bit": data, "cut": data[:-1], "empty": b"", "gone": b""}[how])
    if how == "gone":
        path.unlink()
    last = checkpoints.last(told.append)
    assert last is not None
    assert last.round == 1
    assert len(told) == 1
    assert "0002" in told[0]


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        (None, "round", "7"),
        (None, "run", ["r"]),
        ("state", "scalars", {"s": "1"}),
        ("known", "since", 3),
        ("notes", "undone", 3),
        ("notes", "gate", {"conduct": {"refused": {}, "until": 3}, "norms": {}}),
        ("record", "round", {}),
    ],
)
def test_one_that_says_what_none_says_is_not_believed(part: str | None, field: str, value: object, tmp_path: Path) -> None:
    """Its checksum is right: somebody wrote it."""
    Checkpoints(tmp_path).write(everything(1))
    file = tmp_path / "0001" / "checkpoint.json"
    text = json.loads(file.read_text().partition("\n")[2])
    (text if part is None else text[part])[field] = value
    body = json.dumps(text)
    file.write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
    with pytest.raises(Damaged):
        read(tmp_path / "0001")


def test_another_version_s_is_said_to_be_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORMAT", 99)
    Checkpoints(tmp_path).write(everything(1))
    monkeypatch.undo()
    with pytest.raises(RunFolderError, match=r"was written by another version of fedtune \(format 99\)"):
        read(tmp_path / "0001")


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Runs `work` in a process that is killed at the step-th call that changes the disk; whether it was."""
    child = os.fork()
    if child == 0:
        steps = [0]

        def counted(name: str) -> Callable[..., object]:
            real = getattr(os, name)

            def call(*given: object, **named: object) -> object:
                if steps[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                steps[0] += 1
                return real(*given, **named)

            return call

        for name in ("replace", "fsync", "mkdir", "rmdir", "unlink"):
            setattr(os, name, counted(name))
        work()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_any_step_it_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "start").write(everything(1))
    seen, step, killed = set[int](), 0, True
    while killed:
        folder = tmp_path / str(step)
        Checkpoints(folder).write(everything(1))
        Checkpoints(folder).write(everything(2))
        killed = killed_at(step, lambda folder=folder: Checkpoints(folder).write(everything(3)))  # type: ignore[misc]
        told = list[str]()
        last = Checkpoints(folder).last(told.append)
        assert last is not None
        assert told == []
        assert torch.equal(last.state.adapter.lora["m.q"].A, everything(last.round).state.adapter.lora["m.q"].A)
        seen.add(last.round)
        step += 1
    assert seen == {2, 3}
    assert step > 5


@pytest.mark.parametrize("claimed", [1e30, float("inf"), float("nan"), 10**30])
def test_whatever_a_client_claims_its_round_can_be_read_again(claimed: float, tmp_path: Path) -> None:
    client = ClientRecord(seconds=claimed, examples=claimed, loss=claimed, micro_batch=claimed)
    record = RoundRecord(7, claimed, {"perplexity": claimed}, claimed, {"ann": client}, {"ann": {"0": claimed}}, {"q": claimed})
    Checkpoints(tmp_path).write(dataclasses.replace(everything(), record=record))
    last = Checkpoints(tmp_path).last()
    assert last is not None
    assert repr(last.record) == repr(record)
