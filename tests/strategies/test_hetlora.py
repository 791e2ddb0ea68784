"""HetLoRA: rows averaged over those who own them, larger updates weighing more, ranks that shrink for good."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.adapter import Adapter, Factors
from fedtune.errors import StrategyError
from fedtune.memory import Memory
from fedtune.strategy import Answer, Ask, LocalModel, Penalty, ServerState
from fedtune.testing import check_strategy, first_adapter, fleet, play_round, product
from strategies.hetlora import HetLoRA
from tests.strategies.oracle import HEAD, Drifter, adapter, fleets, mean_product, mean_weight, relative, shares

ROWS = ["kept", "padded", "owned"]
WEIGHTS = ["sparsity", "examples", "both"]
LARGE = {"square": (10, 10), "tall": (12, 9)}


def unlike() -> dict[str, Drifter]:
    """Ranks 1 to 4, alpha = r nowhere, examples from 1 to 1,000."""
    settings_of = [(1, 0.5, 1_000), (4, 2.0, 700), (2, 3.0, 400), (3, 0.25, 1)]
    return {f"c{i}": Drifter(rank=r, scale=s, examples=n, seed=i) for i, (r, s, n) in enumerate(settings_of)}


def says(weights: str, clients: Mapping[str, Drifter]) -> dict[str, float]:
    """Each client's weight from dense products."""
    p = shares(clients)
    if weights == "examples":
        return p
    norms = {id: math.hypot(*(product(m).norm().item() for m in c.trained.lora.values())) for id, c in clients.items()}
    say = {id: norm * (p[id] if weights == "both" else 1) for id, norm in norms.items()}
    return {id: value / sum(say.values()) for id, value in say.items()}


@pytest.mark.parametrize("strategy", [*(HetLoRA(w, r) for w in ROWS for r in WEIGHTS), HetLoRA(prune=0.1)])  # type: ignore[arg-type]
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2)])
def test_it_keeps_the_rules(strategy: HetLoRA, ranks: tuple[int, ...]) -> None:
    check_strategy(strategy, ranks)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(fleets(mixed=True), st.sampled_from(WEIGHTS), st.sampled_from(ROWS))
def test_row_j_is_the_mean_of_those_who_have_it_and_of_what_counts_for_the_others(
    clients: dict[str, Drifter], weights: str, rows: str
) -> None:
    """With P_j = sum_i w_i over r_i > j, the owners' sum of `sqrt(s_i) w_i A_i[j]` is divided by P_j (owned), or stands beside
    (1 - P_j) times zeros (padded) or the row that was broadcast (kept); so for columns of B, at the server's scale of 1.5."""
    strategy = HetLoRA(weights=weights, rows=rows)  # type: ignore[arg-type]
    start = {id: client.rank for id, client in clients.items()}
    still = {id: Drifter(rank=rank, scale=1.5, drift=0.0) for id, rank in start.items()}
    play_round(strategy, strategy.start(adapter()), still)  # to see what is broadcast
    given_rows = max(still.values(), key=lambda client: client.rank).trained.lora
    state, say = play_round(strategy, strategy.start(adapter()), clients), says(weights, clients)
    for path, pair in state.adapter.lora.items():
        assert pair.rank == max(client.rank for client in clients.values())
        for j in range(pair.rank):
            owners = {id: clients[id].trained.lora[path] for id, client in clients.items() if client.rank > j}
            P = sum(say[id] for id in owners)
            for side, row in (("A", lambda m, j=j: m.A[j]), ("B", lambda m, j=j: m.B[:, j])):
                own = sum((say[id] * m.scale**0.5 * row(m).double() for id, m in owners.items()), torch.zeros(()))
                beside = (1 - P) * 1.5**0.5 * row(given_rows[path]).double() if rows == "kept" else 0.0
                wanted = own / P if rows == "owned" else own + beside
                torch.testing.assert_close(row(pair).double() * 1.5**0.5, wanted, rtol=1e-5, atol=1e-6, msg=f"{side}[{j}]")
    assert relative(state.adapter.dense[HEAD], mean_weight(clients, HEAD)) < 1e-6


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_error_is_the_distance_from_the_exact_mean(weights: str) -> None:
    clients, strategy = unlike(), HetLoRA(weights=weights)  # type: ignore[arg-type]
    state = play_round(strategy, strategy.start(adapter()), clients)
    for path, pair in state.adapter.lora.items():
        wanted = relative(product(pair), mean_product(clients, path))
        assert state.metrics[f"aggregation_error.{path}"] == pytest.approx(wanted, rel=1e-5)
        assert wanted > 0.1


@pytest.mark.parametrize(("rows", "of_own"), [("owned", 1.0), ("padded", 0.5)])
def test_a_row_with_one_owner_shrinks_where_zeros_count(rows: str, of_own: float) -> None:
    """Padding halves what only `b` has of two clients; renormalised, it stays. Kept, it moves half of the way that `b` went,
    and not at all where `b` stands still."""
    clients = {"a": Drifter(rank=1, seed=1), "b": Drifter(rank=2, seed=2, scale=1.5)}
    strategy = HetLoRA(rows=rows, weights="examples")  # type: ignore[arg-type]
    state = play_round(strategy, strategy.start(adapter()), clients)
    torch.testing.assert_close(state.adapter.lora["tall"].A[1], of_own * clients["b"].trained.lora["tall"].A[1])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_when_nobody_has_learnt_examples_decide_and_nothing_is_nan(weights: str) -> None:
    strategy = HetLoRA(weights=weights)  # type: ignore[arg-type]
    clients = {"a": Drifter(rank=1, drift=0.0), "b": Drifter(rank=3, drift=0.0)}
    state = play_round(strategy, strategy.start(adapter()), clients)
    for path, pair in state.adapter.lora.items():
        assert torch.isfinite(pair.A).all()
        assert torch.all(pair.A.norm(dim=1) > 0)  # what training starts from is still there
        assert not product(pair).any()
        assert state.metrics[f"aggregation_error.{path}"] == 0.0


def test_a_row_whose_only_owner_weighs_nothing_stays_as_it_was() -> None:
    """`b` has learnt nothing, so its norm and its weight are 0; rows 1 and 2 are its own alone."""
    clients = {"a": Drifter(rank=1, seed=1), "b": Drifter(rank=3, drift=0.0)}
    state = play_round(HetLoRA(), HetLoRA().start(adapter()), clients)
    pair, given = state.adapter.lora["tall"], clients["b"].trained.lora["tall"]
    torch.testing.assert_close(pair.A[1:] * (1.5 / given.scale) ** 0.5, given.A[1:])
    assert not pair.B[:, 1:].any()


def test_a_client_begins_at_its_own_rows_of_what_is_published() -> None:
    clients = unlike()
    state = play_round(HetLoRA(), HetLoRA().start(adapter()), clients)
    play_round(HetLoRA(), state, clients)
    for client in clients.values():
        for path, pair in state.adapter.lora.items():
            cut = Factors(pair.A[: client.rank], pair.B[:, : client.rank], pair.scale)
            assert relative(client.began[path], product(cut)) < 1e-6
            assert client.trained.lora[path].scale == client.scale


def test_rows_that_no_one_trained_this_round_are_kept() -> None:
    """Partial participation: the rows of a large client outlast the rounds that it is not in."""
    clients = unlike()
    state = play_round(HetLoRA(), HetLoRA().start(adapter()), clients)
    after = play_round(HetLoRA(), state, {"c0": clients["c0"]})
    for path, pair in state.adapter.lora.items():
        assert torch.equal(after.adapter.lora[path].A[1:], pair.A[1:])
        assert torch.equal(after.adapter.lora[path].B[:, 1:], pair.B[:, 1:])
        assert not torch.equal(after.adapter.lora[path].A[0], pair.A[0])


@pytest.mark.parametrize("rows", ["kept", "owned"])
def test_zero_updates_change_nothing_after_training(rows: str) -> None:
    """Padding alone shrinks what few have."""
    clients, strategy = unlike(), HetLoRA(rows=rows)  # type: ignore[arg-type]
    state = play_round(strategy, strategy.start(adapter()), clients)
    for client in clients.values():
        client.drift = 0.0
    after = play_round(strategy, state, clients)
    for path, pair in state.adapter.lora.items():
        assert relative(product(after.adapter.lora[path]), product(pair)) < 1e-6


# self-pruning


@dataclass
class Shrinker(Drifter):
    """A client whose training moves its first direction only, and multiplies all others by `times`."""

    times: float = 0.5

    def fit(self, penalty: Penalty | None = None) -> Mapping[str, float]:
        start = self._slot
        metrics = super().fit(penalty)
        pairs = {}
        for path, moved in self._slot.lora.items():
            given, head = start.lora[path], moved.rank == 1 or not start.lora[path].B.any()
            A = moved.A if head else torch.cat([moved.A[:1], given.A[1:] * self.times])
            B = moved.B if head else torch.cat([moved.B[:, :1], given.B[:, 1:] * self.times], dim=1)
            pairs[path] = Factors(A, B, moved.scale)
        self._slot = Adapter(pairs, self._slot.dense, start.base)
        return metrics


class Watched(HetLoRA):
    """Writes down the rank of each answer and ask."""

    log: list[tuple[int, int]] = []  # noqa: RUF012

    def answer(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        answer = super().answer(ask, local, memory)
        tensors = (ask.payload.tensors["tall.lora_A"], answer.payload.tensors["tall.lora_A"])
        self.log.append((tensors[0].shape[0], tensors[1].shape[0]))
        return answer


def ranks_over(rounds: int, strategy: Watched, times: float, scale: float = 1.0) -> tuple[list[tuple[int, int]], ServerState]:
    Watched.log = []
    state, memories = strategy.start(adapter(shapes=LARGE)), dict[str, Memory]()
    client = Shrinker(rank=8, scale=scale, times=times)
    for number in range(rounds):
        client.seed = number
        state = play_round(strategy, state, {"a": client}, memories)
    return Watched.log, state


def test_a_tail_that_shrank_is_dropped_for_good() -> None:
    """gamma = 0.5: 8, 4, 2, 1. Round 1 starts from B = 0, whose tail can only grow; up and down shrink alike."""
    log, state = ranks_over(5, Watched(prune=0.1, gamma=0.5), times=0.5)
    assert log == [(8, 8), (8, 4), (4, 2), (2, 1), (1, 1)]
    assert state.adapter.ranks == {"square": 1, "tall": 1}  # no client has the others any more


@pytest.mark.parametrize(("prune", "times"), [(0.0, 0.5), (0.1, 1.5)])
def test_nothing_is_dropped_without_pruning_or_where_the_tail_grew(prune: float, times: float) -> None:
    log, _ = ranks_over(3, Watched(prune=prune, gamma=0.5), times)
    assert log == [(8, 8)] * 3


def test_what_another_client_still_has_is_kept() -> None:
    strategy, memories = HetLoRA(prune=0.1, gamma=0.5), dict[str, Memory]()
    clients = {"a": Shrinker(rank=8), "b": Shrinker(rank=6, times=2.0, seed=1)}
    state = strategy.start(adapter(shapes=LARGE))
    for _ in range(2):
        state = play_round(strategy, state, clients, memories)
    assert clients["a"].adapter().ranks["tall"] == 8  # as trained; what it sent and remembers is half of it
    assert memories["a"]["tall.rank"].item() == 4
    assert state.adapter.ranks == {"square": 6, "tall": 6}


def test_a_client_that_knows_better_than_the_server_keeps_to_its_rank() -> None:
    """Its last answer was lost on the way: the server sends 8 rows still."""
    client, memory = Shrinker(rank=8), Memory({"tall.rank": torch.tensor(3), "square.rank": torch.tensor(3)})
    play_round(HetLoRA(prune=0.1), HetLoRA().start(adapter(shapes=LARGE)), {"a": client}, {"a": memory})
    assert client.trained.ranks == {"square": 3, "tall": 3}


def test_the_tail_is_that_of_the_formula() -> None:
    """`|B[:, q:]| |A[q:, :]|`, q = floor(0.85 x 4) = 3, summed over the modules; rank 1 has no tail."""
    pair = Factors(torch.arange(20.0).reshape(4, 5), torch.arange(24.0).reshape(6, 4), 3.0)
    wanted = (pair.B[:, 3].norm() * pair.A[3].norm()).item()
    one = Factors(torch.ones(1, 5), torch.ones(6, 1), 3.0)
    assert HetLoRA().tail(Adapter({"m": pair, "n": one})).item() == pytest.approx(wanted)
    assert HetLoRA().tail(Adapter({"m": pair, "n": pair})).item() == pytest.approx(2 * wanted)


def test_the_penalty_has_a_gradient_where_b_is_zero() -> None:
    """Before the first round: the norm of zeros has no derivative, and none must be NaN."""
    A, B = torch.ones(4, 5, requires_grad=True), torch.zeros(6, 4, requires_grad=True)
    torch.autograd.backward([HetLoRA(prune=0.1).tail(Adapter({"m": Factors(A, B, 1.0)}))])
    assert A.grad is not None
    assert B.grad is not None
    assert torch.isfinite(A.grad).all()
    assert torch.isfinite(B.grad).all()


def test_the_penalty_pulls_the_tail_towards_zero() -> None:
    """A client of plain gradient steps with a stronger penalty ends with a shorter tail."""

    def tail_after(prune: float) -> float:
        clients = fleet((2,), steps=4)
        state, strategy, memories = HetLoRA().start(first_adapter()), HetLoRA(prune=prune), dict[str, Memory]()
        for _ in range(2):
            state = play_round(strategy, state, clients, memories)
        return strategy.tail(clients["client-0"].adapter()).item()

    assert tail_after(0.5) < 0.9 * tail_after(0.001)


@pytest.mark.parametrize(("setting", "value"), [("prune", -0.1), ("prune", math.nan), ("gamma", 0.0), ("gamma", 1.0)])
def test_settings_out_of_range_are_refused(setting: str, value: float) -> None:
    with pytest.raises(StrategyError, match=f"'hetlora' needs {setting} .*given {value}"):
        HetLoRA(**{setting: value})  # type: ignore[arg-type]
