"""FedEx-LoRA: FedAvg's factors and their covariance in the base are the exact mean, round after round."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import StrategyError
from fedtune.strategy import Answer, Ask, LocalModel, ServerState
from fedtune.testing import QuadraticModel, check_strategy, play_round, product
from strategies.fedavg import FedAvg
from strategies.fedex_lora import FedExLoRA
from tests.strategies.oracle import HEAD, Drifter, adapter, fleets, mean_of, mean_weight, relative, shares

LARGE = {"square": (40, 40), "tall": (60, 30)}


def play(strategy: FedExLoRA, clients: dict[str, Drifter], rounds: int, rank: int = 2) -> ServerState:
    state = strategy.start(adapter(rank))
    for number in range(rounds):
        for i, client in enumerate(clients.values()):
            client.seed = 1000 * number + i
        state = play_round(strategy, state, clients)
    return state


def unlike(count: int = 4) -> dict[str, Drifter]:
    """Examples from 1 to 64; alphas that nobody should look at, since all train at the server's."""
    return {f"c{i}": Drifter(scale=0.25 * (i + 1), examples=4**i, seed=i) for i in range(count)}


@pytest.mark.parametrize("max_rank", [None, 1, 50])
def test_it_keeps_the_rules(max_rank: int | None) -> None:
    check_strategy(FedExLoRA(max_rank))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(fleets(), st.integers(1, 4))
def test_the_mean_of_the_clients_weights_is_exact(clients: dict[str, Drifter], rounds: int) -> None:
    """Clients keep E of all rounds in their base: whole weights are compared, not what the last round learnt."""
    strategy = FedExLoRA()
    state = play(strategy, clients, rounds, clients["c0"].rank)
    for path, pair in strategy.published(state).lora.items():
        largest = max(client.weight(path).norm().item() for client in clients.values())
        assert (product(pair) - mean_weight(clients, path)).norm() <= 1e-6 * largest
    assert relative(state.adapter.dense[HEAD], mean_weight(clients, HEAD)) < 1e-6
    assert state.metrics["aggregation_error"] < 1e-6


def test_it_is_fedavg_and_the_covariance() -> None:
    """`E = s sum_i p_i (B_i - B)(A_i - A)`, dense, beside the factors of FedAvg."""
    clients = unlike()
    state = play(FedExLoRA(), clients, 1)
    fedavg = play_round(FedAvg(), FedAvg().start(adapter()), clients)
    for path, pair in state.adapter.lora.items():
        mean = fedavg.adapter.lora[path]
        torch.testing.assert_close(pair.A[:2], mean.A)
        torch.testing.assert_close(pair.B[:, :2], mean.B)
        trained = {id: client.trained.lora[path] for id, client in clients.items()}
        terms = ((p, 1.5 * (trained[id].B - mean.B) @ (trained[id].A - mean.A)) for id, p in shares(clients).items())
        residual = pair.scale * pair.B[:, 2:].double() @ pair.A[2:].double()
        torch.testing.assert_close(residual, mean_of(terms), rtol=1e-5, atol=1e-6)


def test_one_client_less_is_sent_than_took_part() -> None:
    """The covariance of m clients has (m - 1) r directions: their deviations from the mean sum to 0."""
    strategy, clients = FedExLoRA(), unlike(3)
    state = play_round(strategy, strategy.start(adapter(shapes=LARGE)), clients)
    assert state.adapter.ranks == {"square": 2 + 2 * 2, "tall": 2 + 2 * 2}


def test_one_client_leaves_no_residual() -> None:
    state = play(FedExLoRA(), {"a": Drifter(seed=3)}, 3)
    assert state.adapter.ranks == {"square": 2, "tall": 2}


def test_every_client_begins_at_what_was_published() -> None:
    """base + E + s B A, with E as factors or as a whole matrix."""
    strategy, clients = FedExLoRA(), unlike()
    state = play(strategy, clients, 2)
    wanted = {path: product(pair) for path, pair in strategy.published(state).lora.items()}
    play_round(strategy, state, clients)
    for client in clients.values():
        for path, weight in wanted.items():
            assert relative(client.began[path], weight) < 1e-6


def test_partial_participation_over_rounds() -> None:
    """Who joins late gets the whole residual: each round is exact for its own cohort."""
    strategy, clients = FedExLoRA(), unlike()
    state = strategy.start(adapter())
    for number, cohort in enumerate((["c0", "c1"], ["c2", "c3"], ["c1"], ["c0", "c2", "c3"])):
        there = {id: clients[id] for id in cohort}
        for client in there.values():
            client.seed += 100 * number + 1
        state = play_round(strategy, state, there)
        for path, pair in strategy.published(state).lora.items():
            assert relative(product(pair), mean_weight(there, path)) < 1e-6


def test_a_square_residual_is_not_transposed() -> None:
    """d = k, as in `nn.Linear(768, 768)`: no shape would betray it."""
    strategy, clients = FedExLoRA(), unlike()
    state = play_round(strategy, strategy.start(adapter(shapes={"m": (3, 3)})), clients)
    slot = state.adapter.lora["m"]
    mean = 1.5 * slot.B[:, :2].double() @ slot.A[:2].double()
    residual = mean_weight(clients, "m") - mean
    assert relative(mean + residual.T, mean_weight(clients, "m")) > 0.01  # else the test could not tell
    assert relative(product(strategy.published(state).lora["m"]), mean_weight(clients, "m")) < 1e-6


@pytest.mark.parametrize("max_rank", [1, 2])
def test_a_cap_keeps_the_best_of_the_residual_and_reports_the_rest(max_rank: int) -> None:
    """Against the dense SVD of E: what is cut off, relative to the exact weights, is the error."""
    clients = unlike()
    state = play(FedExLoRA(max_rank), clients, 1)
    missed, wanted = [], []
    for path, pair in state.adapter.lora.items():
        exact = mean_weight(clients, path)
        mean = 1.5 * pair.B[:, :2].double() @ pair.A[:2].double()
        cut_off = torch.linalg.svdvals(exact - mean)[max_rank:].norm()
        assert pair.rank == 2 + max_rank
        assert (product(pair) - exact).norm().item() == pytest.approx(cut_off.item(), rel=1e-4)
        assert state.metrics[f"aggregation_error.{path}"] == pytest.approx((cut_off / exact.norm()).item(), rel=1e-4)
        missed, wanted = [*missed, cut_off], [*wanted, exact.norm()]
    together = torch.stack(missed).norm() / torch.stack(wanted).norm()
    assert state.metrics["aggregation_error"] == pytest.approx(together.item(), rel=1e-4)
    assert together > 1e-3


def numbers_down(rank: int, rounds: int, shapes: dict[str, tuple[int, int]]) -> list[int]:
    """Of each round's ask to train, heads left out."""
    seen: list[int] = []

    class Counting(FedExLoRA):
        def answer(self, ask: Ask, local: LocalModel, memory: object) -> Answer:
            seen.append(sum(tensor.numel() for name, tensor in ask.payload.tensors.items() if name != HEAD))
            return super().answer(ask, local, memory)  # type: ignore[arg-type]

    state, clients = Counting().start(adapter(rank, shapes=shapes)), unlike(3)
    for client in clients.values():
        client.rank = rank
    for number in range(rounds):
        for i, client in enumerate(clients.values()):
            client.seed = 10 * number + i
        state = play_round(Counting(), state, clients)
    return seen[::3]


def test_the_residual_grows_until_the_matrix_is_smaller() -> None:
    """r = 2, m = 3, d = k = 40: (m - 1) r = 4 directions more each round, 80 numbers each, until 21 of them exceed 1600."""
    down = numbers_down(2, 8, {"square": (40, 40)})
    assert down == [2 * 80 + min(4 * t * 80, 40 * 40) for t in range(8)]
    assert down[-1] == 2 * 80 + 40 * 40


def test_a_step_of_all_clients_is_a_step_of_central_training() -> None:
    """Theorem: with one full-batch gradient step per client and equal weights, the mean of the factors is the step of central
    training on the mean loss from base + E. So the first round, whose covariance is 0 since B = 0 gives A no gradient, is that
    step itself; later ones differ by E alone, which is quadratic in the learning rate."""
    generator = torch.Generator().manual_seed(5)
    targets = [{"m": torch.randn(6, 4, generator=generator)} for _ in range(3)]
    pooled = {"m": torch.stack([target["m"] for target in targets]).mean(0)}
    start = adapter(shapes={"m": (6, 4)})
    start = type(start)(start.lora)

    def after(wanted: Sequence[dict[str, torch.Tensor]], rounds: int, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        strategy = FedExLoRA()
        clients = {f"c{i}": QuadraticModel(target, steps=1, lr=lr) for i, target in enumerate(wanted)}
        state = strategy.start(start)
        for _ in range(rounds):
            state = play_round(strategy, state, clients)
        pair = state.adapter.lora["m"]
        return product(pair), 1.5 * pair.B[:, 2:].double() @ pair.A[2:].double()

    torch.testing.assert_close(after(targets, 1, 0.1)[0], after([pooled], 1, 0.1)[0], rtol=0, atol=1e-6)
    federated, residual = after(targets, 2, 0.1)
    torch.testing.assert_close(federated - residual, after([pooled], 2, 0.1)[0], rtol=0, atol=1e-6)
    assert residual.norm() > 1e-3
    # dB ~ lr, and dA ~ lr B ~ lr^2: the covariance of the second round falls with the cube of the learning rate
    assert after(targets, 2, 0.01)[1].norm() < residual.norm() / 500


@pytest.mark.parametrize("max_rank", [0, -3])
def test_a_cap_below_one_is_refused(max_rank: int) -> None:
    with pytest.raises(StrategyError, match=f"max_rank of at least 1, given {max_rank}"):
        FedExLoRA(max_rank)
