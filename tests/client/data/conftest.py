"""A tokenizer that is made here: no download, and few enough tokens to follow by eye."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "user assistant system Instruction Input Response"]


@pytest.fixture(scope="session")
def _bpe() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(TEXTS * 3, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return bpe


@pytest.fixture
def tokenizer(_bpe: Tokenizer) -> PreTrainedTokenizerFast:
    """Ids: <pad> 0, <bos> 1, <eos> 2. It puts <bos> before a text and has no chat template."""
    return PreTrainedTokenizerFast(tokenizer_object=_bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write("a.jsonl", rows): a file of JSON lines in the test's own folder."""

    def _write(name: str, rows: list[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return _write
