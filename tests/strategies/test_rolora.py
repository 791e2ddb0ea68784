"""RoLoRA: B and A take turns, B first; each mean is the exact mean of the products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import StrategyError
from fedtune.memory import Memory
from fedtune.payload import Role
from fedtune.quadratic import QuadraticModel
from fedtune.strategy import Ask, ClientInfo
from fedtune.testing import check_strategy, play_round, product, saved_and_read
from strategies.rolora import RoLoRA
from tests.strategies.oracle import HEAD, Drifter, adapter, fleets, mean_of, mean_product, mean_weight, relative, shares

ODD_AND_EVEN = [(1, "B", "A"), (2, "A", "B"), (3, "B", "A"), (4, "A", "B")]  # round, what trains, what is frozen


def test_it_keeps_the_rules() -> None:
    check_strategy(RoLoRA())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(fleets(), st.integers(1, 4))
def test_the_mean_is_exact_in_every_turn(clients: dict[str, Drifter], rounds: int) -> None:
    state = RoLoRA().start(adapter(clients["c0"].rank))
    for _ in range(rounds):
        state = play_round(RoLoRA(), state, clients)
    for path, pair in state.adapter.lora.items():
        wanted = mean_product(clients, path)
        largest = max(client.weight(path).norm().item() for client in clients.values())
        assert (product(pair) - wanted).norm() <= 1e-6 * largest  # products may cancel out in the mean
        assert pair.scale == pytest.approx(1.5, rel=1e-12)
    assert relative(state.adapter.dense[HEAD], mean_weight(clients, HEAD)) < 1e-6


def test_one_factor_moves_and_the_other_stays_bit_for_bit() -> None:
    clients = {"a": Drifter(seed=1, examples=3), "b": Drifter(seed=2, examples=1000)}
    state = RoLoRA().start(adapter())
    for _, moves, stays in ODD_AND_EVEN:
        before, state = state.adapter.lora, play_round(RoLoRA(), state, clients)
        for path, pair in state.adapter.lora.items():
            wanted = mean_of((p, getattr(clients[id].trained.lora[path], moves)) for id, p in shares(clients).items())
            assert relative(getattr(pair, moves), wanted) < 1e-6
            assert not torch.equal(getattr(pair, moves), getattr(before[path], moves))
            assert torch.equal(getattr(pair, stays), getattr(before[path], stays))


def test_b_goes_first_because_a_would_learn_nothing() -> None:
    """With B = 0 the gradient of A, `s B^T dL/dW`, is zero; of B, `s dL/dW A^T`, it is not."""
    local = QuadraticModel({"m": torch.ones(3, 4)})
    start = adapter(shapes={"m": (3, 4)})
    local.load(replace(start, dense={}))
    slope = local.gradient().lora["m"]
    assert not slope.A.any()
    assert slope.B.any()


@pytest.mark.parametrize(("number", "trains", "frozen"), ODD_AND_EVEN)
def test_the_formulas_count_what_travels(number: int, trains: str, frozen: str) -> None:
    state = RoLoRA().start(adapter())
    for _ in range(number - 1):
        state = play_round(RoLoRA(), state, {"a": Drifter()})
    ask = next(RoLoRA().round(state, [ClientInfo("a", 1, 2)]))
    up = RoLoRA().answer(ask, Drifter(), Memory()).payload
    assert {Role(f"lora_{trains}"), Role.DENSE} == set(up.roles.values())
    for payload, formula in ((ask.payload, RoLoRA.down), (up, RoLoRA.up)):
        per_module = (eval(formula, {"r": 2, "d": d, "k": k, "h": 0, "odd": number % 2 == 1}) for d, k in ((4, 4), (6, 3)))
        assert sum(tensor.numel() for tensor in payload.tensors.values()) == sum(per_module) + 2 * 4


def test_a_client_that_missed_rounds_catches_up_with_one_ask() -> None:
    """Both factors come down each time, so partial participation needs nothing else."""
    here, away = {"a": Drifter(seed=1)}, {"b": Drifter(seed=2, drift=0.0)}
    state = RoLoRA().start(adapter())
    for _ in range(3):
        state = play_round(RoLoRA(), state, here)
    play_round(RoLoRA(), state, away)
    for path, pair in state.adapter.lora.items():
        assert relative(away["b"].trained.lora[path].B, pair.B.double()) < 1e-6
        assert relative(away["b"].trained.lora[path].A, pair.A.double()) < 1e-6


def test_the_turn_survives_a_restart() -> None:
    state = play_round(RoLoRA(), RoLoRA().start(adapter()), {"a": Drifter()})
    assert next(RoLoRA().round(saved_and_read(state), [])).kind == "train A"
    assert next(RoLoRA().round(RoLoRA().start(adapter()), [])).kind == "train B"


def test_the_scale_is_the_servers() -> None:
    client = Drifter(scale=99.0)
    state = play_round(RoLoRA(), RoLoRA().start(adapter(scale=0.5)), {"a": client})
    assert {pair.scale for pair in state.adapter.lora.values()} == {0.5}
    torch.testing.assert_close(product(state.adapter.lora["tall"]), client.weight("tall"))


def test_an_answer_holds_nothing_of_the_frozen_factor() -> None:
    ask = next(RoLoRA().round(RoLoRA().start(adapter()), []))
    assert isinstance(ask, Ask)
    assert sorted(RoLoRA().answer(ask, Drifter(), Memory()).payload.tensors) == [HEAD, "square.lora_B", "tall.lora_B"]


def test_mixed_ranks_are_refused() -> None:
    cohort = [ClientInfo("a", 1, 4), ClientInfo("b", 1, 2)]
    with pytest.raises(StrategyError, match=r"'rolora'.*\{'a': 4, 'b': 2\}"):
        RoLoRA().check(cohort)
