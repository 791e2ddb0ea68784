"""What was trained of a model's own weights, exported: the forms agree with each other, and stock libraries load them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from client.trainer import Trainer
from fedtune.base import blueprint
from fedtune.changed_weights import ChangedWeights
from fedtune.directions import Directions
from fedtune.errors import RoundFailed, UserError
from fedtune.job import Job
from fedtune.recipe import Recipe
from fedtune.recipe_file import read_recipe
from server.coordinator import RunResult
from server.records import RoundRecord
from server.report import loading_lines
from server.report_folder import read_run
from server.run_folder import RunFolder
from server.watchers import Quiet
from simulations.engine import simulate
from simulations.export import Form, export_run
from simulations.sweep import plan
from simulations.sweep_cell import play
from strategies.fedkseed import FedKSeed

MakeJob = Callable[..., Job]
FOR_RESUMING = {"journal.jsonl", "lock", "memory", "state"}
SEEDS = ("strategy.name=fedkseed", "strategy.K=64", "train.optimizer=sgd", "train.clip=0", "train.lr=1e-3")
LAYERS = ("strategy.name=selective_layers", "strategy.layers=1", "train.lr=1e-3")


@pytest.fixture(scope="module")
def run(make_job: MakeJob, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Two rounds of FedKSeed."""
    return simulate(make_job(*SEEDS), tmp_path_factory.mktemp("runs") / "run", Quiet())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[[Job], Path]:
    """recorded(job): the folder of a run that was stopped after its first round, whose recipe is `RECIPE`."""

    def record(job: Job) -> Path:
        folder, plan = RunFolder.create(tmp_path / "stopped", job), blueprint(job)
        folder.publish(1, RECIPE, job, plan, {"base": plan.adapter.base, "round": 1})
        return folder.path

    return record


RECIPE = Recipe((Directions(1).sum({seed: 0.5 + seed for seed in range(5)}),))


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def model_of(folder: Path) -> dict[str, Tensor]:
    return weights(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def about(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "fedtune.json").read_text(encoding="utf-8"))
    return found


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# the run


def test_a_run_leaves_a_recipe_in_each_round_and_the_model_at_the_end(run: RunResult) -> None:
    assert names(run.folder) - FOR_RESUMING == {"job.toml", "metrics.jsonl", "rounds", "recipe", "model"}
    assert [names(run.folder / "rounds" / number) for number in ("0001", "0002")] == [{"recipe"}] * 2
    assert os.readlink(run.recipe) == "rounds/0002/recipe"
    recipe, provenance = read_recipe(run.recipe)
    assert recipe == FedKSeed(K=64).published(run.state)
    assert (provenance["lr"], provenance["round"], provenance["published"]) == (1e-3, 2, "recipe")
    # at most 64 seeds and coefficients, and a header
    assert (run.recipe / "recipe.safetensors").stat().st_size < 64 * 12 + 600
    given = {key: about(run.model)[key] for key in provenance if key != "published"}
    assert given == {key: value for key, value in provenance.items() if key != "published"}


def test_stock_transformers_computes_what_the_run_measured(run: RunResult, make_job: MakeJob) -> None:
    """The held-out loss of the last record, once more: from the published model and the texts alone."""
    model = AutoModelForCausalLM.from_pretrained(run.model).eval()
    assert run.records[-1].loss == pytest.approx(held_out_loss(model, make_job(*SEEDS)), rel=1e-5)
    assert run.records[-1].loss != pytest.approx(run.records[0].loss, rel=1e-5)


def held_out_loss(model: PreTrainedModel, job: Job) -> float:
    trainer, total, count = Trainer.for_simulation(job), 0.0, 0
    for client in trainer.clients:
        for example in trainer.data(client).held_out:
            learnt = len(example.input_ids) - 1
            with torch.no_grad():
                ids = torch.tensor([example.input_ids])
                total += model(input_ids=ids, labels=ids).loss.item() * learnt
            count += learnt
    return total / count


def test_the_model_is_that_of_the_clients_to_the_bit(run: RunResult, make_job: MakeJob) -> None:
    trainer = Trainer.for_simulation(make_job(*SEEDS))
    trainer.strategy.use(trainer.strategy.broadcast(run.state), trainer.local("ann", 2), trainer.memory("ann"))
    held, published = trainer.resident.whole().parameters, model_of(run.model)
    assert held.keys() == published.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in published.items())


def test_a_run_that_was_stopped_is_exported(
    make_job: MakeJob, tmp_path: Path, run: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its third round fails; the first two were those of `run`, so their model is the same."""
    whole = FedKSeed.round

    def fails(self: FedKSeed, state: object, cohort: object) -> Iterator[object]:
        if (tmp_path / "run" / "rounds" / "0002").exists():
            raise RoundFailed("nobody came")
        return whole(self, state, cohort)

    monkeypatch.setattr(FedKSeed, "round", fails)
    with pytest.raises(RoundFailed):
        simulate(make_job(*SEEDS, "rounds.count=3"), tmp_path / "run", Quiet())
    assert not (tmp_path / "run" / "model").exists()
    said = export_run(tmp_path / "run", None, Form())
    assert said.startswith(f"model of round 2: {tmp_path / 'run' / 'model'}\n")
    wanted = model_of(run.model)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model_of(tmp_path / "run" / "model").items())


# its forms


def test_the_base_and_the_difference_make_the_model(run: RunResult, tiny_model: Path, out: Path) -> None:
    export_run(run.folder, out, Form("difference"))
    base, difference, wanted = model_of(tiny_model), load_file(out / "difference.safetensors"), model_of(run.model)
    assert {tensor.dtype for tensor in difference.values()} == {torch.float32}
    assert difference.keys() == wanted.keys()
    assert all(torch.equal(base[name] + difference[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("task", ["causal", "classification"])
def test_the_lines_beside_the_difference_make_the_model(
    task: str, make_job: MakeJob, recorded: Callable[[Job], Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new head is all difference: stock transformers draws another in its place."""
    labels = ["model.task=classification", "model.labels=3"] if task == "classification" else []
    run = recorded(make_job(*SEEDS, *labels))
    export_run(run, out, Form("difference"))
    export_run(run, None, Form())
    code = (out / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    done: dict[str, PreTrainedModel] = {}
    monkeypatch.chdir(out)
    exec(code, done)
    auto = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    wanted = weights(auto.from_pretrained(run / "model"))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(done["model"]).items())
    assert about(out)["new"] == (["score.weight"] if labels else [])


def test_a_round_before_the_last(run: RunResult, tiny_model: Path) -> None:
    said = export_run(run.folder, None, Form("difference", round=1))
    assert said.startswith(f"difference of round 1: {run.folder / 'difference-round-1'}\n")
    recipe, _ = read_recipe(run.folder / "rounds" / "0001" / "recipe")
    for name, tensor in load_file(run.folder / "difference-round-1" / "difference.safetensors").items():
        assert torch.equal(tensor, recipe.change(name, tuple(tensor.shape), 1e-3))
    shutil.rmtree(run.folder / "difference-round-1")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype: str, run: RunResult, tiny_model: Path, out: Path) -> None:
    said = export_run(run.folder, out, Form(dtype=dtype))
    stored = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    before, after, wanted = model_of(tiny_model), weights(stored), model_of(run.model)
    to = getattr(torch, dtype)
    assert all(torch.equal(tensor, wanted[name].to(to)) for name, tensor in after.items())
    moved = sum(int((after[name] != tensor.to(to)).sum()) for name, tensor in before.items())
    share = 100 * moved / sum(tensor.numel() for tensor in before.values())
    assert said.endswith(f"\n{share:.1f}% of the weights differ from the base in {dtype}")
    assert 0 < share < 100


def nearest_of_rank(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vt[:rank]


def gpt2(folder: Path, tiny_model: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=1)
    shutil.copytree(tiny_model, folder)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_adapter_is_the_nearest_and_says_what_it_loses(
    rank: int,
    architecture: str,
    make_job: MakeJob,
    recorded: Callable[[Job], Path],
    tiny_model: Path,
    tmp_path: Path,
    out: Path,
) -> None:
    """Of a linear module what lies beyond its leading directions is lost; of an embedding, a norm or a bias everything. GPT-2's
    modules are as small as 8 x 8: at rank 16 nothing of them is lost."""
    base = tiny_model if architecture == "llama" else gpt2(tmp_path / "gpt2", tiny_model)
    rank = min(rank, 8) if architecture == "gpt2" else rank
    run = recorded(make_job(*SEEDS, f"model.path={base}"))
    said = export_run(run, out, Form("adapter", rank))
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out))
    assert max(config.r for config in peft.peft_config.values()) == rank
    merged, before, lost, whole = (
        weights(peft.merge_and_unload()),
        model_of(base),
        {True: 0.0, False: 0.0},
        {True: 0.0, False: 0.0},
    )
    for name, start in before.items():
        change = RECIPE.change(name, tuple(start.shape), 1e-3).double()
        linear = change.ndim == 2 and not any(word in name for word in ("embed", "wte", "wpe", "lm_head"))
        kept = nearest_of_rank(change, rank) if linear else torch.zeros_like(change)
        assert (merged[name].double() - (start.double() + kept)).abs().max() < 1e-6
        whole[linear] += change.square().sum().item()
        lost[linear] += (change - kept).square().sum().item()
    error, of_linear = (sum(lost.values()) / sum(whole.values())) ** 0.5, (lost[True] / whole[True]) ** 0.5
    assert about(out)["relative_error"] == pytest.approx({"all_parameters": error, "linear": of_linear}, rel=1e-4, abs=1e-6)
    assert f"at rank {rank}: {error:.4f} of all parameters together, {of_linear:.4f} of the linear modules alone" in said


def test_a_classifier_s_head_stands_in_the_adapter_whole(
    make_job: MakeJob, recorded: Callable[[Job], Path], tiny_model: Path, out: Path
) -> None:
    job = make_job(*SEEDS, "model.task=classification", "model.labels=3")
    run = recorded(job)
    export_run(run, out, Form("adapter", 32))
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    head = PeftModel.from_pretrained(base, str(out)).base_model.model.score.modules_to_save["default"].weight
    start = blueprint(job).adapter.dense["score.weight"]
    assert torch.equal(head, start + RECIPE.change("score.weight", (3, 32), 1e-3))


# own weights in place of a recipe


@pytest.fixture(scope="module")
def own(make_job: MakeJob, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Two rounds of selective layers: each client trains one of the two layers."""
    return simulate(make_job(*LAYERS), tmp_path_factory.mktemp("runs") / "run", Quiet())


def run_lines(run: Path) -> PreTrainedModel:
    """The model that the lines at the end of `fedtune simulate` make."""
    done: dict[str, PreTrainedModel] = {}
    code = loading_lines(read_run(run), run)
    assert len(code.splitlines()) == 3
    exec(code, done)
    return done["model"].eval()


def test_stock_transformers_computes_what_a_run_of_layers_measured(own: RunResult, make_job: MakeJob) -> None:
    assert names(own.folder) - FOR_RESUMING == {"job.toml", "metrics.jsonl", "rounds", "weights"}
    assert os.readlink(own.weights) == "rounds/0002/weights"
    assert names(own.folder / "rounds") == {"0002"}
    assert own.records[-1].loss == pytest.approx(held_out_loss(run_lines(own.folder), make_job(*LAYERS)), rel=1e-5)
    assert own.records[-1].loss != pytest.approx(own.records[0].loss, rel=1e-5)


def test_the_exported_model_is_the_base_with_the_weights_put_in(own: RunResult, tiny_model: Path, out: Path) -> None:
    """To the bit; what nobody trained is the base's."""
    export_run(own.folder, out, Form())
    base, values, found = model_of(tiny_model), load_file(own.weights / "weights.safetensors"), model_of(out)
    assert 0 < len(values) < len(base)
    assert load_file(out / "model.safetensors").keys() == load_file(tiny_model / "model.safetensors").keys()
    assert all(torch.equal(tensor, values.get(name, base[name])) for name, tensor in found.items())
    moved = sum(int((values[name] != base[name]).sum()) for name in values) / sum(tensor.numel() for tensor in base.values())
    assert about(out)["moved"] == pytest.approx(moved)
    assert "the base and the weights that were trained" in (out / "README.md").read_text(encoding="utf-8")


def test_the_exported_model_in_sixteen_bits(own: RunResult, tiny_model: Path, out: Path) -> None:
    export_run(own.folder, out, Form(dtype="bfloat16"))
    base, values = model_of(tiny_model), load_file(own.weights / "weights.safetensors")
    stored = weights(AutoModelForCausalLM.from_pretrained(out, dtype="auto"))
    assert all(torch.equal(tensor, values.get(name, base[name]).bfloat16()) for name, tensor in stored.items())


def test_the_difference_of_weights(own: RunResult, tiny_model: Path, out: Path) -> None:
    """Base and difference are the weights again, but for the rounding of two sums in float32."""
    export_run(own.folder, out, Form("difference"))
    base, values = model_of(tiny_model), load_file(own.weights / "weights.safetensors")
    difference = load_file(out / "difference.safetensors")
    for name, start in base.items():
        assert torch.equal(difference[name], values.get(name, start) - start)
        assert torch.allclose(start + difference[name], values.get(name, start), rtol=1e-6, atol=1e-7)


def test_the_adapter_of_weights(own: RunResult, tiny_model: Path, out: Path) -> None:
    """At the rank of the whole matrix nothing of a linear module is lost; of the norms everything."""
    export_run(own.folder, out, Form("adapter", 32))
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(out))
    merged, base = weights(peft.merge_and_unload()), model_of(tiny_model)
    values = load_file(own.weights / "weights.safetensors")
    lost = {name: value - base[name] for name, value in values.items() if value.ndim == 1}
    for name, start in base.items():
        wanted = start if name in lost else values.get(name, start)
        assert torch.allclose(merged[name], wanted, atol=1e-6)
    whole = sum((value - base[name]).double().square().sum().item() for name, value in values.items())
    left = sum(part.double().square().sum().item() for part in lost.values())
    error = about(out)["relative_error"]
    assert error == pytest.approx({"all_parameters": (left / whole) ** 0.5, "linear": 0.0}, rel=1e-3, abs=1e-5)


def kept(folder: Path, job: Job, values: dict[str, Tensor]) -> Path:
    """A run that was stopped after its first round, which changed these."""
    run, plan = RunFolder.create(folder, job), blueprint(job)
    run.publish(1, ChangedWeights(values, plan.adapter.base), job, plan, {"base": plan.adapter.base, "round": 1})
    return run.path


@pytest.mark.parametrize("form", [Form(), Form("difference"), Form("adapter", 2)])
def test_a_run_that_changed_nothing_is_exported_as_the_base(
    form: Form, make_job: MakeJob, tiny_model: Path, tmp_path: Path, out: Path
) -> None:
    said = export_run(kept(tmp_path / "run", make_job(*LAYERS), {}), out, form)
    if form.kind == "adapter":
        assert "at rank 2: 0.0000 of all parameters together" in said
    else:
        assert said.endswith("0.0% of the weights differ from the base in float32")
    if form.kind == "model":
        assert all(torch.equal(tensor, model_of(out)[name]) for name, tensor in model_of(tiny_model).items())


def test_a_classifier_of_a_stopped_run(make_job: MakeJob, tmp_path: Path, out: Path) -> None:
    """Its lines and its export agree, head and all."""
    head = torch.full((3, 32), 0.5)
    job = make_job(*LAYERS, "model.task=classification", "model.labels=3")
    run = kept(tmp_path / "run", job, {"score.weight": head, "model.norm.weight": torch.full((32,), 2.0)})
    (run / "metrics.jsonl").write_text(json.dumps(RoundRecord(1).as_json()) + "\n", encoding="utf-8")
    export_run(run, out, Form())
    wanted, found = weights(AutoModelForSequenceClassification.from_pretrained(out)), weights(run_lines(run))
    assert torch.equal(found["score.weight"], head)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_weights_that_cannot_be_exported_are_said(
    own: RunResult, make_job: MakeJob, tiny_model: Path, tmp_path: Path, out: Path
) -> None:
    with pytest.raises(UserError, match="has no round 1; wanted --round 2, the last one, whose weights alone are kept"):
        export_run(own.folder, out, Form(round=1))
    with pytest.raises(UserError, match=r"is damaged: 'model.norms.weight' is \(32,\)"):
        export_run(kept(tmp_path / "odd", make_job(*LAYERS), {"model.norms.weight": torch.ones(32)}), out, Form())
    base = shutil.copytree(tiny_model, tmp_path / "base")
    run = kept(tmp_path / "run", make_job(*LAYERS, f"model.path={base}"), {})
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data += 1
    model.save_pretrained(base)
    with pytest.raises(UserError, match=r"base is not the one of this run: its hash is .* put the weights back"):
        export_run(run, out, Form())
    (run / "weights" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="holds no weights that can be read"):
        export_run(run, out, Form())
    assert not out.exists()


def test_the_command_line_ends_with_the_weights(
    job_file: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    run = tmp_path / "run"
    keys = [word for key in (*LAYERS, "compare=false", "rounds.count=1") for word in ("--set", key)]
    code, said, _ = run_command("simulate", job_file, "--out", run, *keys)
    assert code == 0
    assert f"weights: {run / 'weights'}, loaded with:" in said
    done: dict[str, PreTrainedModel] = {}
    exec(said.partition("loaded with:")[2], done)
    values = load_file(run / "weights" / "weights.safetensors")
    assert all(torch.equal(weights(done["model"])[name], value) for name, value in values.items())
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Load the weights" in page
    assert "with stock transformers and safetensors" in page
    assert "Layers by clients" in page


# at the command line


def test_the_command(run: RunResult, out: Path, run_command: Callable[..., tuple[int, str, str]]) -> None:
    code, said, err = run_command("export", run.folder, "--out", out, "--as", "adapter", "--rank", 2)
    assert (code, err) == (0, "")
    assert said.startswith(f"adapter of round 2: {out}\nrelative error of the difference to the base, at rank 2: 0.")


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        (["--dtype", "int8"], "--dtype int8 is unknown; wanted one of: float32, bfloat16, float16"),
        (["--as", "modle"], "--as modle is unknown, did you mean 'model'?; wanted one of: model, difference, adapter"),
        (["--as", "adapter", "--dtype", "float16"], "--dtype float16 is for --as model; --as adapter writes float32"),
        (["--as", "adapter", "--rank", "33"], "--rank 33 is more than any linear module of the model has; wanted at most 32"),
        (["--round", "3"], "has no round 3; wanted --round from 1 to 2"),
    ],
)
def test_what_cannot_be_exported_is_said(
    form: list[str], wanted: str, run: RunResult, out: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = run_command("export", run.folder, "--out", out, *form)
    assert code == 2
    assert err.startswith("fedtune: ")
    assert err.endswith(f"{wanted}\n")
    assert not out.exists()


def test_a_run_with_an_adapter_needs_no_export(make_job: MakeJob, tmp_path: Path) -> None:
    simulate(make_job("rounds.count=1"), tmp_path / "run", Quiet())
    with pytest.raises(UserError, match=r"has published an adapter, which needs no export: load .*adapter with PEFT"):
        export_run(tmp_path / "run", None, Form())


def test_a_folder_without_a_run_or_a_round(make_job: MakeJob, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run folder: it has no job.toml; wanted the folder of a run"):
        export_run(tmp_path, None, Form())
    RunFolder.create(tmp_path / "run", make_job(*SEEDS))
    with pytest.raises(UserError, match="has no finished round yet"):
        export_run(tmp_path / "run", None, Form())


def test_nothing_is_written_over(run: RunResult, out: Path) -> None:
    out.mkdir()
    (out / "thesis").write_text("dear", encoding="utf-8")
    with pytest.raises(UserError, match="exists and is no empty folder; name another"):
        export_run(run.folder, out, Form())
    assert names(out) == {"thesis"}


def test_a_base_that_changed_is_refused(
    make_job: MakeJob, recorded: Callable[[Job], Path], tiny_model: Path, tmp_path: Path, out: Path
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    run = recorded(make_job(*SEEDS, f"model.path={base}"))
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data += 1
    model.save_pretrained(base)
    with pytest.raises(UserError, match=r"base is not the one of this run: its hash is .* put the weights back"):
        export_run(run, out, Form())
    assert not out.exists()


# the comparison


def test_a_comparison_keeps_recipes_and_writes_no_models(job_file: Path, tmp_path: Path) -> None:
    """The model of a cell is exported by whoever wants it."""
    keys = [key for key in SEEDS if not key.startswith("strategy.")]
    [cell] = plan(job_file, ["fedkseed"], 1, [*keys, "rounds.count=1"], tmp_path / "cells").cells
    outcome = play(cell)
    assert (outcome.state, outcome.reason) == ("done", "")
    assert outcome.figures is not None
    assert outcome.figures.loss != outcome.figures.base
    assert {"recipe", "report.html"} <= names(cell.folder)
    assert "model" not in names(cell.folder)
    export_run(cell.folder, None, Form())
    assert (cell.folder / "model" / "model.safetensors").is_file()
