"""LoRA-FAIR: dB is the minimum of its objective, checked on dense matrices, and what is left is what is reported."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.adapter import Factors
from fedtune.errors import StrategyError
from fedtune.strategy import Ask, ServerState
from fedtune.testing import check_strategy, first_adapter, fleet, play_round, product
from strategies.fedavg import FedAvg
from strategies.lora_fair import LoraFair, correction
from tests.strategies.oracle import HEAD, Drifter, adapter, fleets, mean_of, mean_product, mean_weight, relative, shares

Clients = dict[str, Drifter]


def played(clients: Clients, regularization: float = 0.01, scale: float = 1.5) -> ServerState:
    strategy = LoraFair(regularization)
    return play_round(strategy, strategy.start(adapter(clients["c0"].rank, scale)), clients)


def mean_factor(clients: Clients, path: str, side: str) -> Tensor:
    return mean_of((p, getattr(clients[id].trained.lora[path], side)) for id, p in shares(clients).items())


def dense_answer(clients: Clients, path: str, regularization: float) -> tuple[Tensor, Tensor]:
    """A and the minimum of the objective over B', as one least-squares problem on dense matrices:
    `min |[DW/s; sqrt(lambda) B] - B' [A; sqrt(lambda) I]|` (side by side), by QR and not by the normal equations."""
    A, B = mean_factor(clients, path, "A"), mean_factor(clients, path, "B")
    scale = next(iter(clients.values())).trained.lora[path].scale
    root = (regularization * A.square().sum() / A.shape[0]).sqrt()
    left = torch.cat([mean_product(clients, path) / scale, root * B], dim=1)  # (d, k + r)
    right = torch.cat([A, root * torch.eye(A.shape[0], dtype=torch.float64)], dim=1)  # (r, k + r)
    return A, torch.linalg.lstsq(right.T, left.T, driver="gels").solution.T


@pytest.mark.parametrize("regularization", [1e-6, 0.01, 1.0])
def test_it_keeps_the_rules(regularization: float) -> None:
    check_strategy(LoraFair(regularization))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(fleets(), st.sampled_from([1e-4, 0.01, 1.0]), st.sampled_from([0.25, 1.5, 16 / 3**0.5]))
def test_b_is_the_dense_minimum(clients: Clients, regularization: float, scale: float) -> None:
    """Also with weights over orders of magnitude, alpha other than r, and one client."""
    state = played(clients, regularization, scale)
    for path, pair in state.adapter.lora.items():
        A, B = dense_answer(clients, path, regularization)
        assert relative(pair.A, A) < 1e-6
        assert (pair.B - B).norm() * A.norm() <= 3e-5 * max(mean_product(clients, path).norm() / scale, (B.norm() * A.norm()))
        assert pair.scale == pytest.approx(scale, rel=1e-12)
    assert relative(state.adapter.dense[HEAD], mean_weight(clients, HEAD)) < 1e-6


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 999), st.sampled_from([1e-3, 0.01, 10.0]))
def test_the_gradient_of_the_objective_vanishes(rank: int, more: int, seed: int, regularization: float) -> None:
    """`|DW/s - (B + dB) A|_F^2 + lambda |dB|_F^2`, dense, by autograd in float64; DW of another scale than the mean."""
    draw = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    mean, exact = Factors(drawn(rank, 7), drawn(6, rank), 0.25), Factors(drawn(rank + more, 7), drawn(6, rank + more), 3.0)
    dB = correction(mean, exact, regularization).requires_grad_()
    penalty = regularization * (mean.A @ mean.A.T).trace() / rank
    ((product(exact) / 0.25 - (mean.B + dB) @ mean.A).square().sum() + penalty * dB.square().sum()).backward()
    assert dB.norm() > 0
    assert dB.grad is not None
    assert dB.grad.norm() <= 1e-9 * (product(exact) / 0.25 @ mean.A.T).norm()


def test_without_regularization_it_is_the_projection_onto_the_rows_of_a() -> None:
    """lambda -> 0: `s (B + dB) A = DW A^+ A`, and the error is the share of DW outside."""
    clients = {f"c{i}": Drifter(seed=i, examples=10**i) for i in range(3)}
    state = played(clients, regularization=1e-10)
    for path, pair in state.adapter.lora.items():
        exact, A = mean_product(clients, path), mean_factor(clients, path, "A")
        projected = exact @ torch.linalg.pinv(A) @ A
        assert relative(product(pair), projected) < 1e-5
        assert state.metrics[f"aggregation_error.{path}"] == pytest.approx(relative(projected, exact), rel=1e-4)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(fleets())
def test_the_error_is_what_the_formula_predicts_and_below_fedavgs(clients: Clients) -> None:
    """dB = 0 is one candidate of the minimum, so the published product is never further from DW than FedAvg's."""
    state = played(clients)
    plain = play_round(FedAvg(), FedAvg().start(adapter(clients["c0"].rank)), clients)
    missed = wanted = torch.zeros(())
    for path in state.adapter.lora:
        A, B = dense_answer(clients, path, 0.01)
        exact, error = mean_product(clients, path), state.metrics[f"aggregation_error.{path}"]
        assert error == pytest.approx(relative(1.5 * B @ A, exact), rel=1e-3, abs=1e-5)
        assert error <= plain.metrics[f"aggregation_error.{path}"] + 1e-5
        missed, wanted = missed + (product(state.adapter.lora[path]) - exact).square().sum(), wanted + exact.square().sum()
    assert state.metrics["aggregation_error"] == pytest.approx((missed / wanted).sqrt().item(), rel=1e-3, abs=1e-6)


def test_the_correction_helps_where_clients_differ() -> None:
    clients = {f"c{i}": Drifter(seed=i, examples=i + 1) for i in range(4)}
    plain = play_round(FedAvg(), FedAvg().start(adapter()), clients)
    assert played(clients).metrics["aggregation_error"] < 0.9 * plain.metrics["aggregation_error"]


def test_equal_clients_are_not_corrected() -> None:
    """Then the mean of the products is the product of the means."""
    clients = {f"c{i}": Drifter(seed=5, examples=10**i) for i in range(3)}
    state = played(clients)
    for path, pair in state.adapter.lora.items():
        torch.testing.assert_close(pair.B, clients["c0"].trained.lora[path].B)
    assert state.metrics["aggregation_error"] < 1e-6


def test_an_a_of_zeros_divides_by_nothing() -> None:
    """Two clients whose A cancel: no B can change the product, so B stays the mean."""
    one, other = torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    exact = Factors(one, other, 1.0)
    assert not correction(Factors(torch.zeros(2, 5), torch.ones(4, 2), 1.5), exact, 0.01).any()


def test_a_row_of_zeros_in_a_is_solved_for() -> None:
    """A A^T is singular, A A^T + lambda I is not; the column of dB beside that row is zero."""
    mean = Factors(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]), torch.zeros(2, 2), 1.0)
    exact = Factors(torch.tensor([[1.0, 2.0, 2.0]]), torch.ones(2, 1), 1.0)
    dB = correction(mean, exact, 0.01)
    # A A^T = diag(9, 0), lambda = 0.01 * 9 / 2: the first column is 9 / (9 + 0.045), for DW = 1 (1, 2, 2)
    torch.testing.assert_close(dB, torch.tensor([[9 / 9.045, 0.0], [9 / 9.045, 0.0]], dtype=torch.float64))


def test_who_does_not_take_part_changes_nothing() -> None:
    """Rounds with other cohorts go on from the corrected B."""
    strategy, everyone = LoraFair(), {f"c{i}": Drifter(seed=i, examples=i + 1) for i in range(4)}
    state = strategy.start(adapter())
    for cohort in (("c0", "c3"), ("c1",), ("c0", "c1", "c2")):
        before, clients = state, {id: everyone[id] for id in cohort}
        state = play_round(strategy, state, clients)
        for path, pair in state.adapter.lora.items():
            for id in cohort:
                torch.testing.assert_close(everyone[id].began[path], product(before.adapter.lora[path]))
            A, B = dense_answer(clients, path, 0.01)
            assert relative(pair.B, B) < 1e-5
            assert relative(pair.A, A) < 1e-6


def test_a_payload_is_as_large_as_the_formula_says() -> None:
    """r (d + k) for modules of 4 x 4 and 6 x 3, and a head of 2 x 4, as FedAvg's: the correction is not sent apart."""
    r, h, strategy = 2, 8, LoraFair()
    state = strategy.start(first_adapter(r))
    up = strategy.answer(Ask("train", strategy.broadcast(state)), fleet()["client-0"], {}).payload  # type: ignore[arg-type]
    for payload in (up, strategy.broadcast(play_round(strategy, state, fleet()))):
        assert sum(t.numel() for t in payload.tensors.values()) == sum(r * (d + k) for d, k in [(4, 4), (6, 3)]) + h
    assert LoraFair.up == LoraFair.down == "r*(d + k) + h"


@pytest.mark.parametrize("regularization", [0.0, -1.0, float("nan")])
def test_a_regularization_that_is_none_is_refused(regularization: float) -> None:
    with pytest.raises(StrategyError, match=f"regularization of at least 1e-12, given {regularization}"):
        LoraFair(regularization)
