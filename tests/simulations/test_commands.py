"""The command line where all goes well: what it runs, says and leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedtune import __version__
from fedtune.errors import RoundFailed
from fedtune.paths import app_root
from fedtune.peft_folder import read_adapter
from simulations.guard import REMOVE
from strategies.fedavg import FedAvg

FOR_RESUMING = {"journal.jsonl", "lock", "state"}
SMALL = ("--set", "rounds.count=1", "--set", "train.steps=1")


@pytest.fixture
def fedtune(run_command: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """fedtune("simulate", ...): what the command prints, which must end well and without a complaint."""

    def run(*words: object) -> str:
        code, out, err = run_command(*words)
        assert (code, err) == (0, "")
        return out

    return run


def test_the_version(fedtune: Callable[..., str]) -> None:
    assert fedtune("--version") == f"fedtune {__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("repor", "No such command 'repor'.*; `fedtune --help` shows"),
        ("report", "Missing argument 'FOLDER'; `fedtune report --help` shows"),
        ("keys revok", "No such command 'revok'.*; `fedtune keys --help` shows"),
        ("status --dirr x", "No such option.* '?--dirr.*; `fedtune status --help` shows"),
    ],
)
def test_what_is_mistyped_is_answered_with_one_line(
    words: str, said: str, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    """What it was meant to be is guessed by the library, in its own words."""
    code, out, error = run_command(*words.split())
    assert (code, out) == (2, "")
    assert re.fullmatch(f"fedtune: {said} what there is\n", error)


def test_without_words_the_help_is_shown(run_command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, error = run_command()
    assert (code in (0, 2), "Usage: fedtune" in out + error) == (True, True)


def test_an_error_with_words_of_strangers_is_one_line_without_control_characters(
    run_command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*given: object, **more: object) -> None:
        raise RoundFailed("north says: \x1b[2J\x9b1A\rdone\n\u202e" + "x" * 5000)

    monkeypatch.setattr("fedtune.paths.job_file", failing)
    monkeypatch.setattr("simulations.commands.job_file", failing)
    code, _, said = run_command("simulate", "demo")
    assert (code, said.count("\n"), len(said)) == (1, 1, len("fedtune: ") + 2000 + 1)
    assert said.startswith("fedtune: north says: ?[2J?1A done ?xxx")
    assert said.rstrip("\n").isprintable()


def test_the_strategies_and_their_settings(fedtune: Callable[..., str]) -> None:
    listed = " ".join(fedtune("strategies").split())
    assert all(name in listed for name in ("fedavg", "ffa_lora", "flora"))
    assert "max_rank (64)" in listed


def test_a_simulation_leaves_a_run_that_can_be_reported_again(
    fedtune: Callable[..., str], job_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    said = fedtune("simulate", job_file, "--out", run, *SMALL, "--set", "compare=true")
    assert f"adapter: {run / 'adapter'}, loaded with:" in said
    loaded: dict[str, object] = {}
    exec(said.partition("loaded with:")[2], loaded)  # the three lines
    assert type(loaded["model"]).__name__ == "PeftModelForCausalLM"
    files = {"adapter", "comparison.json", "events", "job.toml", "metrics.jsonl", "report.html", "rounds"}
    assert {path.name for path in run.iterdir()} == files | FOR_RESUMING
    written = tomllib.loads((run / "job.toml").read_text(encoding="utf-8"))
    assert (written["rounds"]["count"], written["train"]["steps"], written["compare"]) == (1, 1, True)
    before = (run / "report.html").read_text(encoding="utf-8")
    (run / "report.html").unlink()
    assert str(run / "report.html") in fedtune("report", run)
    assert (run / "report.html").read_text(encoding="utf-8") == before


def test_a_whole_model_is_trained_loaded_and_reported(fedtune: Callable[..., str], job_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    keys = ("strategy.name=fedkseed", "strategy.K=64", "train.optimizer=sgd", "train.clip=0", "train.lr=1e-5", "compare=false")
    said = fedtune("simulate", job_file, "--out", run, *SMALL, *(word for key in keys for word in ("--set", key)))
    assert f"model:   {run / 'model'}, loaded with:" in said
    loaded: dict[str, object] = {}
    exec(said.partition("loaded with:")[2], loaded)  # the three lines
    assert type(loaded["model"]).__name__ == "LlamaForCausalLM"
    files = {"recipe", "model", "events", "job.toml", "metrics.jsonl", "report.html", "rounds"}
    assert {path.name for path in run.iterdir()} == files | FOR_RESUMING
    assert "Load the model" in (run / "report.html").read_text(encoding="utf-8")


def test_without_out_the_run_is_named_after_the_job(
    fedtune: Callable[..., str], job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fedtune("simulate", job_file, *SMALL, "--set", "name=mine")
    assert (tmp_path / "runs" / "mine" / "adapter").is_dir()


def test_set_reaches_the_strategy(fedtune: Callable[..., str], job_file: Path, tmp_path: Path) -> None:
    keys = ("--set", "strategy.name=flora", "--set", "strategy.max_rank=3", "--set", "rounds.count=2")
    fedtune("simulate", job_file, "--out", tmp_path / "run", *SMALL, *keys)
    assert max(read_adapter(tmp_path / "run" / "adapter").ranks.values()) == 3


def test_overwrite_replaces_a_run(fedtune: Callable[..., str], job_file: Path, tmp_path: Path) -> None:
    for steps in (1, 2):
        words = ("simulate", job_file, "--out", tmp_path / "run", *SMALL, "--set", f"train.steps={steps}", "--overwrite")
        fedtune(*words)
        written = tomllib.loads((tmp_path / "run" / "job.toml").read_text(encoding="utf-8"))
        assert written["train"]["steps"] == steps
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_conversations_are_learnt_from_a_folder_of_files(
    fedtune: Callable[..., str], job_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for client in ("ann", "bob"):
        turns = [
            [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": f"sat on mat {n} of {client}"}]
            for n in range(4)
        ]
        (tmp_path / "data").mkdir(exist_ok=True)
        lines = "".join(json.dumps({"messages": messages}) + "\n" for messages in turns)
        (tmp_path / "data" / f"{client}.jsonl").write_text(lines, encoding="utf-8")
    fedtune("simulate", job_file, "--out", tmp_path / "run", *SMALL, "--set", f"data.path={tmp_path / 'data'}")
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert list(record["clients"]) == ["ann", "bob"]
    assert record["loss"] > 0
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path / "run" / "adapter"))


def test_classes_are_learnt_from_one_file_of_many_clients(
    fedtune: Callable[..., str], job_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """cat or dog, by the one word that differs."""
    lines = [
        f"{client},{label},the {label} sat on the {place} {n}"
        for client in ("ann", "bob")
        for label in ("cat", "dog")
        for place in ("mat", "log")
        for n in range(4)
    ]
    (tmp_path / "pets.csv").write_text("\n".join(["who,label,text", *lines]), encoding="utf-8")
    keys = (f"data.path={tmp_path / 'pets.csv'}", "data.client_column=who", "model.task=classification")
    more = ("rounds.count=3", "train.steps=20", "train.batch=8")
    sets = [word for key in (*keys, *more) for word in ("--set", key)]
    fedtune("simulate", job_file, "--out", tmp_path / "run", *sets)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["metrics"]["accuracy"] == 1.0
    assert "perplexity" not in json.loads(lines[-1])["metrics"]
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    head = read_adapter(tmp_path / "run" / "adapter").dense["score.weight"]
    assert loaded.base_model.model.score.modules_to_save["default"].weight.equal(head)


def test_a_plug_in_outside_of_the_repository(fedtune: Callable[..., str], job_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom strategies.fedavg import FedAvg\n\n\n"
        "@dataclass(frozen=True)\nclass Mine(FedAvg):\n    name = 'mine'\n    strength: float = 1.0\n",
        encoding="utf-8",
    )
    keys = ("--set", f"strategy.name={tmp_path / 'mine.py'}:Mine", "--set", "strategy.strength=0.5")
    fedtune("simulate", job_file, "--out", tmp_path / "run", *SMALL, *keys)
    provenance = json.loads((tmp_path / "run" / "adapter" / "fedtune.json").read_text(encoding="utf-8"))
    assert provenance["strategy"]["strength"] == 0.5


def test_ctrl_c_ends_in_one_line_and_keeps_the_rounds(
    run_command: Callable[..., tuple[int, str, str]], job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sixth training is the last of round 2."""
    calls, whole = [], FedAvg.answer

    def answer(*args: object) -> object:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(FedAvg, "answer", answer)
    code, _, err = run_command("simulate", job_file, "--out", tmp_path / "run")
    assert code == 130
    assert err == f"fedtune: stopped; the run in {tmp_path / 'run'} goes on with --resume\n"
    assert os.readlink(tmp_path / "run" / "adapter") == "rounds/0001/adapter"
    read_adapter(tmp_path / "run" / "adapter")


def test_a_mistyped_folder_is_noticed_when_a_run_is_to_go_on(
    fedtune: Callable[..., str], job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.commands._run", lambda *given: None)
    monkeypatch.setattr("server.commands.say_where", lambda folder: None)
    run, begins = tmp_path / "run", f"no run in {tmp_path / 'run'}: it begins\n"
    assert begins in fedtune("simulate", job_file, "--out", run, "--resume")
    run.mkdir(exist_ok=True)
    (run / "job.toml").touch()
    assert begins not in fedtune("simulate", job_file, "--out", run, "--resume")


KILLED = """
import sys, time
from pathlib import Path
from fedtune.processes import Processes
from simulations.guard import REMOVE, guarded
place = Path(sys.argv[1])
with guarded(place, *sys.argv[2:]), Processes(place / "server") as server, Processes(place / "clients") as clients:
    for processes in (server, clients):
        print(processes.start("one", [sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("options", [[], [REMOVE]])
def test_what_up_has_started_ends_also_where_it_is_killed(options: list[str], tmp_path: Path) -> None:
    """Keys go with it, where its folder was a temporary one."""
    place = tmp_path / "place"
    (place / "keys").mkdir(parents=True)
    command = [sys.executable, "-c", KILLED, str(place), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=app_root()) as up:
        assert up.stdout is not None
        started = [psutil.Process(int(up.stdout.readline())) for _ in range(2)]
        [guard] = [child for child in psutil.Process(up.pid).children() if child not in started]
        up.kill()
        assert psutil.wait_procs([*started, guard], timeout=30)[1] == []
    assert place.exists() is not bool(options)


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own(job_file: Path, tmp_path: Path) -> None:
    """The signal itself, sent once the first round is done."""
    words = ("simulate", job_file, "--out", tmp_path / "run", "--set", "rounds.count=100000")
    # A shell starts what it puts into the background with SIGINT ignored, and that is inherited: a terminal does not.
    as_a_terminal = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import fedtune.cli as c; c.main()"
    command = [sys.executable, "-c", as_a_terminal, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=app_root(), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as it:
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / "run" / "adapter").exists() and it.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            it.send_signal(signal.SIGINT)
            _, err = it.communicate(timeout=60)
        finally:
            it.kill()
    assert it.returncode == 130
    assert re.fullmatch(r"fedtune: stopped; .*\n", err)
    read_adapter(tmp_path / "run" / "adapter")
    assert not list((tmp_path / "run").rglob("*writing*"))
