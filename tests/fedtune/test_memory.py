"""What a client keeps between rounds, in memory and on its disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fedtune.memory import Memory


def test_it_is_a_mapping_of_its_own_copies() -> None:
    given = torch.zeros(2)
    memory = Memory({"a": given})
    memory["b"] = given
    given.add_(1.0)
    assert not memory["a"].any()
    assert not memory["b"].any()
    assert (sorted(memory), len(memory)) == (["a", "b"], 2)
    del memory["a"]
    assert list(memory) == ["b"]
    with pytest.raises(KeyError):
        memory["a"]


def test_saved_and_opened(tmp_path: Path) -> None:
    """Views, transposes and tensors that share storage too: what a strategy puts in comes back."""
    whole = torch.arange(6.0).reshape(2, 3)
    kept = {"whole": whole, "turned": whole.T, "row": whole[0], "half": whole.bfloat16(), "none": torch.zeros(0, 3)}
    memory = Memory()
    memory.update({name: tensor.clone().requires_grad_() if name == "whole" else tensor for name, tensor in kept.items()})
    memory.save(tmp_path / "memory.safetensors")
    opened = Memory.open(tmp_path / "memory.safetensors")
    assert opened.keys() == kept.keys()
    for name, tensor in kept.items():
        assert torch.equal(opened[name], tensor)
        assert opened[name].dtype == tensor.dtype


def test_no_file_is_no_memory(tmp_path: Path) -> None:
    assert len(Memory.open(tmp_path / "none.safetensors")) == 0


def test_a_crash_while_saving_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "memory.safetensors"
    Memory({"x": torch.ones(1)}).save(path)

    def crash(*_: object) -> None:
        raise OSError("the machine stopped")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="stopped"):
            Memory({"x": torch.zeros(1)}).save(path)
    assert Memory.open(path)["x"].item() == 1.0
    Memory({"x": torch.zeros(1)}).save(path)
    assert Memory.open(path)["x"].item() == 0.0
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
