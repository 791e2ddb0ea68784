from __future__ import annotations

from pathlib import Path

import pytest

from client.data.examples import ClientData
from client.data.load import labels_in, load_client
from client.data.sources import Source, clients_in
from fedtune.errors import DataError
from fedtune.job import Clients, Data

WORDS = [f"{a}{b}" for a in "QWXYZ" for b in "QWXYZ"]  # 25 texts that share no piece of the tokenizer's vocabulary


@pytest.fixture
def load(write, tokenizer):
    """load(rows, …): the client `ann` with these rows."""

    def _load(rows, seed=0, task="causal", labels=None, **data) -> ClientData:
        source = Source("ann", write("ann.jsonl", rows))
        return load_client(source, Data(path=".", **data), task, tokenizer, seed, labels)

    return _load


@pytest.fixture
def texts(tokenizer):
    """The texts in some examples, sorted."""

    def _texts(examples):
        whole = "".join(tokenizer.decode(example.input_ids) for example in examples)
        return sorted(whole.replace("<bos>", "").split("<eos>")[:-1])

    return _texts


def rows_of(words):
    return [{"text": word} for word in words]


@pytest.mark.parametrize("packing", [True, False])
def test_a_share_is_held_out_and_nothing_is_lost(load, texts, packing):
    data = load(rows_of(WORDS), held_out=0.2, packing=packing, max_length=16)
    train, held_out = texts(data.train), texts(data.held_out)
    assert sorted(train + held_out) == WORDS
    assert len(held_out) == 5  # a fifth of 25
    if packing:
        assert len(data.held_out) == 2  # <bos> Q W <eos>: 4 tokens, so 4 of the 5 texts fit in 16
    else:
        assert len(data.held_out) == 5


def test_the_seed_chooses_what_is_held_out(load, texts):
    first, again, other = (texts(load(rows_of(WORDS), seed=seed).held_out) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_at_least_one_is_held_out_and_one_learnt(load, texts):
    for share in (0.01, 0.99):
        data = load(rows_of(WORDS[:2]), held_out=share)
        assert len(texts(data.train)) == len(texts(data.held_out)) == 1


def test_one_row_is_learnt(load, texts):
    data = load(rows_of(["QW"]), held_out=0.5)
    assert texts(data.train) == ["QW"]
    assert data.held_out == ()


def test_nothing_held_out(load, texts):
    data = load(rows_of(WORDS), held_out=0.0)
    assert texts(data.train) == WORDS
    assert data.held_out == ()


def test_held_out_is_capped_evenly(load):
    everything = load(rows_of(WORDS), held_out=0.4, packing=False).held_out
    capped = load(rows_of(WORDS), held_out=0.4, packing=False, max_held_out=5).held_out
    assert capped == everything[::2]  # 5 of 10


def test_rows_with_nothing_to_learn_are_never_held_out(load):
    """Of six rows two fit, so one of these is held out."""
    rows = [{"prompt": "Q" * 20, "completion": "V"}] * 4 + [{"prompt": "Q", "completion": "V"}] * 2
    data = load(rows, max_length=8)
    assert len(data.train) == len(data.held_out) == 1


def test_stdlib_is_held_out_by_file_whatever_the_seed(tokenizer):
    data = Data(path="builtin:stdlib/logging", max_length=512)
    source = clients_in(data, Clients())["logging"]
    first, second = (load_client(source, data, "causal", tokenizer, seed) for seed in (0, 1))
    assert first == second
    tokens = [sum(len(example.input_ids) for example in part) for part in (first.train, first.held_out)]
    assert 0.1 < tokens[1] / sum(tokens) < 0.3


def test_classification(load):
    rows = [{"text": word, "label": "odd" if number % 2 else "even"} for number, word in enumerate(WORDS)]
    data = load(rows, task="classification", labels=["even", "odd"])
    assert len(data.train) == 20
    assert {one.label for one in data.train} == {0, 1}


def test_all_labels_masked(load):
    message = refused(lambda: load([{"prompt": "Q" * 20, "completion": "V"}] * 3, max_length=8))
    assert "ann.jsonl: nothing is left to learn from. The loss is on the completion (prompt + completion)" in message
    assert "none of the 3 rows has any of it within data.max_length = 8 tokens" in message
    assert "--set data.max_length=16" in message


def test_conversations_without_the_assistant(load, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    message = refused(lambda: load([{"messages": [{"role": "user", "content": "Q"}]}]))
    assert "The loss is on the assistant's turns (messages)" in message


def sources(write, **labels):
    for client, given in labels.items():
        write(f"data/{client}.jsonl", [{"text": "x", "label": label} for label in given])
    data = Data(path=str(Path(write("data/zoe.jsonl", [{"text": "x", "label": next(iter(labels.values()))[0]}])).parent))
    return clients_in(data, Clients()), data


def test_labels_of_all_clients_in_order(write):
    assert labels_in(*sources(write, ann=["pet", "farm"], bob=["wild", "pet"])) == ["farm", "pet", "wild"]


def test_labels_that_are_numbers_keep_their_place(write):
    assert labels_in(*sources(write, ann=[10, 0, 2], bob=["1"])) == ["0", "1", "2", "10"]


def refused(call):
    with pytest.raises(DataError) as error:
        call()
    return str(error.value)


def test_one_label_is_too_few(write):
    found, data = sources(write, ann=["pet", "pet"])
    message = refused(lambda: labels_in(found, data))
    assert "has the one label 'pet'; classification needs two or more" in message


def test_labels_where_there_is_no_column(write):
    write("data/ann.jsonl", [{"text": "x", "class": 1}])
    found, data = sources(write, bob=[1, 2])
    assert "ann.jsonl has the columns text, class; for model.task = 'classification'" in refused(lambda: labels_in(found, data))


def test_a_label_missing_in_a_row(write):
    found, data = sources(write, ann=["pet", None])
    assert "ann.jsonl, row 2: 'label' is None; wanted a name or a whole number" in refused(lambda: labels_in(found, data))
