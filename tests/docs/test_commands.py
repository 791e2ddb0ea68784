"""Every command and every line of Python in the README and docs/ works: the cheap ones are run, small; of the others it is
checked that they exist. A new kind of command fails here until a rule says how it is tested."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtune.job import load_job
from simulations.commands import SCENARIOS, Engine, app
from simulations.sweep import plan
from tests.docs import test_deploy_page as deploy_page

ROOT = Path(__file__).parents[2]
# docs/write-a-strategy.md has a test of its own.
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(
        f"docs/{name}.md"
        for name in (
            *("architecture", "decisions", "job", "compression", "choosing-a-strategy", "seeds", "selective-layers"),
            *("deploy", "security", "rounds", "reliability"),
        )
    ),
)
SMALL = ("rounds.count=1", "train.steps=1", "clients.count=2", "data.max_held_out=2", "data.max_length=32", "compare=false")
OFFLINE = ("model.path=builtin:stdlib",)
ROWS = '{"prompt": "Summarise: the cat sat.", "completion": " A cat."}\n' * 4
METHOD = "from strategies.fedavg import FedAvg\n\n\nclass MyMethod(FedAvg):\n    pass\n"


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    return sorted({shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))})


def fedtune(*words: str) -> str:
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def simulate(*words: str, out: str) -> None:
    small = [word for setting in (*SMALL, *OFFLINE) for word in ("--set", setting)]
    fedtune("simulate", *words, *small, "--out", out)


def load_fleet(folder: Path, text: str) -> None:
    """The README's fleet: north affords twice the rank and alpha, and so the same scale."""
    (folder / "fleet.toml").write_text(text, encoding="utf-8")
    job = load_job(folder / "fleet.toml", ["strategy=flora"])
    assert [(job.rank_of(client), job.alpha_of(client)) for client in ("north", "south", "else")] == [(16, 32), (4, 8), (8, 16)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that the reader is in: the data and job of the README's example, the runs that it speaks of, plug-ins."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "notes").mkdir()
    for client in ("north", "south"):
        (folder / "notes" / f"{client}.jsonl").write_text(ROWS, encoding="utf-8")
    fleet, job = blocks("README.md", "toml")
    load_fleet(folder, fleet)
    (folder / "notes.toml").write_text(job, encoding="utf-8")
    (folder / "path/to").mkdir(parents=True)
    (folder / "path/to/my_method.py").write_text(METHOD, encoding="utf-8")
    (folder / "sign.py").write_text(blocks("docs/compression.md", "python")[0], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        simulate("demo", out="runs/demo")
        simulate("notes.toml", out="runs/notes")
        simulate("seeds", out="runs/seeds")
        yield folder


@pytest.mark.parametrize("command", commands())
def test_command(command: str, workspace: Path, tmp_path: Path) -> None:
    match shlex.split(command):
        case ["fedtune", "simulate", job, "--engine", engine]:  # run by test_flower_engine.py
            assert engine in list(Engine)
            assert (ROOT / "simulations" / "scenarios" / f"{job}.toml").is_file()
        case ["fedtune", "simulate", *words]:
            simulate(*words, out=str(tmp_path / "run"))
            published = [
                tmp_path / "run" / file
                for file in ("adapter/adapter_model.safetensors", "model/model.safetensors", "weights/weights.safetensors")
            ]
            assert sum(file.is_file() for file in published) == 1
        case ["fedtune", "compare", scenario, *words]:  # played by test_sweep.py
            names = words[words.index("--strategies") + 1].split(",") if "--strategies" in words else []
            planned = plan(SCENARIOS / f"{scenario}.toml", names, 1, [], tmp_path)
            assert not planned.impossible
        case ["fedtune", "up" | "keys" | "server" | "client" | "doctor" | "status" | "logs" | "stop", *_]:
            assert command in deploy_page.commands()  # played there, in its order
        case ["fedtune", "strategies", "--job", job]:  # run by test_strategies_command.py
            assert job == "demo"
        case ["fedtune", *words]:
            assert fedtune(*words)
        case ["make", *words]:
            subprocess.run(["make", "-n", *words, f"PYTHON={sys.executable}"], cwd=ROOT, check=True, capture_output=True)
        case ["python", "docs/picture.py", run]:
            assert runpy.run_path(str(ROOT / "docs/picture.py"))["picture"](Path(run)).startswith("<svg")
        case ["pip", "install", *words]:
            assert extras_of(words[-1]) <= extras_declared()
        case ["ruff" | "tensorboard" as program, *_]:
            assert shutil.which(program, path=str(Path(sys.executable).parent))
        case ["python3", "-m", "venv", ".venv"] | [".", ".venv/bin/activate"]:
            pass
        case _:
            pytest.fail(f"no rule says how to test: {command}")


def extras_of(requirement: str) -> set[str]:
    """`.[dev,ray]` -> dev, ray."""
    return set(requirement.partition("[")[2].removesuffix("]").split(","))


def extras_declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["optional-dependencies"])


@pytest.mark.parametrize("code", blocks("README.md", "python"))
def test_python_of_the_readme(code: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})
    assert "def read(self, path):" in capsys.readouterr().out


def test_a_run_s_job_can_be_given_again(workspace: Path) -> None:
    """As docs/job.md says."""
    job = load_job(Path("runs/notes/job.toml"))
    assert (job.strategy.name, job.strategy.settings, job.adapter.rank) == ("flora", {"max_rank": 64}, 16)


def test_links_lead_somewhere() -> None:
    links = {(page, link) for page in PAGES for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8"))}
    local = {(page, link) for page, link in links if not link.startswith("https://")}
    assert local
    assert sorted(link for page, link in local if not ((ROOT / page).parent / link).exists()) == []


def test_files_that_the_pages_name_exist() -> None:
    named = {
        (page, file) for page in PAGES for file in re.findall(r"`([\w.]+/[\w./]+\.\w+)`", (ROOT / page).read_text("utf-8"))
    }
    assert ("docs/architecture.md", "server/round.py") in named
    assert [(page, file) for page, file in sorted(named) if not (ROOT / file).exists()] == []
