"""FLoRA: the exact mean of whole weights for any mix of ranks and alphas, warm and cold, until the rank cap cuts in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import StrategyError
from fedtune.strategy import ClientInfo, ServerState
from fedtune.testing import check_strategy, play_round, product
from strategies.flora import ROW_NORM, FLoRA
from tests.strategies.oracle import HEAD, Drifter, adapter, fleets, mean_product, mean_weight, relative, shares

STARTS = ["warm", "cold"]


def play(strategy: FLoRA, clients: dict[str, Drifter], rounds: int, rank: int = 2) -> ServerState:
    state = strategy.start(adapter(rank))
    for number in range(rounds):
        for i, client in enumerate(clients.values()):
            client.seed = 1000 * number + i
        state = play_round(strategy, state, clients)
    return state


def unlike() -> dict[str, Drifter]:
    """Ranks 1 to 3, alpha = r nowhere, examples from 1 to 100,000."""
    settings_of = [(1, 0.5, 1), (3, 2.0, 70), (2, 3.0, 4_000), (3, 0.25, 100_000)]
    return {f"c{i}": Drifter(rank=r, scale=s, examples=n, seed=i) for i, (r, s, n) in enumerate(settings_of)}


@pytest.mark.parametrize("start_from", STARTS)
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2)])
def test_it_keeps_the_rules(start_from: str, ranks: tuple[int, ...]) -> None:
    check_strategy(FLoRA(start_from=start_from), ranks)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(fleets(mixed=True), st.sampled_from(STARTS), st.integers(1, 3))
def test_the_mean_of_the_clients_weights_is_exact(clients: dict[str, Drifter], start_from: str, rounds: int) -> None:
    state = play(FLoRA(start_from=start_from), clients, rounds)  # type: ignore[arg-type]
    for path, pair in state.adapter.lora.items():
        wanted = mean_weight(clients, path)
        largest = max(client.weight(path).norm().item() for client in clients.values())
        assert (product(pair) - wanted).norm() <= 3e-6 * largest  # weights may cancel out in the mean
    assert relative(state.adapter.dense[HEAD], mean_weight(clients, HEAD)) < 1e-6
    assert state.metrics["discarded_energy"] < 1e-9


def test_the_first_cold_round_is_the_published_formula() -> None:
    """`sum_i p_i s_i B_i A_i`, with each client's own scale: eq. (3)."""
    clients = unlike()
    state = play(FLoRA(start_from="cold"), clients, 1)
    for path, pair in state.adapter.lora.items():
        assert {client.trained.lora[path].scale for client in clients.values()} == {0.5, 2.0, 3.0, 0.25}
        assert relative(product(pair), mean_product(clients, path)) < 1e-6


def test_a_warm_round_adds_what_the_clients_learnt() -> None:
    """`M' = M + sum_i p_i (s_i B_i A_i - T_i)`, T_i being the best approximation of M of rank r_i (dense SVD)."""
    clients = unlike()
    before = play(FLoRA(), clients, 1)
    after = play_round(FLoRA(), before, clients)
    for path, pair in after.adapter.lora.items():
        M = product(before.adapter.lora[path])
        U, S, Vt = torch.linalg.svd(M)
        wanted = M.clone()
        for id, p in shares(clients).items():
            r = clients[id].rank
            wanted += p * (product(clients[id].trained.lora[path]) - U[:, :r] @ torch.diag(S[:r]) @ Vt[:r])
        assert relative(product(pair), wanted) < 1e-5


@pytest.mark.parametrize("start_from", STARTS)
def test_every_client_begins_at_base_plus_m(start_from: str) -> None:
    """base + merged + slot is base + M for every rank: M is in the slot, or in the base, and nowhere twice."""
    strategy, clients = FLoRA(start_from=start_from), unlike()  # type: ignore[arg-type]
    state = play(strategy, clients, 2)
    play_round(strategy, state, clients)
    for client in clients.values():
        for path, pair in state.adapter.lora.items():
            assert relative(client.began[path], product(pair)) < 1e-6


def test_a_warm_client_goes_on_in_its_own_slot() -> None:
    """Never a cold start: what M holds of a client's rank is trainable again, at that client's own scale."""
    strategy, clients = FLoRA(), {"a": Drifter(rank=2, scale=3.0, drift=1.0)}
    state = play(strategy, clients, 1)
    clients["a"].drift = 0.0
    play_round(strategy, state, clients)
    slot = clients["a"].trained.lora["square"]
    assert slot.scale == 3.0
    assert relative(product(slot), product(state.adapter.lora["square"])) < 1e-6


def test_a_cold_client_begins_with_an_empty_slot() -> None:
    strategy, clients = FLoRA(start_from="cold"), {"a": Drifter(rank=2)}
    state = play(strategy, clients, 1)
    clients["a"].drift = 0.0
    play_round(strategy, state, clients)
    assert not clients["a"].trained.lora["square"].B.any()


@pytest.mark.parametrize("start_from", STARTS)
@pytest.mark.parametrize("max_rank", [1, 2, 3])
def test_the_rank_cap_keeps_the_best_and_reports_the_rest(start_from: str, max_rank: int) -> None:
    """Against the dense SVD of the exact mean: its best approximation, and the share of energy beyond it."""
    clients = unlike()
    state = play(FLoRA(max_rank=max_rank, start_from=start_from), clients, 1)  # type: ignore[arg-type]
    lost = []
    for path, pair in state.adapter.lora.items():
        U, S, Vt = torch.linalg.svd(mean_weight(clients, path), full_matrices=False)
        best = U[:, :max_rank] @ torch.diag(S[:max_rank]) @ Vt[:max_rank]
        assert pair.rank <= max_rank
        assert relative(product(pair), best) < 1e-5
        lost.append((S[max_rank:].square().sum() / S.square().sum()).item())
    assert state.metrics["discarded_energy"] == pytest.approx(max(lost), rel=1e-4, abs=1e-12)
    assert max(lost) > 1e-6 or max_rank == 3


def test_capped_rounds_go_on() -> None:
    """What was discarded is gone for good, and the next round is exact on what is left."""
    strategy, clients = FLoRA(max_rank=1), unlike()
    state = play(strategy, clients, 3)
    after = play_round(FLoRA(), state, clients)
    for path, pair in after.adapter.lora.items():
        assert relative(product(pair), mean_weight(clients, path)) < 1e-5


def test_who_is_not_in_the_cohort_changes_nothing() -> None:
    """Partial participation: the sum of ranks need not be that of the whole fleet."""
    clients = unlike()
    state = play(FLoRA(), clients, 1)
    half = {id: clients[id] for id in ("c1", "c2")}
    after = play_round(FLoRA(), state, half)
    assert relative(product(after.adapter.lora["tall"]), mean_weight(half, "tall")) < 1e-6


@pytest.mark.parametrize("start_from", STARTS)
def test_a_zero_update_keeps_the_product_over_many_rounds(start_from: str) -> None:
    strategy, clients = FLoRA(start_from=start_from), unlike()  # type: ignore[arg-type]
    state = play(strategy, clients, 2)
    wanted = {path: product(pair) for path, pair in state.adapter.lora.items()}
    for client in clients.values():
        client.drift = 0.0
    for _ in range(5):
        state = play_round(strategy, state, clients)
    for path, pair in state.adapter.lora.items():
        assert relative(product(pair), wanted[path]) < 1e-5


def test_square_matrices_are_not_transposed() -> None:
    client = Drifter(rank=3, seed=11)
    state = play_round(FLoRA(), FLoRA().start(adapter(rank=3, shapes={"m": (3, 3)})), {"a": client})
    assert relative(product(state.adapter.lora["m"]), client.weight("m")) < 1e-6
    assert relative(product(state.adapter.lora["m"]).T, client.weight("m")) > 0.1


def test_rows_of_a_are_as_long_as_peft_draws_them() -> None:
    """k entries of variance 1/(3k) make a row of squared length 1/3; training goes on at the size that it began with."""
    state = play(FLoRA(), unlike(), 2)
    for pair in state.adapter.lora.values():
        torch.testing.assert_close(pair.A.norm(dim=1), torch.full((pair.rank,), ROW_NORM), rtol=1e-5, atol=0)
        assert pair.scale == 1.0
        norms = pair.B.norm(dim=0)
        assert torch.equal(norms, norms.sort(descending=True).values)


@pytest.mark.parametrize("max_rank", [0, -3])
def test_a_cap_below_one_is_refused(max_rank: int) -> None:
    with pytest.raises(StrategyError, match=f"max_rank of at least 1, given {max_rank}"):
        FLoRA(max_rank=max_rank)


# what is kept by energy, and how the rest travels


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_keeps_the_smallest_rank_that_holds_it(energy: float) -> None:
    """FLoRIST: against the dense singular values of the exact mean, module by module."""
    clients = unlike()
    state = play(FLoRA(energy=energy), clients, 1)
    for path, pair in state.adapter.lora.items():
        S = torch.linalg.svdvals(mean_weight(clients, path)).square()
        wanted = next(q for q in range(1, len(S) + 1) if S[:q].sum() >= energy * S.sum())
        assert pair.rank == wanted
        error = (S[wanted:].sum() / S.sum()).sqrt().item()
        assert state.metrics[f"aggregation_error.{path}"] == pytest.approx(error, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("energy", [0.0, 1.5])
def test_an_energy_that_is_no_share_is_refused(energy: float) -> None:
    with pytest.raises(StrategyError, match=f"energy above 0 and at most 1, given {energy}"):
        FLoRA(energy=energy)


@pytest.mark.parametrize("start_from", STARTS)
def test_what_nobody_trains_on_from_travels_whole_where_that_is_smaller(start_from: str) -> None:
    """At 4 x 4 a direction takes 8 numbers and the matrix 16. M has rank 4; warm, the first 3 directions travel as factors,
    and the fourth as 8 numbers; cold, all four would take 32, so the matrix goes. Both arrive as M."""
    strategy, clients = FLoRA(start_from=start_from), unlike()  # type: ignore[arg-type]
    state = play(strategy, clients, 2)
    assert state.adapter.lora["square"].rank == 4
    cohort = [ClientInfo(id, client.examples, client.rank) for id, client in clients.items()]
    ask = next(strategy.round(state, cohort))
    sent = {name: tuple(t.shape) for name, t in ask.payload.tensors.items() if name.startswith("square")}
    if start_from == "warm":
        assert sent == {"square.lora_A": (4, 4), "square.lora_B": (4, 4)}
    else:
        assert sent == {"square.lora_A": (0, 4), "square.lora_B": (4, 0), "square.rest": (4, 4)}
    arrived = strategy.received(ask.payload).lora["square"]
    assert relative(product(arrived), product(state.adapter.lora["square"])) < 1e-6
