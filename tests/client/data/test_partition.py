"""Partitions: nothing is lost, nothing comes twice, the held-out set is one for all, and skew is what was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from client.data import load, partition
from client.data.examples import ClientData
from client.data.load import labels_in, load_client
from client.data.sources import clients_in
from client.trainer import Trainer
from fedtune.errors import DataError, JobError
from fedtune.job import Clients, Data, Job

SIZES = {"ann": 40, "bob": 25, "cy": 35}  # rows; a fifth of each is held out
TRAIN, HELD_OUT = 80, 20


@pytest.fixture
def folder(write: Callable[..., Path]) -> Path:
    """Every text names the client that it came from; no two are alike, and each is one example."""
    for client, size in SIZES.items():
        rows = [{"text": f"{client} {i}", "label": "xyz"[i % 3]} for i in range(size)]
        path = write(f"data/{client}.jsonl", rows)
    return path.parent


@pytest.fixture
def deal(folder: Path, tokenizer: Any) -> Callable[..., dict[str, ClientData]]:
    """deal("iid", 4, …): every client's data, read in the order of `asked`, by name."""

    def _deal(
        kind: str = "natural", count: int | None = None, seed: int = 0, task: str = "causal", asked: Any = sorted, **keys: Any
    ) -> dict[str, ClientData]:
        names = keys.pop("names", None)
        data = Data(path=str(folder), partition=kind, max_length=32, **{"packing": False} | keys)
        sources = clients_in(data, Clients(count=count, names=names))
        labels = labels_in(sources, data) if task == "classification" else None
        return {name: load_client(sources[name], data, task, tokenizer, seed, labels) for name in asked(sources)}

    return _deal


@pytest.fixture
def texts(tokenizer: Any) -> Callable[..., list[str]]:
    """The texts in a part of some clients' data, sorted."""

    def _texts(clients: Mapping[str, ClientData], part: str) -> list[str]:
        examples = chain.from_iterable(getattr(data, part) for data in clients.values())
        whole = "".join(tokenizer.decode(one.input_ids) for one in examples)
        return sorted(whole.replace("<bos>", "").split("<eos>")[:-1])

    return _texts


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("keys", [{"kind": "iid"}, {"kind": "dirichlet"}, {"kind": "dirichlet", "concentration": 100.0}])
def test_nothing_is_lost_and_nothing_comes_twice(deal: Any, texts: Any, keys: dict[str, Any], packing: bool) -> None:
    """What is held out is the same for all partitions."""
    natural, dealt = deal(), deal(count=7, packing=packing, **keys)
    assert list(dealt) == [f"client-0{number}" for number in range(7)]
    for part, size in (("train", TRAIN), ("held_out", HELD_OUT)):
        assert texts(dealt, part) == texts(natural, part)
        assert len(set(texts(dealt, part))) == size


@pytest.mark.parametrize("count", [3, 7, 16])
def test_iid_parts_are_equal_but_for_one(deal: Any, count: int) -> None:
    dealt = deal("iid", count).values()
    for part, size in (("train", TRAIN), ("held_out", HELD_OUT)):
        assert {len(getattr(data, part)) for data in dealt} == {size // count, -(-size // count)}


def topics(data: ClientData, tokenizer: Any) -> Counter[str]:
    return Counter(tokenizer.decode(one.input_ids, skip_special_tokens=True).split()[0] for one in data.train)


def skew(clients: Mapping[str, Counter[str]]) -> float:
    """Mean over clients of the total variation between a client's topics and everybody's: 0 where all are alike."""
    everybody = Counter(chain.from_iterable(counts.elements() for counts in clients.values()))

    def variation(counts: Counter[str]) -> float:
        return sum(abs(counts[t] / counts.total() - everybody[t] / everybody.total()) for t in everybody) / 2

    return sum(variation(counts) for counts in clients.values()) / len(clients)


def test_a_small_concentration_is_more_skewed(deal: Any, tokenizer: Any) -> None:
    def of(kind: str, concentration: float = 1.0) -> float:
        dealt = deal(kind, 4, concentration=concentration)
        return skew({name: topics(data, tokenizer) for name, data in dealt.items()})

    # Shares drawn with concentration 100 among 4 clients are 1/4 with a deviation of sqrt(1/4 * 3/4 / 401) = 0.022.
    assert of("dirichlet", 0.1) > 0.4
    assert of("dirichlet", 100.0) < 0.1
    assert of("iid") < 0.25  # by chance: each client has 20 of 80


def test_labels_are_the_topics_of_classification(deal: Any) -> None:
    """With a tiny concentration each label goes to one client, whoever it came from, in training and in what is held out.

    A client without a label then takes one example of another's, so no label has more than two owners.
    """
    natural = deal(task="classification").values()
    assert all({one.label for one in data.train} == {0, 1, 2} for data in natural)
    dealt = deal("dirichlet", 3, task="classification", concentration=1e-3)
    owners = {
        label: {name for name, data in dealt.items() if any(one.label == label for one in data.train)} for label in range(3)
    }
    assert max(len(its) for its in owners.values()) <= 2
    for name, data in dealt.items():
        assert all(name in owners[one.label] or len(data.held_out) == 1 for one in data.held_out)
    everybody = Counter(one.label for data in dealt.values() for one in [*data.train, *data.held_out])
    assert everybody == {0: 14 + 9 + 12, 1: 13 + 8 + 12, 2: 13 + 8 + 11}


def test_held_out_examples_follow_the_shares_of_training(deal: Any) -> None:
    """A fifth of each topic is held out, so a client holds out a fifth of what it has, up to one rounding a topic each way."""
    for data in deal("dirichlet", 4, concentration=5.0).values():
        assert abs(len(data.held_out) - len(data.train) / 4) <= len(SIZES) * (0.5 + 0.5 + 0.25)


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_the_seed_deals(deal: Any, kind: str) -> None:
    assert deal(kind, 4, seed=1, held_out=0.0) == deal(kind, 4, seed=1, held_out=0.0, asked=lambda names: sorted(names)[::-1])
    assert deal(kind, 4, seed=1, held_out=0.0) != deal(kind, 4, seed=2, held_out=0.0)


def test_one_pool_deals_anew_for_other_settings(folder: Path, tokenizer: Any, deal: Any) -> None:
    sources = clients_in(data := Data(path=str(folder), partition="iid", max_length=32, packing=False), Clients(count=4))
    for seed in (1, 2, 1):
        dealt = {name: load_client(source, data, "causal", tokenizer, seed) for name, source in sources.items()}
        assert dealt == deal("iid", 4, seed=seed)


def test_the_data_is_encoded_once(deal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    split = load.split_rows
    monkeypatch.setattr(load, "split_rows", lambda source, *rest: calls.append(source.name) or split(source, *rest))
    deal("iid", 7)
    assert calls == list(SIZES)


def test_nobody_is_left_without_an_example(deal: Any) -> None:
    """Three topics that go whole to at most three of the clients: the others get one of the largest part."""
    dealt = deal("dirichlet", 9, concentration=1e-6).values()
    assert sorted(len(data.train) for data in dealt)[:6] == [1] * 6
    assert min(len(data.held_out) for data in dealt) == 1
    few = deal("dirichlet", 30, concentration=1.0).values()  # 20 held-out examples
    assert min(len(data.train) for data in few) == 1
    assert min(len(data.held_out) for data in few) == 0


def test_max_held_out_is_of_each_client(deal: Any) -> None:
    assert [len(data.held_out) for data in deal("iid", 4, max_held_out=2).values()] == [2, 2, 2, 2]


def test_only_the_named_are_pooled(deal: Any, texts: Any) -> None:
    assert texts(deal("iid", 5, names=("ann", "cy")), "train") == texts(deal(names=("ann", "cy")), "train")


def test_more_clients_than_examples(deal: Any, folder: Path) -> None:
    assert len(deal("iid", TRAIN)) == TRAIN
    with pytest.raises(DataError) as error:
        deal("iid", TRAIN + 1)
    assert f"clients.count = 81, but {folder} has 80 training examples" in str(error.value)
    assert "--set clients.count=80" in str(error.value)


def test_a_partition_wants_a_count(deal: Any) -> None:
    with pytest.raises(JobError, match=r"data\.partition = 'iid' makes new clients.*type --set clients\.count=3"):
        deal("iid")


def test_names_sort_as_they_are_numbered() -> None:
    for count in (1, 100, 101):
        clients = partition.Pool([], count).clients
        assert sorted(set(clients)) == list(clients)
        assert len(clients) == count
    assert (clients[0], clients[-1]) == ("client-000", "client-100")


def test_the_standard_library_is_shared_out_in_pieces_of_files(tokenizer: Any) -> None:
    """The package xmlrpc has three files, and eight clients share them."""
    data = Data(path="builtin:stdlib/xmlrpc", partition="iid", max_length=64, packing=False)
    dealt = {n: load_client(s, data, "causal", tokenizer, 0) for n, s in clients_in(data, Clients(count=8)).items()}
    plain = Data(path="builtin:stdlib/xmlrpc", max_length=64, packing=False)
    [whole] = [load_client(s, plain, "causal", tokenizer, 0) for s in clients_in(plain, Clients()).values()]
    for part in ("train", "held_out"):
        pieces = chain.from_iterable(getattr(own, part) for own in dealt.values())
        assert sorted(one.input_ids for one in pieces) == sorted(one.input_ids for one in getattr(whole, part))


def test_a_trainer_simulates_the_new_clients(make_job: Callable[..., Job]) -> None:
    """The clients ann, bob and cy of the tiny job have 5 + 6 + 9 training examples."""
    trainer = Trainer.for_simulation(make_job("data.partition=iid", "clients.count=4"))
    assert trainer.clients == ("client-00", "client-01", "client-02", "client-03")
    assert [trainer.local(client, 1).examples for client in reversed(trainer.clients)] == [5, 5, 5, 5]


def test_a_node_has_no_partition(make_job: Callable[..., Job], tiny_data: Path) -> None:
    with pytest.raises(JobError, match=r"data\.partition = 'iid' is for simulation.*data\.partition=natural"):
        Trainer.for_node("bob", make_job("data.partition=iid"), model=None, data=str(tiny_data), directory=None)
