from __future__ import annotations

import pytest

from client.data.examples import IGNORED
from client.data.formats import Encoder, encode, format_of
from fedtune.errors import DataError

BOS, EOS = 1, 2


def encoded(rows, tokenizer, task="causal", max_length=64, labels=None):
    format = format_of(rows[0], task, "ann.jsonl")
    return encode(rows, format, Encoder(tokenizer, max_length, labels), "ann.jsonl")


def only(row, tokenizer, **options):
    [[example]] = encoded([row], tokenizer, **options)
    return example


@pytest.fixture
def ids(tokenizer):
    """The tokens of a text, without <bos>."""
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def learnt_text(example, tokenizer):
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


def test_every_token_of_a_text_is_learnt(tokenizer, ids):
    example = only({"text": "the cat"}, tokenizer)
    assert list(example.input_ids) == [BOS, *ids("the cat"), EOS]
    assert list(example.labels) == [IGNORED, *ids("the cat"), EOS]


def test_a_long_text_is_cut_into_pieces_that_lose_nothing(tokenizer, ids):
    text = "QWXYZ" * 4  # 20 letters, each a token
    [pieces] = encoded([{"text": text}], tokenizer, max_length=8)
    assert [token for piece in pieces for token in piece.input_ids] == [BOS, *ids(text), EOS]
    assert [len(piece.input_ids) for piece in pieces] == [8, 8, 6]
    assert all(piece.labels == (IGNORED, *piece.input_ids[1:]) for piece in pieces)


def test_a_piece_of_one_token_is_dropped(tokenizer):
    """<bos>, six letters and <eos> are 8 tokens; a seventh letter leaves <eos> alone."""
    [[piece]] = encoded([{"text": "QWXYZK" + "J"}], tokenizer, max_length=8)
    assert EOS not in piece.input_ids


def test_only_the_completion_is_learnt(tokenizer, ids):
    example = only({"prompt": "the cat", "completion": " sat"}, tokenizer)
    assert list(example.input_ids) == [BOS, *ids("the cat"), *ids(" sat"), EOS]
    assert list(example.labels) == [IGNORED] * (1 + len(ids("the cat"))) + [*ids(" sat"), EOS]


def test_a_completion_is_cut_at_max_length(tokenizer):
    row = {"prompt": "QWXYZ", "completion": "VVKK"}  # <bos> and five letters before
    assert only(row, tokenizer, max_length=8).learnt == 2


def test_a_prompt_that_fills_the_example_leaves_nothing(tokenizer):
    rows = [{"prompt": "QWXYZ" * 3, "completion": "V"}, {"prompt": "Q", "completion": "V"}]
    assert [len(examples) for examples in encoded(rows, tokenizer, max_length=8)] == [0, 1]


@pytest.mark.parametrize("given", [{"input": "cat"}, {"input": ""}, {"input": None}, {}])
def test_alpaca(tokenizer, given):
    example = only({"instruction": "the log", "output": "sat", **given}, tokenizer)
    middle = "### Input:\ncat\n\n" if given.get("input") else ""
    expected = f"<bos>### Instruction:\nthe log\n\n{middle}### Response:\nsat<eos>"
    assert tokenizer.decode(example.input_ids) == expected
    assert learnt_text(example, tokenizer) == "sat<eos>"


def test_a_tokenizer_that_adds_no_bos(tokenizer, ids):
    tokenizer.backend_tokenizer.post_processor, kept = None, tokenizer.backend_tokenizer.post_processor
    try:
        assert list(only({"text": "the cat"}, tokenizer).input_ids) == [*ids("the cat"), EOS]
    finally:
        tokenizer.backend_tokenizer.post_processor = kept


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        (["id", "text"], ("text",)),
        (["text", "messages"], ("messages",)),
        (["prompt", "completion", "text"], ("prompt", "completion")),
        (["prompt", "text"], ("text",)),
        (["output", "input", "instruction"], ("instruction", "output")),
    ],
)
def test_the_columns_say_the_format(columns, chosen):
    assert format_of(columns, "causal", "x").columns == chosen


def test_classification(tokenizer, ids):
    example = only({"text": "the cat", "label": "pet"}, tokenizer, task="classification", labels=["farm", "pet"])
    assert (list(example.input_ids), example.label) == ([BOS, *ids("the cat")], 1)


def test_classification_is_cut_at_max_length(tokenizer):
    assert len(only({"text": "Q" * 20, "label": 1}, tokenizer, task="classification", max_length=8).input_ids) == 8


@pytest.mark.parametrize("label", [2, "2", 2.0])
def test_numbers_are_classes_of_their_own(tokenizer, label):
    assert only({"text": "x", "label": label}, tokenizer, task="classification").label == 2


def refused(rows, tokenizer, **options):
    with pytest.raises(DataError) as error:
        encoded(rows, tokenizer, **options)
    assert str(error.value).startswith("ann.jsonl")
    return str(error.value)


def test_needed_column_missing(tokenizer):
    message = refused([{"content": "x", "id": 3}], tokenizer)
    assert "ann.jsonl has the columns content, id; for model.task = 'causal' wanted one of: " in message
    assert "messages; prompt + completion; instruction + output; text" in message


def test_needed_column_missing_for_classification(tokenizer):
    message = refused([{"text": "x"}], tokenizer, task="classification")
    assert "for model.task = 'classification' wanted one of: text + label" in message


@pytest.mark.parametrize("row", [{"other": "x"}, {"text": None}])
def test_needed_column_missing_in_a_later_row(tokenizer, row):
    assert "row 2: nothing in the column 'text'" in refused([{"text": "x"}, row], tokenizer)


@pytest.mark.parametrize(
    "row",
    [{"text": 3}, {"prompt": "x", "completion": ["y"]}, {"prompt": 3, "completion": "y"}, {"instruction": "x", "output": 3}],
)
def test_a_column_that_is_not_text(tokenizer, row):
    message = refused([row], tokenizer)
    assert "row 1: '" in message
    assert "; wanted text" in message


def test_unknown_label(tokenizer):
    row = {"text": "x", "label": "pets"}
    message = refused([row], tokenizer, task="classification", labels=["farm", "pet"])
    assert "row 1: unknown label 'pets', did you mean 'pet'?; known: farm, pet" in message


@pytest.mark.parametrize("label", ["pet", -1])
def test_label_without_a_number(tokenizer, label):
    message = refused([{"text": "x", "label": label}], tokenizer, task="classification")
    assert f"label '{label}' has no number" in message


@pytest.mark.parametrize("label", [0.5, "", ["pet"]])
def test_label_that_is_none(tokenizer, label):
    message = refused([{"text": "x", "label": label}], tokenizer, task="classification")
    assert "wanted a name or a whole number" in message
