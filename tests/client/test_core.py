"""A core R (r, r) between the factors, and gradients of the factors, on a real model: against stock PEFT and plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from client.data.batches import batches, collate
from client.local import Local
from client.trainer import Trainer
from fedtune.adapter import Adapter, Factors
from fedtune.job import Job
from fedtune.lora import with_core

IDS = torch.tensor([[1, 40, 70, 90, 200, 30, 2], [1, 9, 8, 7, 6, 5, 2]])  # (2, 7)
MakeJob = Callable[..., Job]
Draw = Callable[..., Adapter]


@pytest.fixture
def trainer(make_job: MakeJob) -> Trainer:
    return Trainer.for_simulation(make_job())


@pytest.fixture
def local(trainer: Trainer) -> Local:
    return trainer.local("bob", 1)


def shapes(trainer: Trainer) -> dict[str, tuple[int, int]]:
    return {path: (layer.out_features, layer.in_features) for path, layer in trainer.resident.lora.items()}


def logits(trainer: Trainer) -> Tensor:
    trainer.resident.peft.eval()
    with torch.no_grad():
        return trainer.resident.peft(input_ids=IDS).logits.clone()


def drawn_cores(adapter: Adapter) -> dict[str, Tensor]:
    """Unlike their own transposes, so that a wrong side is seen."""
    draw = torch.Generator().manual_seed(3)
    return {path: torch.randn(pair.rank, pair.rank, generator=draw) for path, pair in adapter.lora.items()}


def with_cores(adapter: Adapter, cores: dict[str, Tensor]) -> Adapter:
    return replace(adapter, lora={path: with_core(pair, cores[path]) for path, pair in adapter.lora.items()})


def test_a_layer_with_a_core_computes_s_b_r_a(trainer: Trainer, local: Local, draw_adapter: Draw) -> None:
    """The same as an ordinary adapter with B' = B R."""
    adapter = draw_adapter(shapes(trainer), 3, scale=0.5)
    local.load(adapter, cores=drawn_cores(adapter))
    with_r = logits(trainer)
    local.load(with_cores(adapter, drawn_cores(adapter)))
    torch.testing.assert_close(with_r, logits(trainer), rtol=1e-4, atol=1e-4)
    local.load(adapter)
    assert (with_r - logits(trainer)).abs().max() > 0.1


def test_a_core_goes_away_with_the_next_load(trainer: Trainer, local: Local, draw_adapter: Draw) -> None:
    adapter = draw_adapter(shapes(trainer), 3)
    local.load(adapter)
    without = logits(trainer)
    local.load(adapter, cores=drawn_cores(adapter))
    local.load(adapter)
    assert torch.equal(logits(trainer), without)
    assert local.cores() == {}
    assert len(trainer.resident.trainable()) == 2 * len(adapter.lora)


def test_modules_without_a_core_stay_ordinary(trainer: Trainer, local: Local, draw_adapter: Draw) -> None:
    adapter = draw_adapter(shapes(trainer), 2)
    path, other = list(adapter.lora)[:2]
    cores = {path: drawn_cores(adapter)[path]}
    local.load(adapter, cores=cores)
    given = logits(trainer)
    one = replace(adapter, lora={**adapter.lora, path: with_core(adapter.lora[path], cores[path])})
    local.load(one)
    torch.testing.assert_close(given, logits(trainer), rtol=1e-4, atol=1e-4)
    assert other not in local.cores()


def test_only_the_core_trains(trainer: Trainer, local: Local, draw_adapter: Draw) -> None:
    adapter = draw_adapter(shapes(trainer), 3)
    zeros = {path: torch.zeros(3, 3) for path in adapter.lora}
    local.load(adapter, frozen=("A", "B"), cores=zeros)
    assert {tuple(parameter.shape) for parameter in trainer.resident.trainable()} == {(3, 3)}
    figures = local.fit()
    assert figures["steps"] == 2
    after = local.adapter()
    for path, pair in adapter.lora.items():
        assert torch.equal(after.lora[path].A, pair.A)
        assert torch.equal(after.lora[path].B, pair.B)
        assert local.cores()[path].any()


def test_cores_are_copies(trainer: Trainer, local: Local, draw_adapter: Draw) -> None:
    adapter = draw_adapter(shapes(trainer), 3)
    given = drawn_cores(adapter)
    local.load(adapter, frozen=("A", "B"), cores=given)
    kept = {path: core.clone() for path, core in given.items()}
    before = local.cores()
    local.fit()
    for path, core in kept.items():
        assert torch.equal(given[path], core)
        assert torch.equal(before[path], core)
        assert not torch.equal(local.cores()[path], core)


def test_another_rank_takes_another_core(trainer: Trainer, local: Local, draw_adapter: Draw) -> None:
    for rank in (4, 2):
        adapter = draw_adapter(shapes(trainer), rank)
        local.load(adapter, cores=drawn_cores(adapter))
        assert {tuple(core.shape) for core in local.cores().values()} == {(rank, rank)}
        assert logits(trainer).isfinite().all()


def dense_gradient(trainer: Trainer, model: Path, count: int) -> dict[str, Tensor]:
    """G (d, k) of each adapted weight: of the mean loss over bob's first batches, by autograd on the plain base model."""
    job, base = trainer.job, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    own = batches(trainer.data("bob").train, job.train.batch, job.seed, 1, "bob", "batches")
    losses = [base(**collate(batch, trainer.resident.pad)).loss for batch in islice(own, count)]
    torch.stack(losses).mean().backward()
    return {path: base.get_submodule(path).weight.grad.double() for path in trainer.resident.lora}


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_of_the_factors_are_products_with_the_dense_gradient(
    count: int, trainer: Trainer, local: Local, draw_adapter: Draw, tiny_model: Path
) -> None:
    """At B = 0 `dL/dB = s G A^T`, and at A = 0 `dL/dA = s B^T G`: what a calibration by sketches stands on."""
    drawn, G = draw_adapter(shapes(trainer), 4, scale=0.5).lora, dense_gradient(trainer, tiny_model, count)
    for zero in ("B", "A"):
        pairs = {path: replace(pair, **{zero: torch.zeros_like(getattr(pair, zero))}) for path, pair in drawn.items()}
        local.load(Adapter(pairs), frozen=("A" if zero == "B" else "B", "dense"))
        for path, slope in local.gradient(count).lora.items():
            A, B = pairs[path].A.double(), pairs[path].B.double()
            wanted = Factors(0.5 * B.T @ G[path], 0.5 * G[path] @ A.T, 0.5)
            torch.testing.assert_close(getattr(slope, zero).double(), getattr(wanted, zero), rtol=1e-3, atol=1e-6)
            assert getattr(slope, zero).any()
            assert not getattr(slope, "A" if zero == "B" else "B").any()  # frozen


def test_a_gradient_changes_nothing_and_is_the_same_each_time(trainer: Trainer, local: Local, draw_adapter: Draw) -> None:
    adapter = draw_adapter(shapes(trainer), 4)
    local.load(adapter)
    first, second = local.gradient(2), local.gradient(2)
    for path, pair in adapter.lora.items():
        assert torch.equal(first.lora[path].B, second.lora[path].B)
        assert torch.equal(local.adapter().lora[path].B, pair.B)
    assert all(layer.lora_B["default"].weight.grad is None for layer in trainer.resident.lora.values())
