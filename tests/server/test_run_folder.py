"""The run folder: never over something else, and at every moment its link to what is published leads to a whole one."""

from __future__ import annotations

import errno
import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from fedtune import model_folder, peft_folder, recipe_file, weights_file
from fedtune.adapter import Adapter, Factors
from fedtune.base import Blueprint, blueprint
from fedtune.changed_weights import ChangedWeights
from fedtune.directions import Directions
from fedtune.errors import RunFolderError
from fedtune.job import Job, checked_job
from fedtune.peft_folder import read_adapter
from fedtune.recipe import Recipe
from fedtune.recipe_file import read_recipe
from fedtune.weights_file import read_weights
from server import run_folder
from server.records import ClientRecord, Comparison, RoundRecord
from server.run_folder import RunFolder, require_free

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def job(make_job: Callable[..., Job]) -> Job:
    return make_job()


@pytest.fixture
def plan(job: Job) -> Blueprint:
    return blueprint(job)


@pytest.fixture
def publish(tmp_path: Path, job: Job, plan: Blueprint) -> Callable[[int], RunFolder]:
    """publish(2): the run folder with the adapter of round 2 in it, whose every number is 2."""
    run = RunFolder.create(tmp_path / "run", job)

    def _publish(round: int) -> RunFolder:
        run.publish(round, filled(plan.adapter, float(round)), job, plan, {"round": round, "base": "b"})
        return run

    return _publish


@pytest.fixture
def publish_recipe(tmp_path: Path, job: Job, plan: Blueprint) -> Callable[[int], RunFolder]:
    """publish_recipe(2): the run folder with the recipe of round 2 in it, which has two parts."""
    run = RunFolder.create(tmp_path / "run", job)

    def _publish(round: int) -> RunFolder:
        run.publish(round, steps(round), job, plan, {"round": round, "base": "b"})
        return run

    return _publish


@pytest.fixture
def publish_weights(tmp_path: Path, job: Job, plan: Blueprint) -> Callable[[int], RunFolder]:
    """publish_weights(2): the run folder with the weights of round 2 in it, whose every number is 2."""
    run = RunFolder.create(tmp_path / "run", job)

    def _publish(round: int) -> RunFolder:
        values = {"model.norm.weight": torch.full((32,), float(round))}
        run.publish(round, ChangedWeights(values, "b"), job, plan, {"round": round, "base": "b"})
        run.prune(round, job.rounds.keep)
        return run

    return _publish


def steps(round: int) -> Recipe:
    return Recipe(tuple(Directions(7).sum({number: 0.5}) for number in range(round)))


def filled(like: Adapter, value: float) -> Adapter:
    pairs = {path: Factors(torch.full_like(p.A, value), torch.full_like(p.B, value), p.scale) for path, p in like.lora.items()}
    return Adapter(pairs, base=like.base)


def value_of(adapter: Path) -> float:
    numbers = {float(x) for pair in read_adapter(adapter).lora.values() for x in (*pair.A.unique(), *pair.B.unique())}
    assert len(numbers) == 1
    return numbers.pop()


def raising(error: BaseException) -> Callable[..., None]:
    def fails(*_: object, **__: object) -> None:
        raise error

    return fails


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_the_job_is_written_so_that_it_can_be_run_again(tmp_path: Path, job: Job) -> None:
    run = RunFolder.create(tmp_path / "a" / "run", job)
    assert checked_job(tomllib.loads((run.path / "job.toml").read_text(encoding="utf-8")), "it") == job


def test_a_run_is_never_written_over(tmp_path: Path, job: Job) -> None:
    RunFolder.create(tmp_path / "run", job)
    with pytest.raises(RunFolderError, match=r"already holds a run; go on with it: --resume, or .* folder: --out .*run-2"):
        RunFolder.create(tmp_path / "run", job)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_run_is_never_written_over(kind: str, tmp_path: Path, job: Job) -> None:
    place = tmp_path / "thesis"
    (place if kind == "file" else place / "chapter").parent.mkdir(exist_ok=True)
    (place if kind == "file" else place / "chapter").write_text("dear", encoding="utf-8")
    with pytest.raises(RunFolderError, match="exists and is no empty folder; name another: --out"):
        RunFolder.create(place, job)
    assert (place if kind == "file" else place / "chapter").read_text(encoding="utf-8") == "dear"


def test_an_empty_folder_will_do(tmp_path: Path, job: Job) -> None:
    require_free(tmp_path)
    RunFolder.create(tmp_path, job)


def test_the_adapter_is_the_last_round_s_and_every_round_s_is_kept(publish: Callable[[int], RunFolder]) -> None:
    for round in (1, 2):
        run = publish(round)
    assert value_of(run.adapter) == 2
    assert [value_of(run.path / "rounds" / f"{round:04d}" / "adapter") for round in (1, 2)] == [1, 2]


def test_the_link_is_relative_so_that_a_run_can_be_moved(publish: Callable[[int], RunFolder], tmp_path: Path) -> None:
    run = publish(7)
    assert os.readlink(run.adapter) == "rounds/0007/adapter"
    run.path.rename(tmp_path / "moved")
    assert value_of(tmp_path / "moved" / "adapter") == 7


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), RuntimeError("torch")])
@pytest.mark.parametrize("where", ["save", "_card", "os.replace", "symlink"])
def test_a_round_that_cannot_be_published_leaves_the_one_before(
    where: str, error: BaseException, publish: Callable[[int], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = publish(1)
    with monkeypatch.context() as patch:
        if where == "os.replace":
            patch.setattr(os, "replace", raising(error))
        elif where == "symlink":
            patch.setattr(Path, "symlink_to", raising(error))
        else:
            patch.setattr(peft_folder, where, raising(error))
        with pytest.raises((RunFolderError, KeyboardInterrupt, RuntimeError)):
            publish(2)
    assert value_of(run.adapter) == 1
    assert not [name for name in names(run.path) if "writing" in name]
    assert value_of(publish(2).adapter) == 2


def test_a_recipe_is_published_in_place_of_an_adapter(publish_recipe: Callable[[int], RunFolder], job: Job) -> None:
    for round in (1, 2):
        run = publish_recipe(round)
    assert os.readlink(run.recipe) == "rounds/0002/recipe"
    provenance = {"round": 2, "base": "b", "published": "recipe", "lr": job.train.lr}
    assert read_recipe(run.recipe) == (steps(2), provenance)
    assert read_recipe(run.path / "rounds" / "0001" / "recipe")[0] == steps(1)
    assert {path.name for path in (run.path / "rounds" / "0001" / "recipe").iterdir()} == {"recipe.safetensors", "fedtune.json"}
    assert not run.adapter.exists()


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["save", "os.replace", "symlink"])
def test_a_recipe_that_cannot_be_published_leaves_the_one_before(
    where: str, error: BaseException, publish_recipe: Callable[[int], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = publish_recipe(1)
    places = {"save": (recipe_file, "save"), "os.replace": (os, "replace"), "symlink": (Path, "symlink_to")}
    with monkeypatch.context() as patch:
        patch.setattr(*places[where], raising(error))
        with pytest.raises((RunFolderError, KeyboardInterrupt)):
            publish_recipe(2)
    assert read_recipe(run.recipe)[0] == steps(1)
    assert not [name for name in names(run.path) if "writing" in name]
    assert read_recipe(publish_recipe(2).recipe)[0] == steps(2)


def test_the_model_is_that_of_the_last_recipe(publish_recipe: Callable[[int], RunFolder], job: Job, plan: Blueprint) -> None:
    publish_recipe(1)
    run = publish_recipe(2)
    run.write_model(job, plan)
    about = json.loads((run.model / "fedtune.json").read_text(encoding="utf-8"))
    assert (about["round"], about["published"]) == (2, "model")


def test_a_model_that_finds_no_room_can_be_exported_elsewhere(
    publish_recipe: Callable[[int], RunFolder], job: Job, plan: Blueprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = publish_recipe(1)
    monkeypatch.setattr(model_folder, "_save", raising(FULL))
    with pytest.raises(RunFolderError, match=r"no space left .* for the model type: fedtune export .*run --out FOLDER"):
        run.write_model(job, plan)
    assert not [name for name in names(run.path) if "model" in name]
    assert read_recipe(run.recipe)[0] == steps(1)


def rounds_kept(run: RunFolder) -> list[str]:
    return sorted(path.relative_to(run.path).as_posix() for path in run.path.glob("rounds/*/*"))


def numbers_in(run: RunFolder) -> set[float]:
    return {float(number) for tensor in read_weights(run.weights)[0].values.values() for number in tensor.unique()}


def test_of_weights_the_last_round_s_alone_are_kept(publish_weights: Callable[[int], RunFolder], job: Job) -> None:
    for round in (1, 2, 3):
        run = publish_weights(round)
        assert os.readlink(run.weights) == f"rounds/{round:04d}/weights"
        assert names(run.path / "rounds") == {f"{round:04d}", f"{round:04d}/weights"} | {
            f"{round:04d}/weights/{file}" for file in ("weights.safetensors", "fedtune.json", "README.md")
        }
        assert numbers_in(run) == {round}
    provenance = {"round": 3, "base": "b", "published": "weights", "lr": job.train.lr}
    assert read_weights(run.weights)[1] == provenance
    assert not run.adapter.exists()


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["save", "os.replace", "symlink"])
def test_weights_that_cannot_be_published_leave_those_before(
    where: str, error: BaseException, publish_weights: Callable[[int], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = publish_weights(1)
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    saved = full if error is FULL else error
    places = {"save": (weights_file, "save_file"), "os.replace": (os, "replace"), "symlink": (Path, "symlink_to")}
    with monkeypatch.context() as patch:
        patch.setattr(*places[where], raising(saved if where == "save" else error))
        with pytest.raises((RunFolderError, KeyboardInterrupt), match="no space left on the disk" if error is FULL else None):
            publish_weights(2)
    assert numbers_in(run) == {1}
    assert not [name for name in names(run.path) if "writing" in name]
    assert numbers_in(publish_weights(2)) == {2}
    assert rounds_kept(run) == ["rounds/0002/weights"]


def test_a_crash_before_the_old_weights_go_loses_nothing(
    publish_weights: Callable[[int], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a disk that does not let them go does not end the run."""
    run = publish_weights(1)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_drop_weights_but", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            publish_weights(2)
    assert numbers_in(run) == {2}
    assert rounds_kept(run) == ["rounds/0001/weights", "rounds/0002/weights"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", raising(PermissionError()))
        assert numbers_in(publish_weights(3)) == {3}
    publish_weights(4)
    assert rounds_kept(run) == ["rounds/0004/weights"]


def test_a_new_head_that_nobody_has_trained_yet_is_among_the_weights(make_job: Callable[..., Job], tmp_path: Path) -> None:
    """Stock transformers would draw another."""
    job = make_job("model.task=classification", "model.labels=3")
    plan, run = blueprint(job), RunFolder.create(tmp_path / "run", job)
    run.publish(1, ChangedWeights({}, "b"), job, plan, {"base": "b"})
    assert torch.equal(read_weights(run.weights)[0].values["score.weight"], plan.adapter.dense["score.weight"])
    trained = torch.full((3, 32), 2.0)
    run.publish(2, ChangedWeights({"score.weight": trained}, "b"), job, plan, {"base": "b"})
    assert torch.equal(read_weights(run.weights)[0].values["score.weight"], trained)


def test_a_full_disk_is_said_with_what_is_free(publish: Callable[[int], RunFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    publish(1)
    monkeypatch.setattr(Path, "write_bytes", raising(FULL))
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=1234))
    with pytest.raises(
        RunFolderError, match=r"no space left on the disk of .*run \(1,234 bytes free\): make room, then go on with --resume"
    ):
        publish(2)


def test_a_full_disk_at_the_start_leaves_no_folder(tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("run", "empty"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", raising(FULL))
            with pytest.raises(RunFolderError, match="no space left"):
                RunFolder.create(tmp_path / folder, job)
    assert names(tmp_path) == {"empty"}
    RunFolder.create(tmp_path / "run", job)


def test_a_disk_that_fills_up_while_a_line_is_logged(
    publish: Callable[[int], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = publish(1)
    monkeypatch.setattr(os, "fsync", raising(FULL))
    with pytest.raises(RunFolderError, match="no space left"):
        run.log(RoundRecord(1))
    assert value_of(run.adapter) == 1


def test_a_folder_that_may_not_be_written_is_said(tmp_path: Path, job: Job) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"cannot be written: .*name another folder with --out"):
        RunFolder.create(tmp_path / "file" / "run", job)


def test_every_round_is_one_line(publish: Callable[[int], RunFolder]) -> None:
    run = publish(1)
    records = [RoundRecord(n, 1.5, {"perplexity": 4.5}, 0.1, {"Zoë\n": ClientRecord(failed="no")}) for n in (0, 1)]
    for record in records:
        run.log(record)
    lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [RoundRecord.from_json(json.loads(line)) for line in lines] == records


def test_the_comparison_is_written(publish: Callable[[int], RunFolder]) -> None:
    run, comparison = publish(1), Comparison(4.0, {"ann": 3.9}, 3.5, 3.4, {"base": 0.5})
    run.compared(comparison)
    assert json.loads((run.path / "comparison.json").read_text(encoding="utf-8")) == comparison.as_json()
