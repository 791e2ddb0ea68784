"""What is written loads with stock PEFT, and the model then computes what merging by hand computes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from fedtune.adapter import Adapter, Factors
from fedtune.base import Blueprint, blueprint, lora_layers
from fedtune.job import Job
from fedtune.peft_folder import read_adapter, write_adapter
from fedtune.testing import product

TOKENS = torch.tensor([[1, 5, 7, 3]])


def saved(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, **heads)
    return saved(tmp_path_factory.mktemp("llama"), LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8, initializer_range=0.3)
    config.bos_token_id = config.eos_token_id = 1
    return saved(tmp_path_factory.mktemp("gpt2"), GPT2LMHeadModel(config))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "max_position_embeddings": 16}
    config = RobertaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_labels=3, initializer_range=0.3)
    return saved(tmp_path_factory.mktemp("roberta"), RobertaForSequenceClassification(config))


def job(folder: Path, **sections: object) -> Job:
    return Job.model_validate(
        {"adapter": {"rank": 2, "alpha": 3}, **sections, "model": {"path": str(folder), **sections.get("model", {})}}
    )  # type: ignore[dict-item]


def drawn(found: Blueprint, ranks: Callable[[int], int], scales: Callable[[int], float]) -> Adapter:
    """Random pairs of these ranks and scales for the modules of a blueprint, and random heads."""
    numbers = torch.Generator().manual_seed(3)

    def pair(i: int, like: Factors) -> Factors:
        (d, k), r = like.shape, ranks(i)
        return Factors(torch.randn(r, k, generator=numbers), torch.randn(d, r, generator=numbers), scales(i))

    lora = {path: pair(i, like) for i, (path, like) in enumerate(found.adapter.lora.items())}
    dense = {name: torch.randn(tensor.shape, generator=numbers) for name, tensor in found.adapter.dense.items()}
    return Adapter(lora, dense, found.adapter.base)


@torch.no_grad()
def merged_by_hand(model: nn.Module, adapter: Adapter) -> nn.Module:
    for path, pair in adapter.lora.items():
        module = model.get_submodule(path)
        change = product(pair).float()  # (d, k)
        module.weight += change.T if isinstance(module, Conv1D) else change  # type: ignore[operator]
    for name, tensor in adapter.dense.items():
        model.get_parameter(name).copy_(tensor)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(TOKENS).logits
    return found


MIXES = {
    "one rank, one scale": (lambda i: 2, lambda i: 1.5),
    "ranks differ": (lambda i: 1 + i % 4, lambda i: 1.0),
    "scales differ": (lambda i: 2, lambda i: (0.5, 3.0, 16 / 3**0.5)[i % 3]),
    "both differ, some are empty": (lambda i: i % 4, lambda i: (0.5, 3.0)[i % 2]),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_stock_peft_computes_what_merging_computes(
    mix: str, model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    asked = job(folder)
    found = blueprint(asked)
    adapter = drawn(found, *MIXES[mix])
    write_adapter(tmp_path / "adapter", adapter, asked, found, {"round": 1, "base": adapter.base})
    base = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(base)
    loaded = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    torch.testing.assert_close(loaded, logits(merged_by_hand(AutoModelForCausalLM.from_pretrained(folder), adapter)))
    assert (loaded - before).abs().max() > 0.1


@pytest.mark.parametrize("model", ["llama", "roberta"])
def test_a_head_is_loaded_too(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """RoBERTa's head has layers of its own, with names that stand in its blocks as well."""
    folder = request.getfixturevalue(model)
    asked = job(folder, model={"task": "classification", "labels": 3})
    found = blueprint(asked)
    adapter = drawn(found, *MIXES["ranks differ"])
    write_adapter(tmp_path / "adapter", adapter, asked, found, {})

    def base() -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)  # type: ignore[no-any-return]

    loaded = logits(PeftModel.from_pretrained(base(), tmp_path / "adapter"))
    torch.testing.assert_close(loaded, logits(merged_by_hand(base(), adapter)))


@pytest.mark.parametrize("mix", ["one rank, one scale", "ranks differ", "scales differ"])
def test_written_and_read(mix: str, llama: Path, tmp_path: Path) -> None:
    asked = job(llama)
    adapter = drawn(blueprint(asked), *MIXES[mix])
    write_adapter(tmp_path / "adapter", adapter, asked, blueprint(asked), {"base": adapter.base})
    again = read_adapter(tmp_path / "adapter")
    assert again.base == adapter.base
    assert again.ranks == adapter.ranks
    for path, pair in adapter.lora.items():
        assert torch.equal(again.lora[path].A, pair.A)
        assert torch.equal(again.lora[path].B, pair.B)
        assert again.lora[path].scale == pytest.approx(pair.scale, rel=1e-12)


def test_an_empty_pair_is_read_as_nothing_to_add(llama: Path, tmp_path: Path) -> None:
    """PEFT knows no rank 0: it is written as one direction of zeros."""
    asked = job(llama)
    write_adapter(tmp_path / "a", drawn(blueprint(asked), lambda i: 0, lambda i: 1.0), asked, blueprint(asked), {})
    again = read_adapter(tmp_path / "a")
    assert set(again.ranks.values()) == {1}
    assert not any(product(pair).any() for pair in again.lora.values())


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_wrote_is_read(llama: Path, tmp_path: Path, rslora: bool) -> None:
    """Its patterns may name modules by the end of their path; scales are alpha/r, or alpha/sqrt(r)."""
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 4},
        alpha_pattern={"layers.1.self_attn.v_proj": 5},
        use_rslora=rslora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    model.save_pretrained(tmp_path / "a")
    stored = {path: layer.scaling["default"] for path, layer in lora_layers(model)}
    read = read_adapter(tmp_path / "a")
    assert {path: pair.scale for path, pair in read.lora.items()} == pytest.approx(stored)
    assert sorted(set(read.ranks.values())) == [2, 4]
    assert read.base == ""


def test_what_lies_in_the_folder(llama: Path, tmp_path: Path) -> None:
    asked = job(llama, name="mine")
    adapter = drawn(blueprint(asked), *MIXES["scales differ"])
    write_adapter(tmp_path / "a", adapter, asked, blueprint(asked), {"round": 3, "base": "b"})
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "fedtune.json",
    ]
    assert json.loads((tmp_path / "a" / "fedtune.json").read_text()) == {"round": 3, "base": "b"}
    card = (tmp_path / "a" / "README.md").read_text()
    assert "# mine" in card
    assert f"base_model: {llama}" in card
    assert "round 3 of 10" in card
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["inference_mode"], config["base_model_name_or_path"]) == (2, True, str(llama))


def test_an_older_adapter_is_replaced_as_a_whole(llama: Path, tmp_path: Path) -> None:
    asked = job(llama)
    adapter = drawn(blueprint(asked), *MIXES["one rank, one scale"])
    folder = tmp_path / "a"
    write_adapter(folder, adapter, asked, blueprint(asked), {})
    (folder / "left over").touch()
    doubled = {path: replace(pair, scale=2 * pair.scale) for path, pair in adapter.lora.items()}
    write_adapter(folder, replace(adapter, lora=doubled), asked, blueprint(asked), {})
    assert {pair.scale for pair in read_adapter(folder).lora.values()} == {3.0}
    assert not (folder / "left over").exists()
    assert [found.name for found in tmp_path.iterdir()] == ["a"]


def test_a_crash_while_writing_leaves_no_half_folder(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job(llama)
    adapter = drawn(blueprint(asked), *MIXES["one rank, one scale"])

    def crash(*_: object) -> None:
        raise OSError("the machine stopped")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="stopped"):
            write_adapter(tmp_path / "a", adapter, asked, blueprint(asked), {})
    assert not (tmp_path / "a").exists()
    write_adapter(tmp_path / "a", adapter, asked, blueprint(asked), {})
    assert [found.name for found in tmp_path.iterdir()] == ["a"]
