"""Flower's own strategies behind our conversation: the same numbers as by hand, and nothing forgotten between rounds."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.adapter import Adapter
from fedtune.errors import FedtuneError, RoundFailed, StrategyError
from fedtune.job import checked_job
from fedtune.payload import payload_of
from fedtune.strategy import ClientInfo, ServerState
from fedtune.testing import (
    check_empty_round,
    check_settings,
    check_state,
    check_strategy,
    check_use,
    first_adapter,
    fleet,
    play_round,
    product,
    saved_and_read,
)
from strategies.fedavg import FedAvg
from strategies.flower import Flower
from tests.strategies.oracle import HEAD, Drifter, adapter, mean_product, mean_weight, relative

EVERY = {
    "FedAvg": {},
    "FedAvgM": {"server_momentum": 0.9, "server_learning_rate": 0.5},
    "FedAdam": {"eta": 0.01},
    "FedYogi": {"eta": 0.01},
    "FedAdagrad": {"eta": 0.01},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.34},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 2},
    "Bulyan": {},
    "QFedAvg": {"client_learning_rate": 0.1},
}


def drifters(count: int = 5) -> dict[str, Drifter]:
    return {f"c{i}": Drifter(seed=i, examples=10**i) for i in range(count)}


def played(
    strategy: Flower | FedAvg, clients: Mapping[str, Drifter], rounds: int = 1, through_disk: bool = False
) -> ServerState:
    state = strategy.start(adapter())
    for number in range(rounds):
        for i, client in enumerate(clients.values()):
            client.seed = 100 * number + i
        state = play_round(strategy, saved_and_read(state) if through_disk else state, clients)
    return state


def tensors(of: Adapter) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().astype(np.float64) for name, tensor in payload_of(of).tensors.items()}


def trained(clients: Mapping[str, Drifter]) -> dict[str, np.ndarray]:
    """Of each tensor those of all clients, one above the other."""
    every = [tensors(client.trained) for client in clients.values()]
    return {name: np.stack([one[name] for one in every]) for name in every[0]}


def same(given: Adapter, wanted: Mapping[str, np.ndarray]) -> None:
    assert tensors(given).keys() == wanted.keys()
    for name, tensor in tensors(given).items():
        np.testing.assert_allclose(tensor, wanted[name], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("wraps", ["FedAvg", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum"])
def test_means_keep_the_rules(wraps: str) -> None:
    check_strategy(Flower(wraps, EVERY[wraps]))


@pytest.mark.parametrize("wraps", ["FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "QFedAvg", "Bulyan"])
def test_the_others_keep_all_rules_but_one(wraps: str) -> None:
    """A step that is not the whole way is on purpose no local training of a single client; Bulyan wants three clients."""
    strategy = Flower(wraps, EVERY[wraps])
    for rule in (check_settings, check_empty_round, check_use, check_state):
        rule(strategy)


@pytest.mark.parametrize("wraps", EVERY)
def test_rounds_through_a_checkpoint_are_the_same_to_the_bit(wraps: str) -> None:
    strategy = Flower(wraps, EVERY[wraps])
    straight, resumed = played(strategy, drifters(3), 2), played(strategy, drifters(3), 2, through_disk=True)
    for name, tensor in payload_of(straight.adapter).tensors.items():
        assert torch.equal(tensor, payload_of(resumed.adapter).tensors[name])
    assert straight.tensors.keys() == resumed.tensors.keys()


@pytest.mark.parametrize("order", [1, -1])
def test_fedavg_is_ours(order: int) -> None:
    clients = dict(list(drifters().items())[::order])
    same(played(Flower(), clients, 2).adapter, tensors(played(FedAvg(), clients, 2).adapter))


def test_every_tensor_is_the_median() -> None:
    clients = drifters()
    state = played(Flower("FedMedian"), clients)
    same(state.adapter, {name: np.sort(each, axis=0)[2] for name, each in trained(clients).items()})


def test_every_tensor_is_the_mean_without_the_extremes() -> None:
    """beta = 0.2 of five clients cuts one at each end; those left count the same, whatever their examples."""
    clients = drifters()
    state = played(Flower("FedTrimmedAvg", {"beta": 0.2}), clients)
    same(state.adapter, {name: np.sort(each, axis=0)[1:-1].mean(axis=0) for name, each in trained(clients).items()})


def test_krum_is_one_clients_own_update_and_not_the_liars() -> None:
    """Of n = 5 with f = 1 the one whose n - f - 2 = 2 nearest are nearest."""
    clients = drifters()
    clients["c4"].drift = 1e6
    state = played(Flower("Krum", {"num_malicious_nodes": 1}), clients)
    flat = np.stack([np.concatenate([t.ravel() for t in tensors(c.trained).values()]) for c in clients.values()])
    distances = np.sort(((flat[:, None] - flat[None]) ** 2).sum(-1), axis=1)
    chosen = int(distances[:, 1:3].sum(axis=1).argmin())
    assert chosen != 4
    same(state.adapter, {name: each[chosen] for name, each in trained(clients).items()})
    assert played(FedAvg(), clients).adapter.dense[HEAD].abs().max() > 1e5


def test_a_median_resists_a_liar() -> None:
    clients = drifters()
    clients["c4"].drift = 1e6
    assert played(Flower("FedMedian"), clients).adapter.dense[HEAD].abs().max() < 10


def fedadam(rounds: list[dict[str, np.ndarray]], x: dict[str, np.ndarray], eta: float, tau: float) -> dict[str, np.ndarray]:
    """Reddi et al., Algorithm 2, with Adam's correction of the bias as Flower has it (power t + 1 in round t):
    m = b1 m + (1 - b1) D, v = b2 v + (1 - b2) D^2, x += eta sqrt(1 - b2^(t+1)) / (1 - b1^(t+1)) m / (sqrt(v) + tau)."""
    b1, b2 = 0.8, 0.95
    m, v = ({name: 0.0 * tensor for name, tensor in x.items()} for _ in range(2))
    for t, mean in enumerate(rounds, start=1):
        for name in x:
            D = mean[name] - x[name]
            m[name], v[name] = b1 * m[name] + (1 - b1) * D, b2 * v[name] + (1 - b2) * D**2
            step = eta * np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
            x[name] = x[name] + step * m[name] / (np.sqrt(v[name]) + tau)
    return x


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("through_disk", [False, True])
def test_fedadam_by_hand(rounds: int, through_disk: bool) -> None:
    """The mean of each round is taken from the clients, who begin the second where the first has ended."""
    strategy = Flower("FedAdam", {"eta": 0.05, "tau": 0.1, "beta_1": 0.8, "beta_2": 0.95})
    state, clients, means = strategy.start(adapter()), drifters(), []
    weights = np.array([client.examples for client in clients.values()]) / 11111
    for _ in range(rounds):
        state = play_round(strategy, saved_and_read(state) if through_disk else state, clients)
        means.append({name: np.tensordot(weights, each, 1) for name, each in trained(clients).items()})
    same(state.adapter, fedadam(means, tensors(adapter()), eta=0.05, tau=0.1))


@pytest.mark.parametrize("through_disk", [False, True])
def test_fedavgm_by_hand(through_disk: bool) -> None:
    """Hsu et al.: v = beta v + (x - mean), x <- x - lr v, for three rounds of still clients after one that moved."""
    strategy = Flower("FedAvgM", {"server_momentum": 0.5, "server_learning_rate": 0.75})
    clients, x = drifters(), tensors(adapter())
    weights = np.array([client.examples for client in clients.values()]) / 11111
    v, state = {name: 0.0 * tensor for name, tensor in x.items()}, strategy.start(adapter())
    for number in range(3):
        for client in clients.values():
            client.drift = 1.0 if number == 0 else 0.0
        state = play_round(strategy, saved_and_read(state) if through_disk else state, clients)
        for name, each in trained(clients).items():
            v[name] = 0.5 * v[name] + x[name] - np.tensordot(weights, each, 1)
            x[name] = x[name] - 0.75 * v[name]
        same(state.adapter, x)


def test_the_error_of_the_aggregation_is_measured() -> None:
    clients = drifters()
    state = played(Flower("FedMedian"), clients)
    exact = {path: mean_product(clients, path) for path in state.adapter.lora}
    missed = [(product(pair) - exact[path]).norm() for path, pair in state.adapter.lora.items()]
    wanted = torch.stack([tensor.norm() for tensor in exact.values()]).norm()
    assert state.metrics["aggregation_error"] == pytest.approx((torch.stack(missed).norm() / wanted).item(), rel=1e-4)


def test_scales_are_the_servers() -> None:
    """Clients of other alphas train with the scale that was sent; no factor is mixed at another."""
    clients = {"a": Drifter(seed=1, scale=0.25), "b": Drifter(seed=2, scale=3.0)}
    state = played(Flower(), clients)
    assert {pair.scale for pair in state.adapter.lora.values()} == {1.5}
    assert relative(state.adapter.dense[HEAD], mean_weight(clients, HEAD)) < 1e-6


def test_a_payload_is_as_large_as_the_formula_says() -> None:
    """r (d + k) for modules of 4 x 4 and 6 x 3, and a head of 2 x 4: what a server optimiser remembers is not sent."""
    r, h, strategy = 2, 8, Flower("FedAdam")
    sent = strategy.broadcast(play_round(strategy, strategy.start(first_adapter(r)), fleet()))
    assert sum(t.numel() for t in sent.tensors.values()) == sum(r * (d + k) for d, k in [(4, 4), (6, 3)]) + h


# names and options


@pytest.mark.parametrize(
    ("wraps", "options", "said"),
    [
        ("FedAdm", {}, r"no strategy 'FedAdm', did you mean 'FedAdam'\?; known are Bulyan, FedAdagrad, FedAdam, FedAvg"),
        ("FedAdam", {"etta": 1}, r"FedAdam has no option 'etta', did you mean 'eta'\?; its options are eta, eta_l, beta_1"),
        ("FedAvg", {"eta": 1}, r"FedAvg has no option 'eta'; it has no options"),
        ("FedAdam", {"eta": "fast"}, r"FedAdam, option 'eta': wanted float, given 'fast'"),
        ("FedTrimmedAvg", {"beta": 0.7}, r"FedTrimmedAvg takes no such options \{'beta': 0.7\}: .*\[0, 0.5\)"),
        ("QFedAvg", {}, r"QFedAvg takes no such options.*client_learning_rate"),
        ("FedAvg", {"min_train_nodes": 5}, r"options.min_train_nodes is no option.*rounds.clients"),
        ("FedProx", {}, r"FedProx cannot be wrapped.*--set strategy.name=fedprox"),
        ("FedXgbBagging", {}, r"cannot be wrapped.*trees"),
        ("DifferentialPrivacyClientSideFixedClipping", {}, r"cannot be wrapped.*clients must clip"),
        ("flwr.serverapp.strategy:FedProx", {}, r"cannot be wrapped"),
        ("Strategy", {}, r"no strategy 'Strategy'"),
        ("Result", {}, r"no strategy 'Result'"),
        ("nowhere.to:Find", {}, r"cannot be loaded: No module named 'nowhere'"),
        ("json:dumps", {}, r"no strategy 'json:dumps'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(wraps: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(StrategyError, match=said) as refused:
        checked_job({"strategy": {"name": "flower", "wraps": wraps, "options": options}}, "job.toml")
    assert "\n" not in str(refused.value)
    with pytest.raises(StrategyError, match=said):
        Flower(wraps, options).check([ClientInfo("a", 1, 2)])


@pytest.mark.parametrize("wraps", EVERY)
def test_every_class_that_is_named_can_be_had(wraps: str) -> None:
    checked_job({"strategy": {"name": "flower", "wraps": wraps, "options": EVERY[wraps]}}, "job.toml")


def test_mixed_ranks_are_refused() -> None:
    with pytest.raises(StrategyError, match="one rank"):
        Flower().check([ClientInfo("a", 1, 4), ClientInfo("b", 1, 8)])


OWN = """
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg

class Counting(FedAvg):
    def __init__(self, kept=None, **others):
        super().__init__(min_available_nodes=99, **others)
        self.rounds, self.seen, self.kept = 0, [], kept

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.rounds += 1
        assert type(self.rounds) is int and self.rounds == server_round
        self.seen = [*self.seen, np.float64(server_round)]
        self.record = arrays
        if self.kept:
            self.kept = {"words": str(server_round)}
        return arrays, metrics

class InPlace(FedAvg):
    total = None

    def aggregate_train(self, server_round, replies):
        self.total = np.zeros(2) if self.total is None else self.total
        self.total += server_round
        return super().aggregate_train(server_round, replies)

class Losing(FedAvg):
    def aggregate_train(self, server_round, replies):
        return ArrayRecord({"w": Array(np.zeros(1))}), None

class Failing(FedAvg):
    def aggregate_train(self, server_round, replies):
        raise KeyError("x")
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


def test_ones_own_class_is_remembered(own: str) -> None:
    """Numbers with their type, lists in order and records; it would wait for 99 nodes, were it let."""
    state = played(Flower(f"{own}:Counting"), drifters(), 3, through_disk=True)
    assert state.scalars == {"rounds:int": 3.0, "round": 3.0}
    assert [state.tensors[f"seen:list:{i}:{i}"].item() for i in range(3)] == [1.0, 2.0, 3.0]
    assert torch.equal(state.tensors[f"record:record:0:{HEAD}"], state.adapter.dense[HEAD])


def test_a_class_that_writes_into_its_arrays_leaves_the_last_state_as_it_was(own: str) -> None:
    strategy, clients = Flower(f"{own}:InPlace"), drifters(3)
    state = played(strategy, clients)
    after = play_round(strategy, state, clients)
    assert state.tensors["total:array:0:"].tolist() == [1.0, 1.0]
    assert after.tensors["total:array:0:"].tolist() == [3.0, 3.0]


def test_what_no_checkpoint_can_hold_is_refused(own: str) -> None:
    with pytest.raises(StrategyError, match=r"remembers 'kept' \(dict\).*wanted numbers, arrays"):
        played(Flower(f"{own}:Counting", {"kept": "yes"}), drifters())


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [("Losing", StrategyError, "must give back the arrays"), ("Failing", StrategyError, "failed in round 1: KeyError: 'x'")],
)
def test_what_goes_wrong_inside_is_said(own: str, name: str, error: type[FedtuneError], said: str) -> None:
    with pytest.raises(error, match=said):
        played(Flower(f"{own}:{name}"), drifters())


def test_too_few_answers_for_bulyan_end_the_round() -> None:
    """4 f + 3 are needed: 7 for one liar."""
    with pytest.raises(RoundFailed, match=r"Bulyan made nothing of 5 answers: Insufficient replies.*at least 7"):
        played(Flower("Bulyan", {"num_malicious_nodes": 1}), drifters(5))


def test_the_terminal_stays_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    played(Flower("FedAdam"), drifters())
    assert "".join(capfd.readouterr()) == ""
    assert logging.getLogger("flwr").filters == []


def test_flower_is_imported_only_when_it_is_used() -> None:
    code = "import sys, strategies.flower as f; f.Flower('FedAdam'); assert 'flwr' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
