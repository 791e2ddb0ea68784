"""FedSVD: the exact mean of B, then the SVD of the product, so that A has orthonormal rows in every round."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.adapter import Factors
from fedtune.errors import StrategyError
from fedtune.memory import Memory
from fedtune.payload import Role
from fedtune.strategy import ClientInfo, ServerState
from fedtune.testing import check_strategy, play_round, product
from strategies.fedsvd import FedSVD, refreshed
from tests.strategies.oracle import HEAD, Drifter, adapter, fleets, mean_product, mean_weight, relative


def orthonormal(state: ServerState) -> bool:
    return all(torch.allclose(p.A @ p.A.T, torch.eye(p.rank), rtol=0, atol=1e-6) for p in state.adapter.lora.values())


def test_it_keeps_the_rules() -> None:
    check_strategy(FedSVD())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(fleets(), st.integers(1, 3))
def test_the_mean_is_exact_and_a_stays_orthonormal(clients: dict[str, Drifter], rounds: int) -> None:
    state = FedSVD().start(adapter(clients["c0"].rank))
    assert orthonormal(state)
    for _ in range(rounds):
        state = play_round(FedSVD(), state, clients)
        assert orthonormal(state)
        for path, pair in state.adapter.lora.items():
            wanted = mean_product(clients, path)
            largest = max(client.weight(path).norm().item() for client in clients.values())
            assert (product(pair) - wanted).norm() <= 1e-6 * largest  # products may cancel out in the mean
            assert pair.scale == pytest.approx(1.5, rel=1e-12)
        assert relative(state.adapter.dense[HEAD], mean_weight(clients, HEAD)) < 1e-6


def test_a_holds_the_right_singular_vectors_of_the_mean_product() -> None:
    """Against the dense SVD: rows of A by falling singular value, up to signs; the norms of B's columns are S / s."""
    clients = {"a": Drifter(seed=1, examples=3), "b": Drifter(seed=2, examples=10)}
    state = play_round(FedSVD(), FedSVD().start(adapter()), clients)
    for path, pair in state.adapter.lora.items():
        _, S, Vt = torch.linalg.svd(mean_product(clients, path))
        torch.testing.assert_close((pair.A.double() @ Vt[:2].T).abs(), torch.eye(2).double(), rtol=0, atol=1e-5)
        torch.testing.assert_close(pair.B.double().norm(dim=0), S[:2] / 1.5, rtol=1e-5, atol=0)


def test_the_first_a_spans_what_the_job_drew() -> None:
    """B = 0 has no directions of its own: the rows are those of the job's A, made orthonormal."""
    start = adapter()
    for path, pair in FedSVD().start(start).adapter.lora.items():
        A = start.lora[path].A.double()
        within = A.T @ torch.linalg.solve(A @ A.T, A)  # (k, k), the projection onto the rows of A
        torch.testing.assert_close(pair.A.double() @ within, pair.A.double(), rtol=0, atol=1e-6)
        assert not pair.B.any()


def test_a_product_with_fewer_directions_than_r_leaves_zero_columns() -> None:
    A, B = torch.eye(3)[:, [0, 1, 2, 0]] + 0.1, torch.zeros(5, 3)
    B[:, 1] = torch.arange(5.0)
    pair = refreshed(Factors(A, B, 0.5))
    torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(3), rtol=0, atol=1e-6)
    assert pair.B[:, 0].norm() > 1
    assert pair.B[:, 1:].norm() < 1e-6
    torch.testing.assert_close(product(pair), product(Factors(A, B, 0.5)), rtol=0, atol=1e-6)


def test_the_same_product_gives_the_same_bits() -> None:
    """Two clients with all factors flipped in sign are the same mean: no sign is left open."""
    pair = Factors(torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]]), torch.tensor([[1.0, 2.0], [0.3, -1.0]]), 1.5)
    flipped = Factors(-pair.A, -pair.B, 1.5)
    torch.testing.assert_close(refreshed(pair).A, refreshed(flipped).A)


def test_the_formulas_count_what_travels() -> None:
    strategy = FedSVD()
    ask = next(strategy.round(strategy.start(adapter()), []))
    up = strategy.answer(ask, Drifter(), Memory()).payload
    assert set(up.roles.values()) == {Role.B, Role.DENSE}
    for payload, formula in ((ask.payload, FedSVD.down), (up, FedSVD.up)):
        per_module = (eval(formula, {"r": 2, "d": d, "k": k, "h": 0}) for d, k in ((4, 4), (6, 3)))
        assert sum(tensor.numel() for tensor in payload.tensors.values()) == sum(per_module) + 2 * 4


def test_who_is_not_in_the_cohort_changes_nothing() -> None:
    clients = {f"c{i}": Drifter(seed=i, examples=10**i) for i in range(3)}
    state = play_round(FedSVD(), FedSVD().start(adapter()), clients)
    half = {id: clients[id] for id in ("c0", "c1")}
    after = play_round(FedSVD(), state, half)
    assert relative(product(after.adapter.lora["tall"]), mean_product(half, "tall")) < 1e-6


def test_mixed_ranks_are_refused() -> None:
    cohort = [ClientInfo("a", 1, 4), ClientInfo("b", 1, 2)]
    with pytest.raises(StrategyError, match=r"'fedsvd'.*\{'a': 4, 'b': 2\}"):
        FedSVD().check(cohort)
