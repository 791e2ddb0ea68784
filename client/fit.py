"""Local training: gradient steps on one client's examples with whatever is trainable in the resident model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from client.allowance import check, require_evaluation
from client.data.batches import collate
from client.data.examples import Example
from client.masters import Masters
from client.model import ResidentModel
from client.room import lowered, within_memory
from fedtune.adapter import Adapter, scaled
from fedtune.job import Train
from fedtune.strategy import Penalty


def fit(
    resident: ResidentModel,
    batches: Iterable[Sequence[Example]],
    train: Train,
    steps: int,
    peak_lr: float,
    penalty: Penalty | None = None,
    masters: Masters | None = None,
) -> dict[str, float]:
    """`steps` gradient steps from a fresh optimiser; returns the mean `loss` (nats per token), `steps`, `examples` and
    `lr_sum`, the rates of all steps added; and `micro_batch`, where memory was too short for the one that was asked for.
    `penalty` is of the adapter in training, and added to the loss of every step."""
    masters = masters or Masters({str(number): one for number, one in enumerate(resident.trainable())})
    optimizer = make_optimizer(masters.all, train, peak_lr)
    resident.peft.train()
    losses, seen, rates = [], 0, 0.0
    for step, batch in zip(range(steps), batches, strict=False):
        rate = peak_lr * lr_factor(step, steps, train)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses.append(_gradients(resident, batch, train.micro_batch, penalty, masters))
        if train.clip:
            nn.utils.clip_grad_norm_(masters.all, train.clip)
        optimizer.step()
        masters.write()
        optimizer.zero_grad(set_to_none=True)
        seen, rates = seen + len(batch), rates + rate
    loss = torch.stack(losses).mean().item() if losses else math.nan
    return {"loss": loss, "steps": float(len(losses)), "examples": float(seen), "lr_sum": rates, **lowered(resident)}


def _gradients(
    resident: ResidentModel, batch: Sequence[Example], micro_batch: int | None, penalty: Penalty | None, masters: Masters
) -> Tensor:
    """Those of one step, left where the optimiser looks; returns the batch's loss."""

    def attempt(size: int) -> Tensor:
        loss = accumulate(resident, batch, size)
        if penalty is not None:
            penalty(resident.live()).backward()
        masters.take_gradients()
        return loss

    def drop() -> None:
        for parameter in (*resident.peft.parameters(), *masters.all):
            parameter.grad = None

    return within_memory(resident, "training", micro_batch or len(batch), attempt, drop)


def gradient(resident: ResidentModel, batches: Iterable[Sequence[Example]], micro_batch: int | None) -> Adapter:
    """Of the mean loss over the batches, by what is trainable in the slot."""
    resident.peft.train()
    given = list(batches)

    def attempt(size: int) -> None:
        for batch in given:
            accumulate(resident, batch, size)

    def drop() -> None:
        resident.peft.zero_grad(set_to_none=True)

    within_memory(resident, "training", micro_batch or longest(given), attempt, drop)
    summed = resident.gradient()
    drop()
    return scaled(summed, 1 / max(len(given), 1))


def longest(batches: Iterable[Sequence[Example]]) -> int:
    """Examples of the largest batch."""
    return max(map(len, batches), default=1)


def make_optimizer(parameters: Iterable[nn.Parameter], train: Train, lr: float) -> torch.optim.Optimizer:
    if train.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=train.momentum, weight_decay=train.weight_decay)
    return torch.optim.AdamW(parameters, lr=lr, betas=train.betas, weight_decay=train.weight_decay)


def lr_factor(step: int, steps: int, train: Train) -> float:
    """Linear warm-up, then constant or a cosine down to `min_lr`: the share of the peak at this step."""
    if step < train.warmup:
        return (step + 1) / (train.warmup + 1)
    if train.schedule == "constant":
        return 1.0
    return cosine((step - train.warmup) / max(steps - train.warmup, 1), train.min_lr)


def cosine(progress: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def accumulate(resident: ResidentModel, batch: Sequence[Example], micro_batch: int) -> Tensor:
    """Add the gradient of the batch's mean loss, a micro-batch at a time; returns that loss.

    Every token weighs the same whatever micro-batch it falls into, so cutting a batch changes nothing but memory.
    """
    total = torch.zeros((), device=resident.device)
    for loss in losses(resident, batch, micro_batch):
        loss.backward()
        total += loss.detach()
    return total


def losses(resident: ResidentModel, batch: Sequence[Example], micro_batch: int | None) -> Iterator[Tensor]:
    """Of the parts of the batch; they sum to its loss."""
    for part, share, options in parts_of(resident, batch, micro_batch or len(batch)):
        with torch.autocast(resident.device.type, dtype=torch.bfloat16, enabled=resident.autocast):
            loss = resident.peft(**on_device(collate(part, resident.pad), resident.device), **options).loss
        yield loss * share  # the logits are let go before the backward pass


def parts_of(
    resident: ResidentModel, batch: Sequence[Example], micro_batch: int
) -> Iterator[tuple[Sequence[Example], float, dict[str, int]]]:
    """The batch in parts, each with the share of its loss in that of the batch, and what the model must know for it."""
    learnt = sum(example.learnt for example in batch) if resident.causal else len(batch)
    for part in _in_batches(batch, micro_batch):
        check()
        yield part, 1.0 if resident.causal else len(part) / len(batch), resident.loss_options(learnt)


@torch.no_grad()
def evaluate(resident: ResidentModel, examples: Sequence[Example], batch: int) -> dict[str, float]:
    """`loss` in nats per token (or per example, for classification), `perplexity`, `token_accuracy` (or `accuracy`),
    and `tokens`, how many predictions that was. Empty where there is nothing to evaluate."""
    require_evaluation()
    resident.peft.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for part in _in_batches(sorted(examples, key=lambda e: -len(e.input_ids)), batch):
        sums += within_memory(resident, "evaluation", len(part), partial(_evaluated, resident, part))
    loss, right, count = sums.tolist()
    if not count:
        return {}
    accuracy = "token_accuracy" if resident.causal else "accuracy"
    figures = {"loss": loss / count, accuracy: right / count, "tokens": count}
    return figures | ({"perplexity": perplexity(loss / count)} if resident.causal else {})


def _evaluated(resident: ResidentModel, examples: Sequence[Example], size: int) -> Tensor:
    """(3,): the summed loss of all predictions, how many were right, how many there were."""
    sums = torch.zeros(3, dtype=torch.float64)
    for part in _in_batches(examples, size):
        check()
        inputs = on_device(collate(part, resident.pad), resident.device)
        labels = inputs.pop("labels")  # (b, t), or (b,) for classification
        with torch.autocast(resident.device.type, dtype=torch.bfloat16, enabled=resident.autocast):
            logits = resident.peft(**inputs).logits  # (b, t, v), or (b, classes)
        if resident.causal:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        learnt = labels != -100
        right = (logits.argmax(-1) == labels) & learnt
        loss = nn.functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
        sums += torch.stack([loss, right.sum().float(), learnt.sum().float()]).cpu()
    return sums


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def on_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _in_batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
