"""FedProx: FedAvg, save that a client's steps are drawn back to where the round began."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.adapter import Adapter, Factors
from fedtune.errors import StrategyError
from fedtune.payload import payload_of
from fedtune.strategy import Ask
from fedtune.testing import QuadraticModel, check_strategy, first_adapter, fleet, play_round
from strategies.fedavg import FedAvg
from strategies.fedprox import FedProx, proximal
from tests.strategies.oracle import adapter

HEAD = "head.weight"


def bits(of: Adapter) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in payload_of(of).tensors.items()}


@pytest.mark.parametrize("mu", [0.0, 0.01, 1.0])
def test_it_keeps_the_rules(mu: float) -> None:
    check_strategy(FedProx(mu))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.floats(0.001, 10.0), st.integers(1, 4), st.integers(0, 99))
def test_the_gradient_of_the_penalty_is_mu_times_the_way_from_the_start(mu: float, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    start = adapter(rank)
    live = {
        path: Factors(*(torch.randn_like(t).requires_grad_() for t in (p.A, p.B)), p.scale) for path, p in start.lora.items()
    }
    head = torch.randn_like(start.dense[HEAD]).requires_grad_()
    proximal(start, mu)(Adapter(live, {HEAD: head})).backward()
    for path, pair in live.items():
        torch.testing.assert_close(pair.A.grad, mu * (pair.A - start.lora[path].A).detach())
        torch.testing.assert_close(pair.B.grad, mu * (pair.B - start.lora[path].B).detach())
    torch.testing.assert_close(head.grad, mu * (head - start.dense[HEAD]).detach())


def test_without_mu_it_is_fedavg_to_the_bit() -> None:
    def played(strategy: FedAvg) -> Adapter:
        state = strategy.start(first_adapter())
        for _ in range(3):
            state = play_round(strategy, state, fleet())
        return state.adapter

    assert bits(played(FedProx(mu=0.0))) == bits(played(FedAvg()))
    assert bits(played(FedProx(mu=0.5))) != bits(played(FedAvg()))


def test_the_first_step_feels_nothing() -> None:
    """At w = w_t the gradient mu (w - w_t) is zero: one local step is FedAvg's, whatever mu."""
    state = FedAvg().start(first_adapter())
    clients = fleet(steps=1)
    assert bits(play_round(FedProx(mu=10.0), state, clients).adapter) == bits(play_round(FedAvg(), state, clients).adapter)


def test_the_second_step_is_drawn_back() -> None:
    """On `1/2 |W - T|^2` of a whole parameter from W = 0, with lr a: W1 = a T, W2 = W1 + a (T - W1) - a mu (W1 - 0)."""
    a, mu = 0.125, 0.5
    T = torch.tensor([[1.0, -2.0], [4.0, 8.0]])
    client = QuadraticModel({HEAD: T}, lr=a, steps=2)
    start = Adapter(dense={HEAD: torch.zeros(2, 2)})
    answer = FedProx(mu).answer(Ask("train", payload_of(start)), client, {})  # type: ignore[arg-type]
    W1 = a * T
    torch.testing.assert_close(answer.payload.tensors[HEAD], W1 + a * (T - W1) - a * mu * W1)


def test_the_second_step_of_the_factors_is_drawn_back() -> None:
    """With one step made by plain FedAvg from the same start as w_1, w_2 differs from FedAvg's by `-lr mu (w_1 - w_t)`."""
    start, [client, *_] = first_adapter(), fleet().values()
    ask, mu = Ask("train", payload_of(start)), 0.25

    def trained(mu: float, steps: int) -> dict[str, torch.Tensor]:
        return dict(FedProx(mu).answer(ask, replace(client, steps=steps), {}).payload.tensors)  # type: ignore[arg-type]

    began, one, two = payload_of(start).tensors, trained(mu, 1), trained(mu, 2)
    for name, free in trained(0.0, 2).items():
        torch.testing.assert_close(two[name], free - client.lr * mu * (one[name] - began[name]))
    assert any(not torch.equal(one[name], began[name]) for name in one if name.endswith("lora_B"))


def test_the_error_of_the_aggregation_is_measured() -> None:
    state = play_round(FedProx(), FedProx().start(first_adapter()), fleet())
    assert state.metrics["aggregation_error"] > 1e-6


def test_a_payload_is_as_large_as_the_formula_says() -> None:
    """r (d + k) for modules of 4 x 4 and 6 x 3, and a head of 2 x 4."""
    r, h = 2, 8
    state = FedProx().start(first_adapter(r))
    [client, *_] = fleet().values()
    up = FedProx().answer(Ask("train", FedProx().broadcast(state)), client, {}).payload  # type: ignore[arg-type]
    for payload in (up, FedProx().broadcast(state)):
        assert sum(t.numel() for t in payload.tensors.values()) == sum(r * (d + k) for d, k in [(4, 4), (6, 3)]) + h
    assert FedProx.up == FedProx.down == "r*(d + k) + h"


@pytest.mark.parametrize("mu", [-0.1, float("nan"), float("inf")])
def test_a_mu_that_is_none_is_refused(mu: float) -> None:
    with pytest.raises(StrategyError, match=f"mu of at least 0, given {mu}"):
        FedProx(mu)
