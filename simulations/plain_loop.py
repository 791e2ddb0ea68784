"""The yardstick of the benchmark: plain PEFT training with the gradient steps and evaluations of a job, and no federation.

Stock transformers and PEFT, one model, one adapter; written as somebody would who does not know fedtune.
"""

from __future__ import annotations

import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from client.data.batches import batches, collate
from client.data.load import load_client
from client.data.sources import clients_in
from client.loading import has_fast_bf16, load_tokenizer
from fedtune.base import model_folder
from fedtune.job import Job


def plain_loop(job: Job) -> float:
    """Seconds of `rounds * clients * steps` steps and `rounds + 1` evaluations of everybody's held-out examples."""
    tokenizer = load_tokenizer(job)
    sources = clients_in(job.data, job.clients)
    data = {name: load_client(source, job.data, "causal", tokenizer, job.seed) for name, source in sources.items()}
    model = AutoModelForCausalLM.from_pretrained(model_folder(job.model), dtype=torch.float32)
    config = LoraConfig(
        r=job.adapter.rank_for(), lora_alpha=int(job.adapter.alpha_for()), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    model.config.use_cache = False
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_fast_bf16(torch.device("cpu")))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def train(name: str, round: int) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=job.train.lr, weight_decay=0.0)
        model.train()
        for _, batch in zip(range(job.train.steps), batches(data[name].train, job.train.batch, round, name), strict=False):
            with autocast:
                loss = model(**collate(batch, tokenizer.pad_token_id)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, job.train.clip)
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(name: str) -> float:
        model.eval()
        inputs = collate(data[name].held_out, tokenizer.pad_token_id)
        with autocast:
            return float(model(**inputs).loss)

    began = time.perf_counter()
    for name in data:
        evaluate(name)
    for round in range(1, job.rounds.count + 1):
        for name in data:
            train(name, round)
        for name in data:
            evaluate(name)
    return time.perf_counter() - began
