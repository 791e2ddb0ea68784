"""What a job takes of memory and disk, by shapes alone: an estimate before anything is loaded, on the safe side.

Of a method that selects layers this is with all of them in training; `fedtune plan` measures what they really take.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedtune.base import Blueprint, blueprint, model_config, model_folder
from fedtune.job import Job

RUNTIME = 0.9e9  # bytes of a process that has imported torch and transformers
STORED = {"8bit": 1.1, "4bit": 0.6}  # bytes of a weight, with scales
TRAINED = 16  # bytes of a number in training: itself in float32, its gradient, two of AdamW
KEPT = 12  # bytes of a number that a client remembers: as it was sent, and what codecs lost
LOGITS = 12  # bytes of a logit: as it is, in float32, its gradient


@dataclass(frozen=True)
class Needs:
    """In bytes."""

    job: Job
    plan: Blueprint

    @classmethod
    def of(cls, job: Job) -> Needs:
        """Reads the model's config, and no weights. Raises ModelError."""
        return cls(job, blueprint(job))

    @cached_property
    def weights(self) -> int:
        """Numbers of the base model."""
        return sum(self.plan.sizes.values())

    @cached_property
    def adapter(self) -> int:
        """Numbers of the largest adapter."""
        lora = sum(pair.A.numel() + pair.B.numel() for pair in self.plan.adapter.lora.values())
        return lora + sum(tensor.numel() for tensor in self.plan.adapter.dense.values())

    @property
    def whole(self) -> bool:
        return self.job.make_strategy().trains_whole

    @property
    def by_passes(self) -> bool:
        """Whether no gradients are computed."""
        return hasattr(self.job.make_strategy(), "estimate")

    def training(self, gpu: bool) -> float:
        """Of a step at its peak, with the model, on the device where it trains."""
        trains = (self.weights if self.whole else self.adapter) * TRAINED if not self.by_passes else 4 * self.adapter
        return self._model(gpu) + trains + self._activations(gpu) + RUNTIME

    def coordinator(self) -> float:
        """The state before and after, an answer, and the sum in float64; of a whole model also the base."""
        return RUNTIME + 24 * (self.weights if self.whole else self.adapter) + (4 * self.weights if self.whole else 0)

    def run_folder(self) -> float:
        """What is published in each round, the answers of an open one, and a whole model at the end."""
        cohort = self.job.rounds.clients or self.job.clients.count or 1
        sent = 4 * (self.weights if self.whole and not self.by_passes else self.adapter)
        return sent * (self.job.rounds.count + 1) * cohort + (4 * self.weights if self.whole else 0)

    def client_folder(self) -> float:
        return KEPT * self.adapter + (8 * self.weights if self.whole else 0)  # the base and all changes lie in files

    def _model(self, gpu: bool) -> float:
        model = self.job.model
        if model.quantize in STORED:
            return STORED[model.quantize] * self.weights
        two = model.dtype == "bfloat16" or (model.dtype == "auto" and gpu)
        return (2 if two else 4) * self.weights

    def _activations(self, gpu: bool) -> float:
        """9 rows of the model's width and 4 of the inner layer's for each layer and token, on a CPU attention too;
        recomputed ones are there once."""
        config, train = self._config, self.job.train
        length = min(self.job.data.max_length, getattr(config, "max_position_embeddings", None) or self.job.data.max_length)
        tokens, hidden = (train.micro_batch or train.batch) * length, config.hidden_size
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        scores = 0 if gpu else 2 * config.num_attention_heads * length
        layers = 1 if self.by_passes or train.checkpointing else config.num_hidden_layers
        kept = config.num_hidden_layers * hidden if train.checkpointing else 0
        size = 2 if train.precision == "bf16" or (train.precision == "auto" and gpu) else 4
        logits = config.vocab_size if self.job.model.task == "causal" else 0
        return float(tokens * (size * (layers * (9 * hidden + 4 * inner + scores) + kept) + LOGITS * logits))

    @cached_property
    def _config(self) -> Any:
        return model_config(self.job, model_folder(self.job.model)).get_text_config()
