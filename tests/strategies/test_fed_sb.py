"""Fed-SB: a calibration from sums finds the leading directions of the mean gradient; then the mean of R is exact."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import ClientFailed, StrategyError
from fedtune.folding import FoldedAnswers
from fedtune.memory import Memory
from fedtune.payload import Payload, Role
from fedtune.seeds import uniform
from fedtune.strategy import Answer, Ask, ClientInfo, Fold, ServerState
from fedtune.testing import SHAPES, check_strategy, play_round, product, saved_and_read
from strategies.fed_sb import FedSB
from tests.strategies.oracle import HEAD, Drifter, adapter, fleets, mean_of, mean_weight, relative, shares

MODULES = tuple(SHAPES.values())  # (d, k): (4, 4) and (6, 3)


def wanting(client: Drifter, rank: int | None = None) -> Drifter:
    """The client with targets T of at most this rank: at the base model, of zeros, its gradient is 0 - T."""
    targets = {HEAD: uniform((2, 4), 1.0, HEAD, client.seed)}
    for path, (d, k) in SHAPES.items():
        T = uniform((d, k), 1.0, "target", path, client.seed)
        targets[path] = T if rank is None else uniform((d, rank), 1.0, "left", path) @ T[:rank]
    client.targets = targets
    return client


def two(rank: int | None = None, **settings_of: float) -> dict[str, Drifter]:
    given = {"a": Drifter(seed=1, examples=10), "b": Drifter(seed=2, examples=30)}
    for client in given.values():
        vars(client).update(settings_of)
    return {id: wanting(client, rank) for id, client in given.items()}


def mean_gradient(clients: Mapping[str, Drifter], path: str) -> torch.Tensor:
    return -mean_of((p, clients[id].targets[path]) for id, p in shares(clients).items())


def numbers(payload: Payload) -> int:
    return sum(tensor.numel() for tensor in payload.tensors.values())


def counted(formula: str, r: int = 2, h: int = 8) -> int:
    return sum(eval(formula, {"r": r, "d": d, "k": k, "h": 0}) for d, k in MODULES) + h


def converse(
    strategy: FedSB, state: ServerState, clients: Mapping[str, Drifter], memories: Mapping[str, Memory]
) -> tuple[ServerState, list[Ask], dict[str, str]]:
    """One round in which a client may fail: the next state, the asks, and why who failed."""
    conversation, asks, failed = strategy.round(state, [ClientInfo(id, 1, 2) for id in clients]), list[Ask](), {}
    answers: FoldedAnswers | None = None
    while True:
        try:
            ask = next(conversation) if answers is None else conversation.send(answers)
        except StopIteration as end:
            return end.value, asks, failed
        asks.append(ask)
        given: dict[str, Answer] = {}
        for id, client in clients.items():
            try:
                given[id] = strategy.answer(Ask(ask.kind, ask.payload_for(id)), client, memories[id])
            except ClientFailed as error:
                failed[id] = str(error)
        answers = FoldedAnswers({id: answer.weight for id, answer in given.items()}, ask.fold, given.__getitem__)


@pytest.mark.parametrize("passes", [1, 3])
def test_it_keeps_the_rules(passes: int) -> None:
    check_strategy(FedSB(passes=passes))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(fleets(), st.integers(1, 3))
def test_the_mean_is_exact(clients: dict[str, Drifter], rounds: int) -> None:
    """`sum_i p_i s B R_i A` of what the clients have trained, dense in float64."""
    clients = {id: wanting(client) for id, client in clients.items()}
    state, memories = FedSB().start(adapter(clients["c0"].rank)), dict[str, Memory]()
    for _ in range(rounds):
        state = play_round(FedSB(), state, clients, memories)
    for path, pair in FedSB().published(state).lora.items():
        largest = max(client.weight(path).norm().item() for client in clients.values())
        assert (product(pair) - mean_weight(clients, path)).norm() <= 1e-6 * largest  # products may cancel out in the mean
        assert pair.scale == 1.5
    assert relative(state.adapter.dense[HEAD], mean_weight(clients, HEAD)) < 1e-6


@pytest.mark.parametrize(("rank", "passes", "within"), [(2, 1, 1e-5), (None, 40, 1e-3)])
def test_the_calibration_finds_the_leading_directions_of_the_mean_gradient(
    rank: int | None, passes: int, within: float
) -> None:
    """One pass is enough where the gradient has no more than r directions; more passes sharpen any other. Signs are open."""
    clients = two(rank)
    state = play_round(FedSB(passes=passes), FedSB().start(adapter()), clients)
    for path, pair in state.adapter.lora.items():
        U, S, Vt = torch.linalg.svd(mean_gradient(clients, path))
        assert S[0] > 1.02 * S[1] > 1.02**2 * (0 if rank else S[2])  # else no direction would lead
        torch.testing.assert_close((pair.B.double().T @ U[:, :2]).abs(), torch.eye(2).double(), rtol=0, atol=within)
        torch.testing.assert_close((pair.A.double() @ Vt[:2].T).abs(), torch.eye(2).double(), rtol=0, atol=within)


def test_training_starts_at_the_base_model_with_a_gradient_that_is_not_zero() -> None:
    """R = 0, and by R the gradient is `s B^T G A^T`, which holds the leading singular values of G."""
    clients = two(rank=2, drift=0.0)
    state = play_round(FedSB(), FedSB().start(adapter()), clients)
    assert not any(product(pair).any() for pair in FedSB().published(state).lora.values())
    for path, pair in state.adapter.lora.items():
        G = mean_gradient(clients, path)
        slope = pair.B.double().T @ G @ pair.A.double().T  # (r, r)
        torch.testing.assert_close(slope.abs(), torch.diag(torch.linalg.svdvals(G)[:2]), rtol=0, atol=1e-5)


def test_the_frame_is_fixed_from_the_first_round_on() -> None:
    clients, memories = two(), dict[str, Memory]()
    state = play_round(FedSB(), FedSB().start(adapter()), clients, memories)
    later = play_round(FedSB(), state, clients, memories)
    for path, pair in state.adapter.lora.items():
        assert torch.equal(later.adapter.lora[path].A, pair.A)
        assert torch.equal(later.adapter.lora[path].B, pair.B)
        assert not torch.equal(later.tensors[f"{path}.lora_R"], state.tensors[f"{path}.lora_R"])


def test_only_sums_are_asked_for_and_the_formulas_count_what_travels() -> None:
    clients, memories = two(), {"a": Memory(), "b": Memory()}
    state, first, _ = converse(FedSB(), FedSB().start(adapter()), clients, memories)
    _, later, _ = converse(FedSB(), state, clients, memories)
    assert [ask.kind for ask in first] == ["sketch", "project", "train"]
    assert [ask.kind for ask in later] == ["train"]
    assert all(ask.fold is Fold.SUM for ask in [*first, *later])
    down = [numbers(ask.payload_for("a")) for ask in [*first, *later]]
    assert down == [8, counted("r*d"), counted(f"{FedSB.down} + r*(d + k)"), counted(FedSB.down)]
    up = [FedSB().answer(Ask(ask.kind, ask.payload_for("a")), clients["a"], memories["a"]).payload for ask in [*first, *later]]
    assert list(map(numbers, up)) == [counted("r*d", h=0), counted("r*k", h=0), counted(FedSB.up), counted(FedSB.up)]
    assert set(up[-1].roles.values()) == {Role.CORE, Role.DENSE}


def test_a_newcomer_gets_the_frame_and_the_others_the_core_alone() -> None:
    clients, memories = two(), {"a": Memory(), "b": Memory()}
    state, _, _ = converse(FedSB(), FedSB().start(adapter()), {"a": clients["a"]}, memories)
    after, [ask], failed = converse(FedSB(), saved_and_read(state), clients, memories)
    assert numbers(ask.payload_for("a")) == counted("r*r + h")
    assert numbers(ask.payload_for("b")) == counted("r*r + r*(d + k) + h")
    assert failed == {}
    for path, pair in FedSB().published(after).lora.items():
        assert relative(product(pair), mean_weight(clients, path)) < 1e-6


def test_a_client_that_lost_its_memory_misses_one_round() -> None:
    clients, memories = two(), {"a": Memory(), "b": Memory()}
    state, _, _ = converse(FedSB(), FedSB().start(adapter()), clients, memories)
    memories["b"] = Memory()
    state, _, failed = converse(FedSB(), state, clients, memories)
    assert failed == {"b": "it does not hold A and B of this run (its memory was lost); they come with the next ask"}
    state, [ask], failed = converse(FedSB(), state, clients, memories)
    assert failed == {}
    assert numbers(ask.payload_for("b")) > numbers(ask.payload_for("a"))


def test_the_frame_of_another_run_is_not_taken_for_this_one() -> None:
    clients, before, now = two(), {"a": Memory(), "b": Memory()}, {"a": Memory(), "b": Memory()}
    converse(FedSB(seed=1), FedSB().start(adapter()), clients, before)
    state, _, _ = converse(FedSB(), FedSB().start(adapter()), clients, now)
    _, _, failed = converse(FedSB(), state, clients, {"a": before["a"], "b": now["b"]})
    assert failed.keys() == {"a"}


def test_what_everybody_evaluates_is_what_is_published() -> None:
    clients = two()
    state = play_round(FedSB(), FedSB().start(adapter()), clients)
    newcomer = wanting(Drifter())
    FedSB().use(FedSB().broadcast(state), newcomer, Memory())
    for path, pair in FedSB().published(state).lora.items():
        torch.testing.assert_close(newcomer.weight(path), product(pair))


def test_the_scale_is_the_servers() -> None:
    clients = {"a": wanting(Drifter(scale=99.0))}
    state = play_round(FedSB(), FedSB().start(adapter(scale=0.5)), clients)
    pair, R = state.adapter.lora["tall"], state.tensors["tall.lora_R"]
    torch.testing.assert_close(clients["a"].weight("tall"), 0.5 * pair.B.double() @ R.double() @ pair.A.double())


@pytest.mark.parametrize("setting", ["calibration_batches", "passes"])
def test_a_setting_below_one_is_refused(setting: str) -> None:
    with pytest.raises(StrategyError, match=f"'fed_sb' needs {setting} of at least 1, given 0"):
        FedSB(**{setting: 0})


def test_mixed_ranks_are_refused() -> None:
    with pytest.raises(StrategyError, match=r"'fed_sb'.*\{'a': 4, 'b': 2\}"):
        FedSB().check([ClientInfo("a", 1, 4), ClientInfo("b", 1, 2)])
