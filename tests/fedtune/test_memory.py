"""What a client keeps between rounds, and the files that it becomes."""

from __future__ import annotations

import weakref
from weakref import WeakValueDictionary

import pytest
import torch

import fedtune.memory
from fedtune.errors import Damaged
from fedtune.memory import Memory, Part


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


def stored(memory: Memory) -> Memory:
    """What comes back from its files."""
    alike, own = (Part.read(part.name, part.data()) if part.name else part for part in memory.parts())
    return Memory.of(alike, own)


def test_stored_and_read() -> None:
    """Views, transposes and tensors that share storage too: what a strategy puts in comes back."""
    whole = torch.arange(6.0).reshape(2, 3)
    given = {"whole": whole, "turned": whole.T, "row": whole[0], "half": whole.bfloat16(), "none": torch.zeros(0, 3)}
    memory = Memory()
    memory.update({name: tensor.clone().requires_grad_() if name == "whole" else tensor for name, tensor in given.items()})
    read = stored(memory)
    assert read.keys() == given.keys()
    for name, tensor in given.items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype


def test_a_part_without_tensors_has_no_name() -> None:
    assert [part.name for part in Memory().parts()] == ["", ""]


def test_a_name_follows_from_names_and_numbers() -> None:
    names = [Memory(given).parts()[1].name for given in ({"x": torch.zeros(2)}, {"y": torch.zeros(2)}, {"x": torch.ones(2)})]
    assert len(set(names)) == 3
    assert Memory({"x": torch.zeros(2)}).parts()[1].name == names[0]


def test_a_tensor_that_was_written_to_has_another_name() -> None:
    """Nobody should; and who does is not told that nothing has changed."""
    memory = Memory({"x": torch.zeros(2)})
    before = memory.parts()[1].name
    memory["x"].add_(1.0)
    assert memory.parts()[1].name == Memory({"x": torch.ones(2)}).parts()[1].name != before


def test_a_tensor_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, hashed = Memory({"x": torch.zeros(2), "y": torch.zeros(3)}), []
    digest = fedtune.memory._digest
    monkeypatch.setattr(fedtune.memory, "_digest", lambda tensor: hashed.append(tensor.numel()) or digest(tensor))
    memory.parts()
    assert sorted(hashed) == [2, 3]
    copied = memory.copy()
    copied["y"] = torch.ones(3)
    copied.parts()
    assert hashed[2:] == [3]


def test_every_damaged_byte_is_seen() -> None:
    part = Memory({"x": torch.arange(4.0), "y": torch.ones(1, dtype=torch.uint8)}).parts()[1]
    data = part.data()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        try:
            read = Part.read(part.name, bytes(damaged))
        except Damaged:
            continue
        assert all(torch.equal(read.tensors[name], tensor) for name, tensor in part.tensors.items())  # a space of its header
    for length in range(len(data)):
        with pytest.raises(Damaged):
            Part.read(part.name, data[:length])


def test_a_copy_is_worked_on_and_the_memory_stays() -> None:
    memory = Memory({"x": torch.ones(1), "y": torch.ones(1)})
    copied = memory.copy()
    copied["x"] = torch.zeros(1)
    del copied["y"]
    copied.keep("z", torch.ones(1))
    assert ({name: tensor.item() for name, tensor in memory.items()}, list(copied)) == ({"x": 1.0, "y": 1.0}, ["x", "z"])


def two() -> tuple[Memory, Memory, WeakValueDictionary[bytes, torch.Tensor]]:
    """The memories of two clients of one simulation, and what they share."""
    alike: WeakValueDictionary[bytes, torch.Tensor] = WeakValueDictionary()
    return Memory(alike=alike), Memory(alike=alike), alike


def test_what_two_clients_remember_alike_is_there_once() -> None:
    """Under whatever name, and not the caller's own tensor, which may change."""
    ann, bob, _ = two()
    given = torch.arange(6.0).reshape(2, 3)
    ann.keep("x", given)
    bob.keep("y", given.T.contiguous().T)  # the same numbers in another order in memory
    assert ann["x"] is bob["y"]
    given.zero_()
    assert torch.equal(ann["x"], torch.arange(6.0).reshape(2, 3))
    bob["y"] = ann["x"]
    assert bob["y"] is not ann["x"]  # what is not kept is a client's own, to be written to


def test_equal_bytes_of_another_kind_are_not_alike() -> None:
    """All of these are 24 bytes of zeros."""
    kinds = [
        torch.zeros(2, 3),
        torch.zeros(3, 2),
        torch.zeros(6),
        torch.zeros(2, 3, dtype=torch.int32),
        torch.zeros(12, dtype=torch.bfloat16),
        torch.zeros(12, dtype=torch.float16),
    ]
    ann, bob, alike = two()
    for number, tensor in enumerate(kinds):
        (ann if number % 2 else bob).keep(str(number), tensor)
    assert len(alike) == len(kinds)
    for number, tensor in enumerate(kinds):
        kept = (ann if number % 2 else bob)[str(number)]
        assert (kept.dtype, kept.shape) == (tensor.dtype, tensor.shape)


def test_what_no_client_remembers_any_more_is_dropped() -> None:
    """With the last of those who had it: forgotten by one, replaced by the other."""
    ann, bob, alike = two()
    for memory in (ann, bob):
        memory.keep("x", torch.ones(3))
    assert len(alike) == 1
    del ann["x"]
    assert len(alike) == 1
    bob.keep("x", torch.zeros(3))
    assert [tensor.tolist() for tensor in alike.values()] == [[0.0, 0.0, 0.0]]


def test_what_is_kept_is_stored_apart_and_read_with_the_rest() -> None:
    memory = Memory()
    memory.keep("x", torch.arange(3.0).bfloat16())
    memory.keep("y", torch.eye(3))
    memory["own"] = torch.ones(2)
    assert [sorted(part.tensors) for part in memory.parts()] == [["x", "y"], ["own"]]
    read = stored(memory)
    assert read.keys() == memory.keys()
    assert all(read[name].dtype is memory[name].dtype and torch.equal(read[name], memory[name]) for name in memory)
    assert [part.name for part in read.parts()] == [part.name for part in memory.parts()]
    read["x"] = torch.zeros(3)
    assert [sorted(part.tensors) for part in read.parts()] == [["y"], ["own", "x"]]


def test_a_single_number_is_kept_as_any_tensor_is() -> None:
    """Such as a model's logit scale."""
    memory = Memory(alike={})
    memory.keep("scale", torch.tensor(2.0))
    assert torch.equal(memory["scale"], torch.tensor(2.0))


def test_what_is_kept_under_two_names_is_stored_under_both() -> None:
    """As the B of every fresh pair, which are all zeros: in simulation one tensor, which safetensors would not write twice."""
    for memory in (Memory(), Memory(alike={})):
        for name in ("one", "other"):
            memory.keep(name, torch.zeros(4, 2))
        assert stored(memory).keys() == {"one", "other"}


def test_a_node_remembers_only_the_last() -> None:
    memory, kept = Memory(), []
    for number in range(3):
        memory.keep("x", torch.full((3,), float(number)))
        memory.parts()
        kept.append(weakref.ref(memory["x"]))
    assert [tensor() is None for tensor in kept] == [True, True, False]
