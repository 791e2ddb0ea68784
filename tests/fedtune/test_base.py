"""The base model seen from outside: where an adapter goes in a tiny Llama, GPT-2 and RoBERTa, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedtune import base
from fedtune.base import base_hash, blueprint, model_folder
from fedtune.errors import ModelError
from fedtune.job import Job, Model
from fedtune.paths import base_model
from fedtune.seeds import lora_a

LLAMA = LlamaConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GPT2 = GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2)
ROBERTA = RobertaConfig(
    vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16
)
Saved = Callable[[type[PreTrainedModel], object], Path]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """saved(class, config): the folder of such a model with random weights."""

    def save(model: type[PreTrainedModel], config: object) -> Path:
        torch.manual_seed(0)
        model(config).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def job(folder: Path | str, **sections: dict[str, object]) -> Job:
    model = {"path": str(folder), **sections.pop("model", {})}
    return Job.model_validate({"adapter": {"rank": 2, "alpha": 3}, **sections, "model": model})


# blueprints


def test_a_llama(saved: Saved) -> None:
    """Linear layers of both blocks; heads of 4 with one key-value head make k and v 4 wide; the output head is left out."""
    found = blueprint(job(saved(LlamaForCausalLM, LLAMA)))
    shapes = {"q_proj": (8, 8), "k_proj": (4, 8), "v_proj": (4, 8), "o_proj": (8, 8)}
    mlp = {"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}
    wanted = {f"model.layers.{i}.self_attn.{name}": shape for i in range(2) for name, shape in shapes.items()}
    wanted |= {f"model.layers.{i}.mlp.{name}": shape for i in range(2) for name, shape in mlp.items()}
    assert {path: pair.shape for path, pair in found.adapter.lora.items()} == wanted
    assert {target.rpartition(".")[2] for target in found.targets} == {*shapes, *mlp}
    assert (found.adapter.dense, found.modules_to_save) == ({}, ())


def test_a_pair_begins_at_zero_with_a_from_the_seed(saved: Saved) -> None:
    folder = saved(LlamaForCausalLM, LLAMA)
    adapter = blueprint(job(folder, adapter={"rank": 2, "alpha": 3, "targets": ["q_proj"]}, seed=5)).adapter  # type: ignore[arg-type]
    assert len(adapter.lora) == 2
    for path, pair in adapter.lora.items():
        assert torch.equal(pair.A, lora_a(5, path, 2, 8))
        assert torch.equal(pair.B, torch.zeros(8, 2))
        assert pair.scale == 3 / 2
    assert adapter.base == base_hash(folder)


def test_a_gpt2_whose_weights_lie_the_other_way_up(saved: Saved) -> None:
    """Conv1D stores (k, d): c_attn is (8, 24) on disk, and d = 24, k = 8 for us."""
    folder = saved(GPT2LMHeadModel, GPT2)
    stored = load_file(folder / "model.safetensors")["transformer.h.0.attn.c_attn.weight"]
    found = blueprint(job(folder))
    assert tuple(stored.shape) == (8, 24)
    assert {path: pair.shape for path, pair in found.adapter.lora.items()} == {
        "transformer.h.0.attn.c_attn": (24, 8),
        "transformer.h.0.attn.c_proj": (8, 8),
        "transformer.h.0.mlp.c_fc": (32, 8),
        "transformer.h.0.mlp.c_proj": (8, 32),
    }


def test_a_head_that_the_checkpoint_has_is_taken(saved: Saved) -> None:
    folder = saved(LlamaForSequenceClassification, LlamaConfig(**{**LLAMA.to_dict(), "num_labels": 3}))
    found = blueprint(job(folder, model={"task": "classification", "labels": 3}))
    assert torch.equal(found.adapter.dense["score.weight"], load_file(folder / "model.safetensors")["score.weight"])
    assert found.modules_to_save == ("score",)


def test_a_head_that_is_new_is_drawn_from_the_seed(saved: Saved) -> None:
    folder = saved(LlamaForCausalLM, LLAMA)
    asked = job(folder, model={"task": "classification", "labels": 3})
    one, again = blueprint(asked).adapter.dense, blueprint(asked).adapter.dense
    other = blueprint(asked.model_copy(update={"seed": 1})).adapter.dense
    assert one["score.weight"].shape == (3, 8)
    assert one["score.weight"].abs().max().item() <= 8**-0.5
    assert torch.equal(one["score.weight"], again["score.weight"])
    assert not torch.equal(one["score.weight"], other["score.weight"])


def test_a_head_with_layers_of_its_own_is_saved_by_its_own_name(saved: Saved) -> None:
    """RoBERTa's is classifier.{dense,out_proj}: PEFT must be told `classifier`, `dense` stands in every block too."""
    folder = saved(RobertaForSequenceClassification, RobertaConfig(**{**ROBERTA.to_dict(), "num_labels": 3}))
    found = blueprint(job(folder, model={"task": "classification", "labels": 3}, adapter={"rank": 2, "targets": ["query"]}))
    assert sorted(found.adapter.dense) == [
        "classifier.dense.bias",
        "classifier.dense.weight",
        "classifier.out_proj.bias",
        "classifier.out_proj.weight",
    ]
    assert found.modules_to_save == ("classifier",)


def test_names_of_labels_go_into_the_config(saved: Saved) -> None:
    folder = saved(LlamaForCausalLM, LLAMA)
    config = base.model_config(job(folder, model={"task": "classification", "labels": ("no", "yes")}), folder)
    assert (config.num_labels, config.id2label, config.label2id) == (2, {0: "no", 1: "yes"}, {"no": 0, "yes": 1})


# what is refused


@pytest.mark.parametrize("settings", [{"adapter": {"rank": 5}}, {"clients": {"ranks": {"ann": 5}}}])
def test_a_rank_larger_than_the_matrix(saved: Saved, settings: dict[str, dict[str, object]]) -> None:
    with pytest.raises(ModelError, match=r"rank 5 is larger than '.*k_proj' \(4 x 8\); wanted at most 4: --set adapter.rank=4"):
        blueprint(job(saved(LlamaForCausalLM, LLAMA), **settings))


def test_targets_that_match_nothing(saved: Saved) -> None:
    with pytest.raises(ModelError) as raised:
        blueprint(job(saved(LlamaForCausalLM, LLAMA), adapter={"rank": 2, "targets": ["q_prj"]}))
    assert "('q_prj',) matches no module of the model, did you mean 'q_proj'?" in str(raised.value)
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(raised.value)
    assert "--set adapter.targets=all-linear" in str(raised.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none", "./none", "none", "a/b/c"):
        with pytest.raises(ModelError, match=r"there is no model folder .*none|a/b/c; wanted a folder, a hub id"):
            model_folder(Model(path=str(path)))


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config.json; wanted a folder written by save_pretrained"):
        model_folder(Model(path=str(tmp_path)))


@pytest.mark.parametrize("config", ["{", "{}", '{"model_type": "no-such-model"}'])
def test_a_config_that_cannot_be_read(saved: Saved, config: str) -> None:
    folder = saved(LlamaForCausalLM, LLAMA)
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"the config of .* cannot be read"):
        blueprint(job(folder))


def test_a_folder_without_safetensors(saved: Saved) -> None:
    folder = saved(LlamaForCausalLM, LLAMA)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds no \*.safetensors; convert .* pickles are not read"):
        blueprint(job(folder))


def test_a_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError, match=r"'owner/name' is no folder here .*: no network; give the path of a folder"):
        model_folder(Model(path="owner/name"))


def test_the_built_in_model_is_the_one_that_is_shipped() -> None:
    assert model_folder(Model()) == base_model()


# the hash


def test_the_hash_changes_with_a_byte_and_with_a_name(saved: Saved) -> None:
    folder = saved(LlamaForCausalLM, LLAMA)
    file = folder / "model.safetensors"
    first, data = base_hash(folder), bytearray(file.read_bytes())
    assert len(first) == 32
    assert base_hash(folder) == first
    data[-1] ^= 1
    file.write_bytes(data)
    assert base_hash(folder) != first
    data[-1] ^= 1
    file.write_bytes(data)
    assert base_hash(folder) == first
    file.rename(folder / "other.safetensors")
    assert base_hash(folder) != first


def test_the_hash_covers_every_file_and_only_weights(saved: Saved) -> None:
    folder = saved(LlamaForCausalLM, LLAMA)
    first = base_hash(folder)
    (folder / "notes.json").write_text(json.dumps({"a": 1}))
    assert base_hash(folder) == first
    save_file({"x": torch.ones(1)}, folder / "model-2.safetensors")
    assert base_hash(folder) != first
