"""SCAFFOLD: control variates are gradients, many local steps reach the common optimum, and lost memories do no harm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.adapter import Adapter
from fedtune.errors import StrategyError
from fedtune.job import checked_job
from fedtune.memory import Memory
from fedtune.payload import payload_of
from fedtune.strategy import Ask, ServerState, Strategy
from fedtune.testing import QuadraticModel, check_strategy, first_adapter, fleet, play_round, product, saved_and_read
from strategies.fedavg import FedAvg
from strategies.scaffold import Scaffold, linear
from tests.strategies.oracle import relative

HEAD = "head.weight"
LR = 0.125
Fleet = Mapping[str, QuadraticModel]


def heads() -> dict[str, QuadraticModel]:
    """Clients that want other heads, have other numbers of examples, and make 1, 4 and 16 local steps."""
    torch.manual_seed(1)
    return {
        f"c{i}": QuadraticModel({HEAD: torch.randn(2, 3) * (i + 1)}, examples=n, lr=LR, steps=steps)
        for i, (n, steps) in enumerate([(5, 1), (1, 4), (2, 16)])
    }


def shares(clients: Fleet, weighting: str = "examples") -> dict[str, float]:
    says = {id: float(client.examples) if weighting == "examples" else 1.0 for id, client in clients.items()}
    return {id: say / sum(says.values()) for id, say in says.items()}


def mean_target(clients: Fleet, weighting: str = "examples") -> Tensor:
    """Where `sum_i p_i/2 |W - T_i|^2` is least."""
    return sum((p * clients[id].targets[HEAD].double() for id, p in shares(clients, weighting).items()), torch.zeros(()))


def start(strategy: Strategy) -> ServerState:
    return strategy.start(Adapter(dense={HEAD: torch.ones(2, 3)}, base="b"))


def mean_control(memories: Mapping[str, Memory], says: Mapping[str, float]) -> Tensor:
    """`sum_i p_i c_i` from what the clients hold."""
    total = sum(says[id] for id in memories)
    return sum((says[id] / total * memory[f"c.{HEAD}"].double() for id, memory in memories.items()), torch.zeros(()))


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_it_keeps_the_rules(weighting: str) -> None:
    check_strategy(Scaffold(weighting))  # type: ignore[arg-type]


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_many_local_steps_reach_the_common_optimum(weighting: str) -> None:
    """The theorem on a convex quadratic: with c_i = g_i(w*) and c = 0 every corrected step at w* is zero, so w* is where
    SCAFFOLD stays, however many steps each client makes. It gets there from anywhere at this learning rate."""
    clients, memories = heads(), dict[str, Memory]()
    strategy = Scaffold(weighting)  # type: ignore[arg-type]
    state = start(strategy)
    for _ in range(80):
        state = play_round(strategy, state, clients, memories)
    assert relative(state.adapter.dense[HEAD], mean_target(clients, weighting)) < 1e-5
    assert state.tensors[HEAD].norm() < 1e-4
    for id, client in clients.items():
        gradient = state.adapter.dense[HEAD] - client.targets[HEAD]
        torch.testing.assert_close(memories[id][f"c.{HEAD}"], gradient, rtol=1e-4, atol=1e-4)


def test_fedavg_does_not() -> None:
    """A client of K steps goes the share `a = 1 - (1 - lr)^K` of the way to its own optimum, so FedAvg comes to rest at
    `sum p_i a_i T_i / sum p_i a_i`: those who make more steps count for more."""
    clients, strategy = heads(), FedAvg()
    state = start(strategy)
    for _ in range(200):
        state = play_round(strategy, state, clients)
    pull = {id: p * (1 - (1 - LR) ** clients[id].steps) for id, p in shares(clients).items()}
    rest = sum((a * clients[id].targets[HEAD].double() for id, a in pull.items()), torch.zeros(())) / sum(pull.values())
    assert relative(state.adapter.dense[HEAD], rest) < 1e-5
    assert relative(state.adapter.dense[HEAD], mean_target(clients)) > 0.1


def test_after_one_step_the_control_variates_are_the_gradients() -> None:
    """K = 1: c_i+ is the gradient at w_t of client i's own loss, whatever the correction. Of `1/2 |s B A - T|^2` it is
    `s B^T E` by A and `s E A^T` by B, with `E = s B A - T`; of a whole parameter `W - T`."""
    strategy, clients, memories = Scaffold(), fleet(steps=1), dict[str, Memory]()
    state = strategy.start(first_adapter())
    for _ in range(3):
        before, state = state, play_round(strategy, state, clients, memories)
        wanted: dict[str, dict[str, Tensor]] = {}
        for id, client in clients.items():
            wanted[id] = {HEAD: before.adapter.dense[HEAD] - client.targets[HEAD]}
            for path, pair in before.adapter.lora.items():
                E, A, B = product(pair) - client.targets[path], pair.A.double(), pair.B.double()
                wanted[id] |= {f"{path}.lora_A": pair.scale * B.T @ E, f"{path}.lora_B": pair.scale * E @ A.T}
            for name, gradient in wanted[id].items():
                torch.testing.assert_close(memories[id][f"c.{name}"].double(), gradient.double(), rtol=1e-4, atol=1e-5)
        for name in state.tensors:  # and c is their mean
            mean = sum((p * wanted[id][name].double() for id, p in shares(clients).items()), torch.zeros(()))
            torch.testing.assert_close(state.tensors[name].double(), mean, rtol=1e-4, atol=1e-5)


def test_the_second_round_by_hand() -> None:
    """Client i of two steps on `1/2 |w - T_i|^2` with lr a. First round, no correction: w_K = w + (1 - q^2)(T - w), where
    q = 1 - a, and c_i = (w - w_K) / 2a. Second round: each step is `w <- w - a (w - T_i + c - c_i)`."""
    strategy, memories = Scaffold("uniform"), dict[str, Memory]()
    clients = {
        "one": QuadraticModel({HEAD: torch.full((2, 3), 4.0)}, examples=7, lr=LR),
        "two": QuadraticModel({HEAD: torch.full((2, 3), -1.0)}, lr=LR),
    }
    state = play_round(strategy, start(strategy), clients, memories)
    ended = {id: 1 + (1 - (1 - LR) ** 2) * (T - 1) for id, T in (("one", 4.0), ("two", -1.0))}
    c_i = {id: (1 - w) / (2 * LR) for id, w in ended.items()}
    c = (c_i["one"] + c_i["two"]) / 2
    w = (ended["one"] + ended["two"]) / 2
    torch.testing.assert_close(state.adapter.dense[HEAD], torch.full((2, 3), w))
    torch.testing.assert_close(state.tensors[HEAD], torch.full((2, 3), c))
    for id, T in (("one", 4.0), ("two", -1.0)):
        ended[id] = w
        for _ in range(2):
            ended[id] -= LR * (ended[id] - T + c - c_i[id])
    state = play_round(strategy, state, clients, memories)
    torch.testing.assert_close(state.adapter.dense[HEAD], torch.full((2, 3), (ended["one"] + ended["two"]) / 2))


def test_the_first_round_is_fedavg() -> None:
    """c = c_i = 0."""
    state = play_round(Scaffold(), Scaffold().start(first_adapter()), fleet())
    plain = play_round(FedAvg(), FedAvg().start(first_adapter()), fleet())
    for name, tensor in payload_of(plain.adapter).tensors.items():
        torch.testing.assert_close(payload_of(state.adapter).tensors[name], tensor, rtol=0, atol=0)
    assert state.metrics == plain.metrics
    assert state.metrics["aggregation_error"] > 1e-6


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.sets(st.integers(0, 2), min_size=1), min_size=1, max_size=6), st.sampled_from(["examples", "uniform"]))
def test_c_is_the_mean_of_the_clients_met_whoever_takes_part(cohorts: list[set[int]], weighting: str) -> None:
    strategy, everyone, memories = Scaffold(weighting), heads(), dict[str, Memory]()  # type: ignore[arg-type]
    state = start(strategy)
    for cohort in cohorts:
        state = play_round(strategy, state, {f"c{i}": everyone[f"c{i}"] for i in cohort}, memories)
    wanted = mean_control(memories, shares(everyone, weighting))
    torch.testing.assert_close(state.tensors[HEAD].double(), wanted, rtol=1e-4, atol=1e-5)


def test_partial_participation_reaches_the_optimum_too() -> None:
    strategy, everyone, memories = Scaffold(), heads(), dict[str, Memory]()
    state = start(strategy)
    for number in range(400):
        cohort = {id: client for i, (id, client) in enumerate(everyone.items()) if i != number % 3}
        state = play_round(strategy, state, cohort, memories)
    assert relative(state.adapter.dense[HEAD], mean_target(everyone)) < 1e-5
    assert state.tensors[HEAD].norm() < 1e-4


def test_a_latecomer_trains_without_correction() -> None:
    """With c_i = 0 in place of c_i = c it would make a step of its own and of all others on top."""
    strategy, everyone, memories = Scaffold(), heads(), dict[str, Memory]()
    state = play_round(strategy, start(strategy), {"c0": everyone["c0"], "c1": everyone["c1"]}, memories)
    assert state.tensors[HEAD].norm() > 0.1
    late = {"c2": everyone["c2"]}
    after = play_round(strategy, state, late, memories)
    plain = play_round(FedAvg(), state, late)
    torch.testing.assert_close(after.adapter.dense[HEAD], plain.adapter.dense[HEAD])


@pytest.mark.parametrize("lost", ["memory", "answer"])
def test_a_lost_memory_or_answer_is_noticed_and_does_no_harm(lost: str) -> None:
    """Either leaves c other than the mean of what the clients hold, for good: all begin anew, and the optimum is reached."""
    strategy, clients, memories = Scaffold(), heads(), dict[str, Memory]()
    state = start(strategy)
    for _ in range(3):
        state = play_round(strategy, state, clients, memories)
    assert state.scalars["restarted"] == 0
    if lost == "memory":
        del memories["c1"]
    else:  # c1 has trained and remembered, but the state never heard of it
        play_round(strategy, state, {"c1": clients["c1"]}, memories)
        state = replace(state, scalars={**state.scalars, "round": state.scalars["round"] + 1})
    state = play_round(strategy, state, clients, memories)
    assert state.scalars["restarted"] == state.scalars["round"]
    assert not state.tensors[HEAD].any()
    for _ in range(80):
        state = play_round(strategy, saved_and_read(state), clients, memories)
    assert state.scalars["restarted"] < state.scalars["round"] - 70
    assert relative(state.adapter.dense[HEAD], mean_target(clients)) < 1e-5


def test_without_steps_nothing_is_learnt() -> None:
    strategy, memories = Scaffold(), dict[str, Memory]()
    state = play_round(strategy, strategy.start(first_adapter()), fleet(), memories)
    after = play_round(strategy, state, fleet(steps=0), memories)
    for name, tensor in payload_of(state.adapter).tensors.items():
        torch.testing.assert_close(payload_of(after.adapter).tensors[name], tensor)
        torch.testing.assert_close(after.tensors[name], state.tensors[name])


def test_the_gradient_of_the_penalty_is_its_slope() -> None:
    slope, live = torch.randn(2, 3), torch.randn(2, 3, requires_grad=True)
    linear({HEAD: slope})(Adapter(dense={HEAD: live})).backward()
    torch.testing.assert_close(live.grad, slope)


def test_a_payload_is_as_large_as_the_formula_says() -> None:
    """2 (r (d + k) + h) for modules of 4 x 4 and 6 x 3, and a head of 2 x 4, in the first round and after."""
    r, h, strategy, memories = 2, 8, Scaffold(), dict[str, Memory]()
    wanted = 2 * (sum(r * (d + k) for d, k in [(4, 4), (6, 3)]) + h)
    state = strategy.start(first_adapter(r))
    for _ in range(2):
        ask = next(strategy.round(state, []))
        up = strategy.answer(Ask("train", ask.payload), fleet()["client-0"], Memory()).payload
        assert [sum(t.numel() for t in sent.tensors.values()) for sent in (ask.payload, up)] == [wanted, wanted]
        state = play_round(strategy, state, fleet(), memories)
    assert Scaffold.up == Scaffold.down == "2*(r*(d + k) + h)"


def test_what_is_no_plain_sgd_is_refused_with_all_that_must_be_typed() -> None:
    with pytest.raises(StrategyError) as refused:
        checked_job({"strategy": "scaffold", "train": {"momentum": 0.9, "weight_decay": 0.1}}, "job.toml")
    for typed in ("optimizer=sgd", "momentum=0.0", "weight_decay=0.0", "clip=0.0"):
        assert f"--set train.{typed}" in str(refused.value)
    assert "train.optimizer = adamw" in str(refused.value)


def test_only_what_is_odd_is_named() -> None:
    with pytest.raises(StrategyError, match=r"given train.clip = 1.0; type --set train.clip=0.0$"):
        checked_job({"strategy": "scaffold", "train": {"optimizer": "sgd"}}, "job.toml")
    checked_job({"strategy": "scaffold", "train": {"optimizer": "sgd", "clip": 0}}, "job.toml")
