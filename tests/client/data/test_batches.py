from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from client.data.batches import batches, collate
from client.data.examples import IGNORED, Example, Labelled, single
from client.data.packing import pack

PAD = 0


def text(*ids: int) -> Example:
    return single(ids, [True] * len(ids))


def test_each_pass_sees_every_example_once_and_batches_are_full():
    examples = [text(i, i) for i in range(5)]
    drawn = [one for batch in islice(batches(examples, 2, 0, "ann"), 5) for one in batch]  # 10 draws: two passes
    assert Counter(drawn[:5]) == Counter(drawn[5:]) == Counter(examples)
    assert drawn[:5] != drawn[5:]


def test_fewer_examples_than_the_batch():
    [batch] = islice(batches([text(1, 1), text(2, 2)], 5, 0), 1)
    assert len(batch) == 5


def test_the_order_depends_on_the_names_alone():
    examples = [text(i, i) for i in range(20)]
    first, again, other = (list(islice(batches(examples, 4, 7, name), 5)) for name in ("ann", "ann", "bob"))
    assert first == again
    assert first != other


def test_no_examples():
    with pytest.raises(ValueError, match="no examples"):
        next(batches([], 2, 0))


def test_causal_batch():
    [packed] = pack([text(5, 6), text(7, 8)], 4)
    batch = collate([packed, text(9, 4)], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 4, PAD, PAD]]
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED, 8], [IGNORED, 4, IGNORED, IGNORED]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert "attention_mask" not in batch  # with one, transformers would not look for packed texts


def test_classification_batch():
    batch = collate([Labelled((5, 6, 7), 2), Labelled((8,), 0)], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [2, 0]


@pytest.fixture(params=["eval", "train"])
def model(request):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=32))
    return model.train(request.param == "train")


A, B = text(3, 14, 15, 9, 26), text(5, 35, 8)


def logits(model, *examples, pad=PAD):
    """(b, t, v), as the trainer calls the model."""
    with torch.no_grad():
        return model(**collate(examples, pad), use_cache=False).logits


def test_packed_texts_do_not_see_each_other(model):
    together = logits(model, *pack([A, B], 8))[0]
    torch.testing.assert_close(together[:5], logits(model, A)[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(together[5:], logits(model, B)[0], atol=1e-5, rtol=0)


def test_padding_changes_nothing(model):
    [packed] = pack([A, B], 8)
    long = text(*range(1, 13))
    for examples in ([packed, long], [A, long]):
        length = len(examples[0].input_ids)
        torch.testing.assert_close(logits(model, *examples)[0, :length], logits(model, examples[0])[0], atol=1e-5, rtol=0)


def test_the_loss_of_a_batch_is_the_mean_over_what_its_texts_learn(model):
    """2 and 4 predictions: the batch's loss is that of six, whatever they share a row with."""
    each = []
    for one in (A, B):
        targets = torch.tensor(one.input_ids[1:])
        each.append(functional.cross_entropy(logits(model, one)[0, :-1], targets, reduction="none"))
    expected = torch.cat(each).mean()
    with torch.no_grad():
        packed = model(**collate(pack([A, B], 8), PAD), use_cache=False).loss
        padded = model(**collate([A, B], PAD), use_cache=False).loss
    torch.testing.assert_close(packed, expected)
    torch.testing.assert_close(padded, expected)


@pytest.mark.parametrize(("examples", "causal"), [([A], True), ([A, B], True), (pack([A, B], 8), False)])
def test_unpacked_texts_keep_the_causal_kernel(model, monkeypatch, examples, causal):
    seen = []
    attention = functional.scaled_dot_product_attention

    def spy(*args, **options):
        seen.append(options["is_causal"] and options.get("attn_mask") is None)
        return attention(*args, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    logits(model, *examples)
    assert seen == [causal, causal]  # one for each layer
