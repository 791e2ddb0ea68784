"""What faults are tried on: a model of two layers and data of three clients, made here, and jobs of a second."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedtune.job import Job, load_job
from simulations.pretrain import train_tokenizer

CLIENTS = {"ann": 6, "bob": 8, "cy": 11}  # examples of each
TEXTS = ("the cat sat on the mat", "the dog sat on the log", "a cat and a dog met on a mat")
WORDS = 300  # of the tokenizer
JOB = """
name = "faults"
model.path = "{model}"
model.dtype = "float32"
adapter = {{ rank = 4, alpha = 6.0 }}
data = {{ path = "{data}", max_length = 48, packing = false }}
train = {{ steps = 1, batch = 2, lr = 0.01, precision = "fp32" }}
rounds = {{ count = 2, quorum = 1.0 }}
machine = {{ device = "cpu", threads = 1 }}
wire = "lossless"
compare = false
"""

PLAIN = ("train.optimizer=sgd", "train.clip=0")

# Those whose coordinator or clients remember most: errors of codecs, control variates, what each client was sent last; and
# each kind of what is published: adapter, recipe, weights.
METHODS = {
    "fedavg, tiny wire": ("wire.preset=tiny",),
    "scaffold": ("strategy.name=scaffold", *PLAIN),
    "flora": ("strategy.name=flora",),
    "fedkseed": ("strategy.name=fedkseed", *PLAIN),
    "selective_layers": ("strategy.name=selective_layers",),
}


@dataclass(frozen=True)
class Place:
    """A folder with model, data and job file, and the folders of the runs beside them."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Place:
        place = cls(folder)
        _write_model(place.model)
        place.data.mkdir()
        for client, examples in CLIENTS.items():
            rows = [json.dumps({"text": f"{client}: {TEXTS[number % 3]} {number}"}) for number in range(examples)]
            (place.data / f"{client}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        place.job_file.write_text(JOB.format(model=place.model, data=place.data), encoding="utf-8")
        return place

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def job_file(self) -> Path:
        return self.folder / "job.toml"

    def job(self, *overrides: str) -> Job:
        return load_job(self.job_file, overrides)


def _write_model(folder: Path) -> None:
    """Its weights are large enough that losses differ from the first step on."""
    tokenizer: PreTrainedTokenizerFast = train_tokenizer([*TEXTS * 3], WORDS)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
