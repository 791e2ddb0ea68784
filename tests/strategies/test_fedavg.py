"""FedAvg (FedIT): the weighted mean of A and of B, whatever the shapes; not the mean of the products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from fedtune.errors import StrategyError
from fedtune.strategy import ClientInfo
from fedtune.testing import check_strategy, play_round, product
from strategies.fedavg import FedAvg
from tests.strategies.oracle import HEAD, Drifter, adapter, fleets, mean_of, mean_product, mean_weight, relative, shares


def test_it_keeps_the_rules() -> None:
    check_strategy(FedAvg())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(fleets())
def test_factors_and_heads_are_averaged_by_examples(clients: dict[str, Drifter]) -> None:
    rank = clients["c0"].rank
    state = play_round(FedAvg(), FedAvg().start(adapter(rank)), clients)
    for path, pair in state.adapter.lora.items():
        trained = {id: client.trained.lora[path] for id, client in clients.items()}
        for side in ("A", "B"):
            wanted = mean_of((p, getattr(trained[id], side)) for id, p in shares(clients).items())
            torch.testing.assert_close(getattr(pair, side).double(), wanted, rtol=2**-23, atol=1e-7)
        assert pair.scale == pytest.approx(1.5, rel=1e-12)  # the server's, whatever the clients' own alphas are
    assert relative(state.adapter.dense[HEAD], mean_weight(clients, HEAD)) < 1e-6


def test_the_product_of_means_is_not_the_mean_of_products() -> None:
    """Two clients of equal weight: `s (B1+B2)/2 (A1+A2)/2` lacks the covariance `s (B1-B2)(A1-A2)/4`."""
    clients = {"a": Drifter(seed=1), "b": Drifter(seed=2)}
    state = play_round(FedAvg(), FedAvg().start(adapter()), clients)
    one, other = clients["a"].trained.lora["tall"], clients["b"].trained.lora["tall"]
    covariance = 1.5 * (one.B - other.B).double() @ (one.A - other.A).double() / 4
    published, exact = state.adapter.lora["tall"], mean_product(clients, "tall")
    torch.testing.assert_close(exact - product(published), covariance, rtol=0, atol=1e-6)
    assert relative(product(published), exact) > 0.1
    assert state.metrics["aggregation_error.tall"] == pytest.approx(relative(product(published), exact), rel=1e-6)


def test_every_client_counts() -> None:
    """Not the first only: leaving out any of the four moves the mean."""
    clients = {id: Drifter(seed=i, examples=i + 1) for i, id in enumerate("abcd")}
    whole = play_round(FedAvg(), FedAvg().start(adapter()), clients).adapter.lora["square"].B
    for id in clients:
        others = {other: client for other, client in clients.items() if other != id}
        assert not torch.allclose(play_round(FedAvg(), FedAvg().start(adapter()), others).adapter.lora["square"].B, whole)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (3, 3), (2, 2)])
def test_a_and_b_are_told_apart_by_name_and_not_by_shape(shape: tuple[int, int]) -> None:
    """With d = k = r nothing but the name tells A from B; one client must come back as it was."""
    client = Drifter(rank=2, seed=3)
    state = play_round(FedAvg(), FedAvg().start(adapter(shapes={"m": shape})), {"a": client})
    torch.testing.assert_close(product(state.adapter.lora["m"]), client.weight("m"))
    assert state.adapter.lora["m"].shape == shape


def test_rounds_go_on_from_the_mean() -> None:
    clients = {"a": Drifter(seed=1), "b": Drifter(seed=2, examples=9)}
    state = FedAvg().start(adapter())
    for _ in range(3):
        before = {path: product(pair) for path, pair in state.adapter.lora.items()}
        state = play_round(FedAvg(), state, clients)
        for client in clients.values():
            for path, wanted in before.items():
                torch.testing.assert_close(client.began[path], wanted)


def test_mixed_ranks_are_refused_before_the_first_round() -> None:
    cohort = [ClientInfo("a", 1, 4), ClientInfo("b", 1, 8)]
    with pytest.raises(StrategyError, match=r"'fedavg'.*one rank.*\{'a': 4, 'b': 8\}.*--set strategy.name=flora"):
        FedAvg().check(cohort)
