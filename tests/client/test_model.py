"""The resident model: what is in the slot and in the base counts, nothing else, however often it was changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from client.model import ResidentModel
from fedtune import lora
from fedtune.adapter import Adapter, Factors
from fedtune.job import Job
from fedtune.payload import payload_of

IDS = torch.tensor([[1, 40, 70, 90, 200, 30, 2], [1, 9, 8, 7, 6, 5, 2]])  # (2, 7)
NOTHING, ALL = Adapter(), frozenset()
MakeJob = Callable[..., Job]
Draw = Callable[..., Adapter]


def shapes(resident: ResidentModel) -> dict[str, tuple[int, int]]:
    return {path: (layer.out_features, layer.in_features) for path, layer in resident.lora.items()}


def logits(resident: ResidentModel) -> Tensor:
    resident.peft.eval()
    with torch.no_grad():
        return resident.peft(input_ids=IDS).logits.clone()


def weights(resident: ResidentModel) -> dict[str, Tensor]:
    """Of the base, as the adapted modules hold them now."""
    return {path: layer.get_base_layer().weight.detach().clone() for path, layer in resident.lora.items()}


def product(pair: Factors) -> Tensor:
    """(d, k) in float64."""
    return pair.scale * pair.B.double() @ pair.A.double()


def with_stock_peft(folder: Path, adapter: Adapter, rank: int) -> Tensor:
    """The logits of a fresh PEFT model of just this rank and scale."""
    scale = next(iter(adapter.lora.values())).scale
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=scale * rank, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config).eval()
    for path, pair in adapter.lora.items():
        layer = model.base_model.model.get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(pair.A)
        layer.lora_B["default"].weight.data.copy_(pair.B)
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def resident(make_job: MakeJob) -> ResidentModel:
    return ResidentModel(make_job())


@pytest.fixture
def gpt2(tmp_path: Path, make_job: MakeJob, tiny_tokenizer) -> ResidentModel:
    """Its modules are Conv1D, whose weights lie as (k, d)."""
    config = GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return ResidentModel(make_job(f"model.path={tmp_path}"))


def test_adapters_of_different_ranks_share_the_slot(resident: ResidentModel, draw_adapter: Draw, tiny_model: Path) -> None:
    for rank, scale in ((4, 1.5), (1, 3.0), (7, 0.25), (4, 2.0)):
        adapter = draw_adapter(shapes(resident), rank, scale, seed=rank)
        resident.load(adapter, NOTHING, ALL)
        torch.testing.assert_close(logits(resident), with_stock_peft(tiny_model, adapter, rank), rtol=1e-5, atol=1e-5)


def test_swapping_back_gives_the_same_bits(resident: ResidentModel, draw_adapter: Draw) -> None:
    first, other = (draw_adapter(shapes(resident), rank, seed=rank) for rank in (4, 2))
    resident.load(first, NOTHING, ALL)
    before = logits(resident)
    resident.load(other, first, ALL)
    assert not torch.equal(logits(resident), before)
    resident.load(first, NOTHING, ALL)
    assert torch.equal(logits(resident), before)


def test_the_slot_is_a_copy(resident: ResidentModel, draw_adapter: Draw) -> None:
    adapter = draw_adapter(shapes(resident), 4)
    resident.load(adapter, NOTHING, ALL)
    read = resident.adapter()
    for parameter in resident.trainable():
        parameter.data.zero_()
    for path, pair in adapter.lora.items():
        assert pair.A.any()
        assert torch.equal(read.lora[path].A, pair.A)
        assert torch.equal(read.lora[path].B, pair.B)
        assert read.lora[path].scale == pair.scale
    assert read.base == resident.base


def test_modules_that_are_not_named_are_left_as_the_base_has_them(resident: ResidentModel, draw_adapter: Draw) -> None:
    resident.load(NOTHING, NOTHING, ALL)
    base = logits(resident)
    resident.load(draw_adapter(shapes(resident), 4), NOTHING, ALL)
    resident.load(NOTHING, NOTHING, ALL)
    assert torch.equal(logits(resident), base)


@pytest.mark.parametrize("kind", ["resident", "gpt2"])
def test_merged_is_the_dense_product_on_the_weight(kind: str, draw_adapter: Draw, request: pytest.FixtureRequest) -> None:
    model: ResidentModel = request.getfixturevalue(kind)
    pristine, merged = weights(model), draw_adapter(shapes(model), 5, scale=0.75)
    model.load(merged, NOTHING, ALL)
    beside = logits(model)
    model.load(NOTHING, merged, ALL)
    for path, layer in model.lora.items():
        delta = product(merged.lora[path])
        wanted = pristine[path].double() + (delta.T if layer.fan_in_fan_out else delta)
        torch.testing.assert_close(weights(model)[path].double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(model), beside, rtol=1e-4, atol=1e-4)


def test_fifty_merges_leave_the_pristine_bits(resident: ResidentModel, draw_adapter: Draw) -> None:
    pristine = weights(resident)
    for seed in range(50):
        resident.load(NOTHING, draw_adapter(shapes(resident), 3, seed=seed), ALL)
    resident.load(NOTHING, NOTHING, ALL)
    for path, weight in weights(resident).items():
        assert torch.equal(weight, pristine[path])


def test_a_merge_that_broke_off_is_undone_by_the_next(
    resident: ResidentModel, draw_adapter: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (draw_adapter(shapes(resident), 3, seed=seed) for seed in (1, 2))
    resident.load(NOTHING, first, ALL)
    wanted, merges, merge = weights(resident), iter(range(9)), lora.merged

    def out_of_memory(*given: object, **named: object) -> Tensor:
        if next(merges) == 2:
            raise MemoryError
        return merge(*given, **named)

    with monkeypatch.context() as broken:
        broken.setattr(lora, "merged", out_of_memory)
        with pytest.raises(MemoryError):
            resident.load(NOTHING, second, ALL)
    resident.load(NOTHING, first, ALL)
    assert all(torch.equal(weight, wanted[path]) for path, weight in weights(resident).items())


def sixty_fourths(shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> Adapter:
    """Products of such numbers are exact in float32, so that only the last rounding is left."""
    numbers = torch.Generator().manual_seed(seed)
    whole = lambda *shape: torch.randint(-4, 5, shape, generator=numbers) / 64  # noqa: E731
    return Adapter({path: Factors(whole(rank, k), whole(d, rank), 1.0) for path, (d, k) in shapes.items()})


def test_a_bf16_base_rounds_a_cumulative_adapter_once(make_job: MakeJob) -> None:
    resident = ResidentModel(make_job("model.dtype=bfloat16"))
    pristine = weights(resident)
    steps = [sixty_fourths(shapes(resident), rank, seed=rank) for rank in (2, 3, 4)]
    for merged in steps:
        resident.load(NOTHING, merged, ALL)
    now, drifted = weights(resident), 0
    for path, weight in pristine.items():
        assert weight.dtype is torch.bfloat16
        products = [product(merged.lora[path]) for merged in steps]
        assert torch.equal(now[path], (weight.double() + products[-1]).to(torch.bfloat16))
        step_by_step = weight
        for before, after in zip([torch.zeros_like(products[0]), *products[:-1]], products, strict=True):
            step_by_step = (step_by_step.double() + after - before).to(torch.bfloat16)
        drifted += int((step_by_step != now[path]).sum())
    assert drifted > 0  # what rounding at every merge would have given


def test_the_correction_adapter_is_as_good_as_merging(make_job: MakeJob, draw_adapter: Draw) -> None:
    merging, beside = ResidentModel(make_job()), ResidentModel(make_job())
    beside.beside = True
    pristine = weights(beside)
    for rank, below in ((3, 6), (4, 2), (2, 0)):
        own, cumulative = draw_adapter(shapes(merging), rank, seed=1), draw_adapter(shapes(merging), below, 0.5, seed=2)
        for resident in (merging, beside):
            resident.load(own, cumulative, ALL)
        torch.testing.assert_close(logits(beside), logits(merging), rtol=1e-4, atol=1e-5)
        assert sum(p.numel() for p in beside.trainable()) == own.parameters()
    assert all(torch.equal(weight, pristine[path]) for path, weight in weights(beside).items())


@pytest.mark.parametrize("frozen", [(), ("A",), ("B",), ("dense",), ("A", "dense"), ("A", "B", "dense")])
def test_what_is_frozen_gets_no_gradient(frozen: tuple[str, ...], make_job: MakeJob, draw_adapter: Draw) -> None:
    resident = ResidentModel(make_job("model.task=classification", "model.labels=3"))
    resident.load(draw_adapter(shapes(resident), 2), NOTHING, frozenset(frozen))
    parts = {
        "A": [layer.lora_A["default"].weight for layer in resident.lora.values()],
        "B": [layer.lora_B["default"].weight for layer in resident.lora.values()],
        "dense": list(resident.dense.values()),
    }
    free = [parameter for part, parameters in parts.items() if part not in frozen for parameter in parameters]
    assert {id(parameter) for parameter in resident.trainable()} == {id(parameter) for parameter in free}
    assert [name for name, _ in resident.dense.items()] == ["score.weight"]
    if free:
        resident.peft(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    for part, parameters in parts.items():
        assert all((parameter.grad is None) == (part in frozen) for parameter in parameters), part


def test_a_part_that_was_frozen_trains_again(resident: ResidentModel, draw_adapter: Draw) -> None:
    adapter = draw_adapter(shapes(resident), 2)
    resident.load(adapter, NOTHING, frozenset({"A"}))
    resident.load(adapter, NOTHING, ALL)
    assert sum(parameter.numel() for parameter in resident.trainable()) == adapter.parameters()


def test_the_classification_head_is_swapped_with_the_adapter(make_job: MakeJob, draw_adapter: Draw) -> None:
    resident = ResidentModel(make_job("model.task=classification", "model.labels=3"))
    head = torch.arange(96.0).reshape(3, 32) / 96
    adapter = replace(draw_adapter(shapes(resident), 2), dense={"score.weight": head})
    resident.load(adapter, NOTHING, ALL)
    first = logits(resident)
    assert first.shape == (2, 3)
    assert torch.equal(resident.adapter().dense["score.weight"], head)
    resident.load(replace(adapter, dense={"score.weight": 2 * head}), NOTHING, ALL)
    torch.testing.assert_close(logits(resident), 2 * first)  # the head is linear and has no bias


@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_keeps_float32_on_a_bf16_base(autocast: bool, make_job: MakeJob, draw_adapter: Draw) -> None:
    """bf16 holds 1 and 1 + 1/128, and nothing in between."""
    resident = ResidentModel(make_job("model.task=classification", "model.labels=3", "model.dtype=bfloat16"))
    head = torch.full((3, 32), 1 + 2**-12)
    resident.load(replace(draw_adapter(shapes(resident), 2), dense={"score.weight": head}), NOTHING, ALL)
    assert torch.equal(resident.adapter().dense["score.weight"], head)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        resident.peft(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    assert resident.gradient().dense["score.weight"].any()


def test_the_gradients_of_a_training_that_broke_off_are_not_the_next_client_s(make_job: MakeJob, draw_adapter: Draw) -> None:
    resident = ResidentModel(make_job("model.task=classification", "model.labels=3"))
    adapter = replace(draw_adapter(shapes(resident), 2), dense={"score.weight": torch.ones(3, 32) / 32})
    resident.load(adapter, NOTHING, ALL)
    resident.peft(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()  # and no step, no zero_grad
    resident.load(adapter, NOTHING, ALL)
    assert not any(tensor.any() for tensor in payload_of(resident.gradient()).tensors.values())


def test_a_classifier_s_correction_lies_beside_its_head(make_job: MakeJob, draw_adapter: Draw) -> None:
    resident = ResidentModel(make_job("model.task=classification", "model.labels=3"))
    head = {"score.weight": torch.ones(3, 32) / 32}
    cumulative = draw_adapter(shapes(resident), 5)
    resident.load(Adapter(dense=head), cumulative, ALL)
    merged = logits(resident)
    resident.load(Adapter(dense=head), NOTHING, ALL)
    resident.beside = True
    resident.load(Adapter(dense=head), cumulative, ALL)
    torch.testing.assert_close(logits(resident), merged, rtol=1e-4, atol=1e-5)
    assert list(resident.adapter().dense) == ["score.weight"]
    assert [tuple(p.shape) for p in resident.trainable() if p.numel()] == [(3, 32)]


def test_a_correction_of_some_modules_leaves_the_others_and_what_is_frozen_alone(
    resident: ResidentModel, draw_adapter: Draw
) -> None:
    resident.beside = True
    own = draw_adapter(shapes(resident), 2)
    path = "model.layers.0.mlp.up_proj"
    resident.load(own, draw_adapter({path: shapes(resident)[path]}, 3), frozenset({"A"}))
    trained = {id(parameter) for parameter in resident.trainable()}
    assert trained == {id(layer.lora_B["default"].weight) for layer in resident.lora.values()}
    corrected = [path for path, layer in resident.lora.items() if layer.r["correction"]]
    assert corrected == [path]
