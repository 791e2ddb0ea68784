"""FedSA-LoRA: A is the mean of all, B and the head are each client's own and never leave it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from fedtune.errors import ClientFailed, StrategyError
from fedtune.memory import Memory
from fedtune.payload import Role
from fedtune.strategy import Ask, ClientInfo, ServerState
from fedtune.testing import check_strategy, play_round, product
from strategies.fedsa_lora import FedSALoRA
from tests.strategies.oracle import HEAD, Drifter, adapter, fleets, mean_of, relative, shares

STRATEGY = FedSALoRA()


def use(state: ServerState, local: Drifter, memory: Memory) -> None:
    STRATEGY.use(STRATEGY.broadcast(state), local, memory)


def test_it_keeps_the_rules() -> None:
    check_strategy(FedSALoRA())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(fleets())
def test_a_is_the_mean_and_everything_else_the_clients_own(clients: dict[str, Drifter]) -> None:
    """After two rounds each client uses `s B_i A`, with the mean A, its own B_i and the server's scale 1.5."""
    state, memories = STRATEGY.start(adapter(clients["c0"].rank)), dict[str, Memory]()
    for _ in range(2):
        state = play_round(STRATEGY, state, clients, memories)
    trained = {id: client.trained for id, client in clients.items()}
    for id, client in clients.items():
        use(state, client, memories[id])
        assert torch.equal(client.weight(HEAD), trained[id].dense[HEAD].double())
        for path in state.adapter.lora:
            A = mean_of((p, trained[other].lora[path].A) for other, p in shares(clients).items())
            assert relative(client.weight(path), 1.5 * trained[id].lora[path].B.double() @ A) < 1e-6


def test_each_goes_on_from_its_own_b_and_head() -> None:
    clients, memories = {"a": Drifter(seed=1), "b": Drifter(seed=2)}, dict[str, Memory]()
    state = play_round(STRATEGY, STRATEGY.start(adapter()), clients, memories)
    first = {id: client.trained for id, client in clients.items()}
    for client in clients.values():
        client.drift = 0.0
    state = play_round(STRATEGY, state, clients, memories)
    for id, client in clients.items():
        for path, pair in client.trained.lora.items():
            assert torch.equal(pair.B, first[id].lora[path].B)
            assert relative(pair.A, state.adapter.lora[path].A.double()) < 1e-6
        assert torch.equal(client.trained.dense[HEAD], first[id].dense[HEAD])
    assert not torch.equal(first["a"].dense[HEAD], first["b"].dense[HEAD])


def test_a_client_that_never_trained_has_the_base_model_and_the_jobs_head() -> None:
    """Even where the model that it shares holds another client's head."""
    start, here = adapter(), Drifter(seed=1)
    state = play_round(STRATEGY, STRATEGY.start(start), {"a": here}, memories := dict[str, Memory]())
    use(state, here, memories["a"])
    assert here.weight("tall").any()
    use(state, here, Memory())
    assert torch.equal(here.weight(HEAD), start.dense[HEAD].double())
    assert not any(here.weight(path).any() for path in start.lora)


def test_what_is_published_is_the_shared_part_and_no_model() -> None:
    start = adapter()
    state = play_round(STRATEGY, STRATEGY.start(start), {"a": Drifter(seed=1)})
    for path, pair in STRATEGY.published(state).lora.items():
        assert not product(pair).any()
        assert not torch.equal(pair.A, start.lora[path].A)
    assert torch.equal(STRATEGY.published(state).dense[HEAD], start.dense[HEAD])


def test_neither_b_nor_the_head_goes_up_and_the_formulas_count_the_rest() -> None:
    down = STRATEGY.broadcast(STRATEGY.start(adapter()))
    up = STRATEGY.answer(Ask("train", down), Drifter(), Memory()).payload
    assert set(up.roles.values()) == {Role.A}
    for payload, formula, h in ((down, "r*k", 8), (up, STRATEGY.up, 0)):
        modules = sum(eval(formula, {"r": 2, "d": d, "k": k, "h": 0}) for d, k in ((4, 4), (6, 3)))
        assert sum(tensor.numel() for tensor in payload.tensors.values()) == modules + h
    assert STRATEGY.down == "r*k + h"


def test_a_zero_update_keeps_a_and_every_client() -> None:
    clients = {"a": Drifter(drift=0.0), "b": Drifter(drift=0.0, examples=1000)}
    start = adapter()
    state = play_round(STRATEGY, STRATEGY.start(start), clients, memories := dict[str, Memory]())
    for path, pair in state.adapter.lora.items():
        assert relative(pair.A, start.lora[path].A.double()) < 1e-7
    use(state, clients["a"], memories["a"])
    assert not clients["a"].weight("square").any()


def test_a_client_that_was_away_keeps_what_is_its_own() -> None:
    clients, memories = {"a": Drifter(seed=1), "b": Drifter(seed=2)}, dict[str, Memory]()
    state = play_round(STRATEGY, STRATEGY.start(adapter()), clients, memories)
    own = clients["b"].trained.lora["tall"].B
    for _ in range(2):
        state = play_round(STRATEGY, state, {"a": clients["a"]}, memories)
    use(state, clients["b"], memories["b"])
    assert relative(clients["b"].weight("tall"), 1.5 * own.double() @ state.adapter.lora["tall"].A.double()) < 1e-6


def test_memory_of_another_job_is_refused() -> None:
    memory = Memory({"tall.lora_B": torch.zeros(6, 5)})
    with pytest.raises(ClientFailed, match=r"'tall.lora_B' of shape \(6, 5\), this job wants \(6, 2\)"):
        use(STRATEGY.start(adapter()), Drifter(), memory)


def test_mixed_ranks_are_refused() -> None:
    with pytest.raises(StrategyError, match=r"'fedsa_lora'.*\{'a': 4, 'b': 2\}"):
        STRATEGY.check([ClientInfo("a", 1, 4), ClientInfo("b", 1, 2)])
