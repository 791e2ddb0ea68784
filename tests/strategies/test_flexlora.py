"""FlexLoRA: the SVD of the exact mean, each client's cut of it, and what a cut misses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from fedtune.adapter import Adapter, Factors
from fedtune.errors import StrategyError
from fedtune.strategy import ClientInfo, ServerState
from fedtune.testing import SHAPES, check_strategy, play_round, product
from strategies.flexlora import FlexLoRA, aligned, cut_for
from tests.strategies.oracle import HEAD, Drifter, adapter, fleets, mean_product, mean_weight, relative

LARGE = {"square": (20, 20), "tall": (24, 16)}


def unlike() -> dict[str, Drifter]:
    """Ranks 1 to 4, alpha = r nowhere, examples from 1 to 1,000."""
    settings_of = [(1, 0.5, 1_000), (4, 2.0, 700), (2, 3.0, 400), (3, 0.25, 1)]
    return {f"c{i}": Drifter(rank=r, scale=s, examples=n, seed=i) for i, (r, s, n) in enumerate(settings_of)}


def play(clients: dict[str, Drifter], rounds: int = 1, strategy: FlexLoRA = FlexLoRA()) -> ServerState:  # noqa: B008
    state = strategy.start(adapter(shapes=LARGE))
    for number in range(rounds):
        for i, client in enumerate(clients.values()):
            client.seed = 1000 * number + i
        state = play_round(strategy, state, clients)
    return state


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vt[:rank]


@pytest.mark.parametrize("max_rank", [None, 1, 8])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2)])
def test_it_keeps_the_rules(max_rank: int | None, ranks: tuple[int, ...]) -> None:
    strategy = FlexLoRA(max_rank)
    if max_rank is None or max_rank >= ranks[0]:  # a cap below a client's rank is not what that client trained
        check_strategy(strategy, ranks)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(fleets(mixed=True))
def test_what_is_published_is_the_best_approximation_of_the_exact_mean(clients: dict[str, Drifter]) -> None:
    """Of the largest rank in the fleet; its distance is the norm of the singular values beyond, and is reported."""
    state = play_round(FlexLoRA(), FlexLoRA().start(adapter()), clients)
    largest = max(client.rank for client in clients.values())
    for path, pair in state.adapter.lora.items():
        exact = mean_product(clients, path)
        beyond = torch.linalg.svdvals(exact)[largest:].norm() / exact.norm()
        assert pair.rank <= largest
        assert relative(product(pair), exact) == pytest.approx(beyond.item(), rel=1e-4, abs=1e-6)
        assert state.metrics[f"aggregation_error.{path}"] == pytest.approx(beyond.item(), rel=1e-4, abs=1e-6)
    assert relative(state.adapter.dense[HEAD], mean_weight(clients, HEAD)) < 1e-6


def test_a_large_enough_cap_keeps_the_exact_mean() -> None:
    clients = unlike()
    state = play(clients, strategy=FlexLoRA(max_rank=1 + 4 + 2 + 3))
    for path, pair in state.adapter.lora.items():
        assert relative(product(pair), mean_product(clients, path)) < 1e-6


def test_each_client_begins_at_the_best_approximation_of_its_own_rank() -> None:
    clients = unlike()
    state = play(clients)
    play_round(FlexLoRA(), state, clients)
    for client in clients.values():
        for path, pair in state.adapter.lora.items():
            assert relative(client.began[path], best(product(pair), client.rank)) < 1e-5


def test_factors_are_balanced_at_the_clients_own_scale() -> None:
    """`s B A` with columns of B as long as rows of A; the same product for any alpha."""
    clients = unlike()
    state = play(clients)
    for client in clients.values():
        client.drift = 0.0
    play_round(FlexLoRA(), state, clients)
    for client in clients.values():
        pair = client.trained.lora["tall"]
        assert (pair.scale, pair.rank) == (client.scale, client.rank)
        torch.testing.assert_close(pair.B.norm(dim=0), pair.A.norm(dim=1))


def test_only_the_clients_own_rank_goes_down() -> None:
    state = play(unlike(), 2)
    for rank in (1, 2, 3, 4):
        sent = cut_for(ClientInfo("c", 1, rank), state.adapter)
        numbers = sum(tensor.numel() for tensor in sent.tensors.values())
        assert numbers == sum(rank * (d + k) for d, k in LARGE.values()) + 8  # the head has 2 x 4


def test_what_a_rank_misses_is_reported() -> None:
    clients = unlike()
    state = play(clients)
    exact = {path: mean_product(clients, path) for path in LARGE}
    total = torch.stack([matrix.norm() for matrix in exact.values()]).norm()
    for rank in (1, 2, 3, 4):
        missed = torch.stack([(matrix - best(matrix, rank)).norm() for matrix in exact.values()]).norm()
        assert state.metrics[f"truncation.rank_{rank}"] == pytest.approx((missed / total).item(), rel=1e-4)
    assert state.metrics["truncation.rank_4"] == pytest.approx(state.metrics["aggregation_error"], rel=1e-4)


def test_a_smaller_clients_first_rows_are_those_of_a_larger_one() -> None:
    """Before the first round A is one seeded matrix, cut to each rank, and B = 0."""
    clients = {f"c{rank}": Drifter(rank=rank, drift=0.0) for rank in (1, 2, 3)}
    play_round(FlexLoRA(), FlexLoRA().start(adapter()), clients)
    largest = clients["c3"].trained.lora["tall"].A
    for client in clients.values():
        pair = client.trained.lora["tall"]
        assert torch.equal(pair.A, largest[: client.rank])
        assert not pair.B.any()
    assert len(largest.unique(dim=0)) == 3


@pytest.mark.parametrize("learnt", [0, 1])
def test_where_m_has_too_few_directions_fresh_rows_are_trained(learnt: int) -> None:
    """M of rank 0 or 1: a direction with A = 0 and B = 0 would have no gradient ever after."""
    small = {"a": Drifter(rank=1, drift=float(learnt))}
    state = play_round(FlexLoRA(), FlexLoRA().start(adapter()), small)
    late = {"b": Drifter(rank=3, scale=0.5, drift=0.0)}
    play_round(FlexLoRA(), state, late)
    pair = late["b"].trained.lora["tall"]
    assert torch.all(pair.A.norm(dim=1) > 0)
    assert not pair.B[:, learnt:].any()
    torch.testing.assert_close(product(pair), product(state.adapter.lora["tall"]))


def test_what_a_large_client_can_take_is_kept_while_it_is_away() -> None:
    """Rank 3 took part once; the mean of two clients of rank 1 and 2 is kept whole for it, and not cut to rank 2."""
    clients = {"a": Drifter(rank=1, seed=1), "b": Drifter(rank=2, seed=2), "c": Drifter(rank=3, seed=3)}
    state = play_round(FlexLoRA(), FlexLoRA().start(adapter(shapes=LARGE)), clients)
    there = {id: clients[id] for id in "ab"}
    after = play_round(FlexLoRA(), state, there)
    assert after.adapter.ranks == {"square": 3, "tall": 3}
    for path, pair in after.adapter.lora.items():
        assert relative(product(pair), mean_product(there, path)) < 1e-6


def test_modules_of_a_rank_of_their_own() -> None:
    clients = {id: Drifter(rank=2, seed=i, pinned={"tall": (1, 4.0)}) for i, id in enumerate("ab")}
    state = play_round(FlexLoRA(), FlexLoRA().start(adapter()), clients)
    assert state.adapter.ranks == {"square": 2, "tall": 1}
    assert clients["a"].trained.lora["tall"].scale == 4.0


def test_signs_follow_the_last_round() -> None:
    """An SVD may return any direction negated in both factors; the product is the same, the start of training is not."""
    last = Factors(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.eye(2), 1.0)
    turned = Factors(torch.tensor([[-3.0, 0.1], [0.2, 1.0], [-1.0, 0.0]]), torch.ones(4, 3), 1.0)
    pair = aligned(turned, last)
    assert torch.equal(pair.A, torch.tensor([[3.0, -0.1], [0.2, 1.0], [-1.0, 0.0]]))
    assert torch.equal(product(pair), product(turned))


def test_rounds_do_not_turn_a_direction() -> None:
    """With small steps every direction of the next round points where it did."""
    clients = unlike()
    state = play(clients)
    for client in clients.values():
        client.drift = 1e-4
    turned = Adapter({p: Factors(-m.A, -m.B, m.scale) for p, m in state.adapter.lora.items()}, state.adapter.dense)
    for before in (state, ServerState(turned, scalars=state.scalars)):
        after = play_round(FlexLoRA(), before, {"c1": clients["c1"]})
        for path, pair in after.adapter.lora.items():
            cosines = torch.nn.functional.cosine_similarity(pair.A, before.adapter.lora[path].A)
            assert torch.all(cosines > 0.9)


def test_no_answer_that_learnt_leaves_nothing() -> None:
    clients = {"a": Drifter(rank=2, drift=0.0)}
    state = play_round(FlexLoRA(), FlexLoRA().start(adapter()), clients)
    assert state.metrics["aggregation_error"] == state.metrics["truncation.rank_2"] == 0.0
    assert {path: pair.shape for path, pair in state.adapter.lora.items()} == SHAPES


@pytest.mark.parametrize("max_rank", [0, -3])
def test_a_cap_below_one_is_refused(max_rank: int) -> None:
    with pytest.raises(StrategyError, match=f"max_rank of at least 1, given {max_rank}"):
        FlexLoRA(max_rank)
