"""FFA-LoRA: A never travels and never moves, and so the mean of B is the exact mean of the products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from fedtune.errors import StrategyError
from fedtune.memory import Memory
from fedtune.payload import Role, payload_of
from fedtune.strategy import Ask, ClientInfo
from fedtune.testing import check_strategy, play_round, product
from strategies.ffa_lora import FfaLora
from tests.strategies.oracle import HEAD, Drifter, adapter, fleets, mean_product, mean_weight, relative


def test_it_keeps_the_rules() -> None:
    check_strategy(FfaLora())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(fleets())
def test_the_mean_is_exact(clients: dict[str, Drifter]) -> None:
    state = FfaLora().start(adapter(clients["c0"].rank))
    for _ in range(2):
        state = play_round(FfaLora(), state, clients)
        for path, pair in state.adapter.lora.items():
            assert relative(product(pair), mean_product(clients, path)) < 1e-6
        assert relative(state.adapter.dense[HEAD], mean_weight(clients, HEAD)) < 1e-6


def test_a_never_travels() -> None:
    strategy, local = FfaLora(), Drifter()
    down = strategy.broadcast(strategy.start(adapter()))
    up = strategy.answer(Ask("train B", down), local, Memory()).payload
    for payload in (down, up):
        assert Role.A not in payload.roles.values()
        assert sorted(payload.tensors) == [HEAD, "square.lora_B", "tall.lora_B"]


def test_the_payload_is_what_b_and_the_head_need() -> None:
    """`r sum(d) + head` numbers: (4 + 6) * 2 + 2 * 4."""
    strategy = FfaLora()
    down = strategy.broadcast(strategy.start(adapter()))
    assert sum(tensor.numel() for tensor in down.tensors.values()) == (4 + 6) * 2 + 2 * 4


def test_both_sides_hold_the_same_a_bit_for_bit_and_it_never_moves() -> None:
    clients = {"a": Drifter(seed=1), "b": Drifter(seed=2, examples=1000)}
    state = FfaLora(seed=5).start(adapter())
    first = {path: pair.A for path, pair in state.adapter.lora.items()}
    for _ in range(2):
        state = play_round(FfaLora(seed=5), state, clients)
        for path, A in first.items():
            assert torch.equal(state.adapter.lora[path].A, A)
            assert all(torch.equal(client.trained.lora[path].A, A) for client in clients.values())


def test_a_comes_from_the_seed_and_differs_between_modules() -> None:
    start = adapter(shapes={"one": (4, 4), "two": (4, 4)})
    pairs = FfaLora(seed=1).start(start).adapter.lora
    assert torch.equal(pairs["one"].A, FfaLora(seed=1).start(start).adapter.lora["one"].A)
    assert not torch.equal(pairs["one"].A, FfaLora(seed=2).start(start).adapter.lora["one"].A)
    assert not torch.equal(pairs["one"].A, pairs["two"].A)


def test_what_is_published_stands_alone() -> None:
    """Users load A and B from the folder: the published adapter has both, and the broadcast brings the same."""
    strategy = FfaLora()
    state = play_round(strategy, strategy.start(adapter()), {"a": Drifter()})
    published, received = strategy.published(state), strategy.received(strategy.broadcast(state))
    for name, tensor in payload_of(published).tensors.items():
        assert torch.equal(payload_of(received).tensors[name], tensor)
    assert {path: pair.scale for path, pair in received.lora.items()} == dict.fromkeys(published.lora, 1.5)


def test_the_scale_is_the_servers() -> None:
    client = Drifter(scale=99.0)
    state = play_round(FfaLora(), FfaLora().start(adapter(scale=0.5)), {"a": client})
    assert {pair.scale for pair in state.adapter.lora.values()} == {0.5}
    torch.testing.assert_close(product(state.adapter.lora["tall"]), client.weight("tall"))


def test_mixed_ranks_are_refused() -> None:
    cohort = [ClientInfo("a", 1, 4), replace(ClientInfo("b", 1, 4), rank=2)]
    with pytest.raises(StrategyError, match=r"'ffa_lora'.*\{'a': 4, 'b': 2\}"):
        FfaLora().check(cohort)
