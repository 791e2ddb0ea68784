"""The stock Flower app's model, data, training and evaluation: plain PyTorch, transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def load_model(folder: str) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def load_data(folder: str, partition: int, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Tokens, each batch (b, t): to train on, and to evaluate on."""
    tokens = json.loads((Path(folder) / f"{partition}.json").read_text())
    train = DataLoader(torch.tensor(tokens["train"]), batch_size=batch_size, shuffle=True, drop_last=True)
    return train, DataLoader(torch.tensor(tokens["test"]), batch_size=batch_size)


def train(model: PeftModel, loader: DataLoader, steps: int, lr: float) -> float:
    """Mean loss of the steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    model.train()
    total = 0.0
    for _, batch in zip(range(steps), loader, strict=False):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    return total / steps


@torch.no_grad()
def evaluate(model: PeftModel, loader: DataLoader) -> float:
    model.eval()
    return sum(model(input_ids=batch, labels=batch, use_cache=False).loss.item() for batch in loader) / len(loader)
