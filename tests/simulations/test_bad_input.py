"""Bad input at the command line: one line that says what was given, what is wanted and what to type; nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fedtune import durable, peft_folder
from fedtune.paths import app_root
from fedtune.peft_folder import read_adapter

Refused = Callable[..., str]
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def complaint(run_command: Callable[..., tuple[int, str, str]]) -> Refused:
    """complaint("simulate", ...): the one line of a command that must end with exit code 2."""

    def run(*words: object) -> str:
        code, _, err = run_command(*words)
        assert code == 2, err
        assert err.startswith("fedtune: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert "Traceback" not in err
        return err

    return run


@pytest.fixture
def refused(complaint: Refused, job_file: Path, tmp_path: Path) -> Refused:
    """refused("train.lr=x"): the complaint about the tiny job with these keys; no run folder may be left."""

    def run(*keys: str, job: Path = job_file) -> str:
        sets = [word for key in keys for word in ("--set", key)]
        said = complaint("simulate", job, "--out", tmp_path / "run", *sets)
        assert not (tmp_path / "run").exists()
        return said

    return run


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(path: Path, *rows: object) -> Path:
    return written(path, "".join(json.dumps(row) + "\n" for row in rows))


# the job file


def test_a_job_file_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    said = refused(job=tmp_path / "no.toml")
    assert f"there is no job file {tmp_path / 'no.toml'}; wanted a TOML file" in said
    assert "fedtune simulate demo" in said


def test_a_job_file_that_is_not_toml(refused: Refused, tmp_path: Path) -> None:
    said = refused(job=written(tmp_path / "job.toml", "seed = 1\nrounds = = 2\n"))
    assert f"{tmp_path / 'job.toml'} is not TOML" in said
    assert "line 2" in said


def test_a_job_file_that_is_a_folder(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "cannot be read" in refused(job=tmp_path / "folder")


def test_an_unknown_key(refused: Refused, tmp_path: Path) -> None:
    said = refused(job=written(tmp_path / "job.toml", "[train]\nlearning_rat = 1\nlr = 1\n"))
    assert "unknown key 'train.learning_rat'" in said
    assert "unknown key 'train.step', did you mean 'train.steps'?" in refused("train.step=3")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("rounds.count=many", "'rounds.count'"),
        ("rounds.count=0", "'rounds.count'"),
        ("train.lr=-1", "'train.lr'"),
        ("adapter=3", "'adapter'"),
        ("compare=perhaps", "'compare'"),
    ],
)
def test_a_value_of_the_wrong_type(key: str, said: str, refused: Refused) -> None:
    complaint = refused(key)
    assert said in complaint
    assert f"given {key.partition('=')[2]!r}" in complaint or f"given {key.partition('=')[2]}" in complaint


def test_a_set_without_a_value(refused: Refused) -> None:
    assert "--set train.lr: wanted key=value, such as --set train.lr=1e-3" in refused("train.lr")


def test_an_unknown_strategy(refused: Refused) -> None:
    said = refused("strategy.name=fedavgg")
    assert "unknown strategy 'fedavgg', did you mean 'fedavg'?" in said
    assert "flora" in said


def test_an_unknown_setting_of_a_strategy(refused: Refused) -> None:
    said = refused("strategy.name=flora", "strategy.max_rnak=3")
    assert "strategy 'flora' has no setting 'max_rnak', did you mean 'max_rank'?" in said


# the data


def test_data_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    said = refused(f"data.path={tmp_path / 'no'}")
    assert f"data.path = '{tmp_path / 'no'}' does not exist; wanted a folder with a file per client, one file, or" in said


def test_an_empty_data_file(refused: Refused, tmp_path: Path) -> None:
    path = written(tmp_path / "ann.jsonl", "")
    assert f"{path} is empty; wanted at least one row" in refused(f"data.path={path}")


def test_a_malformed_line(refused: Refused, tmp_path: Path) -> None:
    path = written(tmp_path / "ann.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": "c"\n')
    said = refused(f"data.path={path}")
    assert f"{path}, line 3: not JSON" in said
    assert 'wanted one JSON object per line, such as {"text": "…"}' in said


def test_data_without_the_needed_column(refused: Refused, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "ann.jsonl", {"body": "the cat", "title": "x"})
    said = refused(f"data.path={path}")
    assert f"{path} has the columns body, title; for model.task = 'causal' wanted one of: messages; prompt + completion" in said


def test_labels_are_needed_for_classes(refused: Refused, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "ann.jsonl", {"text": "the cat"})
    said = refused(f"data.path={path}", "model.task=classification")
    assert "has the columns text; for model.task = 'classification' wanted one of: text + label" in said


def test_all_labels_masked(refused: Refused, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "ann.jsonl", *[{"prompt": "the cat sat " * 20, "completion": "x"}] * 3)
    said = refused(f"data.path={path}", "data.max_length=16")
    assert f"{path}: nothing is left to learn from. The loss is on the completion" in said
    assert "type --set data.max_length=32" in said


def test_fewer_clients_than_asked_for(refused: Refused) -> None:
    said = refused("clients.count=4")
    assert "clients.count = 4, but there are 3 clients (ann, bob, cy)" in said
    assert "type --set clients.count=3, or add data" in said


def test_a_client_that_is_not_in_the_data(refused: Refused) -> None:
    assert "there is no client 'bop'" in refused("clients.names=['ann', 'bop']")


def test_a_strategy_that_cannot_work_with_these_clients(refused: Refused) -> None:
    said = refused("clients.ranks.ann=2")
    assert "needs one rank for all clients, given {'ann': 2, 'bob': 4, 'cy': 4}" in said
    assert "--set strategy.name=flora" in said


# the model


def test_a_model_folder_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    said = refused(f"model.path={tmp_path / 'no'}")
    assert f"there is no model folder {tmp_path / 'no'}; wanted a folder, a hub id (owner/name) or builtin:stdlib" in said


def test_a_folder_that_is_no_model(refused: Refused, tmp_path: Path) -> None:
    assert "holds no config.json; wanted a folder written by save_pretrained" in refused(f"model.path={tmp_path}")


@pytest.fixture
def model_without(tiny_model: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copy(pattern: str) -> Path:
        return Path(shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns(pattern)))

    return copy


def test_a_model_without_a_tokenizer(model_without: Callable[[str], Path], refused: Refused) -> None:
    folder = model_without("tokenizer*")
    said = refused(f"model.path={folder}")
    assert f"the model folder {folder} has no tokenizer; wanted tokenizer.json" in said
    assert "tokenizer.save_pretrained" in said


def test_a_model_without_weights(model_without: Callable[[str], Path], refused: Refused) -> None:
    assert "holds no *.safetensors; convert the weights with save_pretrained" in refused(
        f"model.path={model_without('*.safetensors')}"
    )


def test_weights_that_are_cut_off(model_without: Callable[[str], Path], refused: Refused) -> None:
    file = model_without("nothing") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert f"the model in {file.parent} cannot be loaded" in refused(f"model.path={file.parent}")


def test_weights_of_which_some_are_missing(model_without: Callable[[str], Path], refused: Refused) -> None:
    file = model_without("nothing") / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert f"{file.parent} lacks weights of the model: model.norm.weight" in refused(f"model.path={file.parent}")


def test_a_comparison_of_clients_with_one_row_each(refused: Refused, tmp_path: Path) -> None:
    """A single row is trained on, so nothing is held out."""
    data = tmp_path / "single"
    data.mkdir()
    for client in ("ann", "bob"):
        jsonl(data / f"{client}.jsonl", {"text": "a row of text"})
    said = refused("compare=true", f"data.path={data}", "clients.count=2")
    assert "compare = true measures on held-out examples, and no client has any" in said


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_of_the_model_that_is_no_json(name: str, model_without: Callable[[str], Path], refused: Refused) -> None:
    folder = model_without("nothing")
    written(folder / name, "{")
    assert f"{folder} cannot be read" in refused(f"model.path={folder}")


def test_targets_that_match_nothing(refused: Refused) -> None:
    said = refused("adapter.targets=q_porj")
    assert "adapter.targets = 'q_porj' matches no module of the model, did you mean 'q_proj'?" in said
    assert "down_proj, gate_proj, k_proj" in said
    assert "type --set adapter.targets=all-linear" in said


@pytest.mark.parametrize("key", ["adapter.rank=33", "clients.ranks.bob=33"])
def test_a_rank_larger_than_the_matrix(key: str, refused: Refused) -> None:
    """k_proj of the tiny model is 16 x 32."""
    said = refused(key)
    assert "rank 33 is larger than 'model.layers.0." in said
    assert "--set adapter.rank=" in said


def test_a_device_that_torch_does_not_know(refused: Refused) -> None:
    assert "machine.device = 'gpu'" in refused("machine.device=gpu")


# the run folder


def held(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def finished(run_command: Callable[..., tuple[int, str, str]], job_file: Path, tmp_path: Path) -> Path:
    """A run folder with a run of one round."""
    words = ("--set", "rounds.count=1", "--set", "train.steps=1")
    assert run_command("simulate", job_file, "--out", tmp_path / "run", *words)[0] == 0
    return tmp_path / "run"


def test_a_folder_that_already_holds_a_run(complaint: Refused, finished: Path, job_file: Path) -> None:
    before = held(finished)
    said = complaint("simulate", job_file, "--out", finished)
    assert f"{finished} already holds a run; go on with it: --resume, or name another folder: --out {finished}-2" in said
    assert held(finished) == before


@pytest.mark.parametrize("words", [[], ["--overwrite"]])
def test_a_folder_that_holds_something_else(words: list[str], complaint: Refused, job_file: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    written(thesis / "chapter", "dear")
    said = complaint("simulate", job_file, "--out", thesis, *words)
    assert str(thesis) in said
    assert "--out" in said
    assert held(thesis) == {"chapter": b"dear"}


@pytest.mark.parametrize("key", ["data.path=/nowhere/at/all", "adapter.rank=33", "train.step=1", "model.path=./no"])
def test_overwrite_loses_no_run_to_a_bad_job(key: str, complaint: Refused, finished: Path, job_file: Path) -> None:
    before = held(finished)
    complaint("simulate", job_file, "--out", finished, "--overwrite", "--set", key)
    assert held(finished) == before
    assert [path.name for path in finished.parent.iterdir()] == ["run"]


def raising(*_: object, **__: object) -> None:
    raise FULL


def test_a_disk_that_is_full_from_the_start(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "write", raising)
    said = refused()
    assert "no space left on the disk of" in said
    assert "bytes free): make room, then go on with --resume" in said


def test_a_disk_that_fills_up_keeps_the_rounds_before(
    complaint: Refused, job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds, save = [], peft_folder.save

    def until_full(*args: object, **named: object) -> bytes:
        rounds.append(1)
        if len(rounds) == 2:
            raise FULL
        return save(*args, **named)

    monkeypatch.setattr(peft_folder, "save", until_full)
    said = complaint("simulate", job_file, "--out", tmp_path / "run")
    assert "no space left on the disk of" in said
    assert os.readlink(tmp_path / "run" / "adapter") == "rounds/0001/adapter"
    read_adapter(tmp_path / "run" / "adapter")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    for_resuming = {"journal.jsonl", "lock", "spool", "state"}
    assert left == {"adapter", "events", "job.toml", "metrics.jsonl", "rounds"} | for_resuming
    assert [path.name for path in (tmp_path / "run" / "rounds").iterdir()] == ["0001"]


def test_a_report_of_no_run(complaint: Refused, tmp_path: Path) -> None:
    said = complaint("report", tmp_path)
    assert f"{tmp_path} is no run folder" in said
    assert "fedtune report runs/demo" in said


@pytest.mark.slow
def test_the_exit_code_and_the_line_of_a_real_process(job_file: Path, tmp_path: Path) -> None:
    words = ("simulate", str(job_file), "--out", str(tmp_path / "run"), "--set", "clients.count=4")
    done = subprocess.run(
        [sys.executable, "-m", "fedtune.cli", *words], cwd=app_root(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fedtune: clients.count = 4, but there are 3 clients")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
