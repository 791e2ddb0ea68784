"""Adapter to payload and back, whole and in parts."""

from __future__ import annotations

import pytest
import torch

from fedtune.adapter import Adapter, Factors
from fedtune.payload import Payload, Role, adapter_of, payload_of

PAIR = Factors(torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(4, 2), 1.5)  # d = 4, k = 3, r = 2
WIDE = Factors(torch.ones(1, 3), torch.ones(4, 1), 0.5)
ADAPTER = Adapter({"layers.0.q": PAIR, "layers.1.q": WIDE}, {"score.weight": torch.ones(2, 4)}, base="b")


def same(one: Adapter, other: Adapter) -> bool:
    pairs = all(
        torch.equal(pair.A, other.lora[path].A)
        and torch.equal(pair.B, other.lora[path].B)
        and pair.scale == other.lora[path].scale
        for path, pair in one.lora.items()
    )
    dense = all(torch.equal(tensor, other.dense[name]) for name, tensor in one.dense.items())
    return one.lora.keys() == other.lora.keys() and one.dense.keys() == other.dense.keys() and pairs and dense


def test_what_an_adapter_says_of_itself() -> None:
    assert ADAPTER.ranks == {"layers.0.q": 2, "layers.1.q": 1}
    assert PAIR.shape == (4, 3)
    assert ADAPTER.parameters() == (2 * 3 + 4 * 2) + (3 + 4) + 8


def test_names_roles_and_scales() -> None:
    payload = payload_of(ADAPTER)
    assert payload.roles == {
        "layers.0.q.lora_A": Role.A,
        "layers.0.q.lora_B": Role.B,
        "layers.1.q.lora_A": Role.A,
        "layers.1.q.lora_B": Role.B,
        "score.weight": Role.DENSE,
    }
    assert payload.scalars == {"layers.0.q.scale": 1.5, "layers.1.q.scale": 0.5}


def test_there_and_back() -> None:
    assert same(adapter_of(payload_of(ADAPTER)), ADAPTER)


@pytest.mark.parametrize("parts", [(Role.B,), (Role.A,), (Role.B, Role.DENSE), ()])
def test_parts_that_were_not_sent_come_from_the_adapter_at_hand(parts: tuple[Role, ...]) -> None:
    payload = payload_of(ADAPTER, parts)
    assert set(payload.roles.values()) == set(parts)
    zeros = Adapter(
        {path: Factors(0 * pair.A, 0 * pair.B, 9.0) for path, pair in ADAPTER.lora.items()},
        {"score.weight": torch.zeros(2, 4)},
        base="mine",
    )
    got = adapter_of(payload, like=zeros)
    for path, pair in ADAPTER.lora.items():
        assert torch.equal(got.lora[path].A, pair.A if Role.A in parts else 0 * pair.A)
        assert torch.equal(got.lora[path].B, pair.B if Role.B in parts else 0 * pair.B)
        assert got.lora[path].scale == pair.scale
    assert got.dense["score.weight"].any() == (Role.DENSE in parts)
    assert got.base == "mine"


def test_what_like_has_beside_stays() -> None:
    sent = payload_of(Adapter({"layers.1.q": PAIR}))
    got = adapter_of(sent, like=ADAPTER)
    assert got.lora["layers.1.q"].rank == 2
    assert got.lora["layers.0.q"] is PAIR
    assert "score.weight" in got.dense


def test_one_factor_alone_is_no_pair() -> None:
    with pytest.raises(ValueError, match=r"'layers.0.q' came with one factor only"):
        adapter_of(payload_of(ADAPTER, [Role.B]))


def test_a_vector_is_no_parameter() -> None:
    payload = Payload({"norms": torch.ones(3)}, {"norms": Role.VECTOR}, {"loss": 1.0})
    assert same(adapter_of(payload), Adapter())


@pytest.mark.parametrize("roles", [{}, {"x": Role.A, "y": Role.B}, {"y": Role.A}])
def test_each_tensor_needs_its_role(roles: dict[str, Role]) -> None:
    with pytest.raises(ValueError, match="a role for each tensor"):
        Payload({"x": torch.ones(1)}, roles)
