"""The wheel: one name in site-packages, all files inside, and a run from an empty folder without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

import pytest

from fedtune import __version__

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CARRIED = ("client", "server", "simulations", "strategies")
SMALL = ("rounds.count=1", "train.steps=1", "clients.count=2", "data.max_held_out=2", "data.max_length=32", "compare=false")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with ZipFile(wheel) as opened:
        return set(opened.namelist())


def test_site_packages_gets_one_name(names: set[str]) -> None:
    assert {name.partition("/")[0] for name in names} == {"fedtune", f"fedtune-{__version__}.dist-info"}


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(names: set[str]) -> None:
    inside = {name for name in names if name.startswith("fedtune/")}
    assert inside == files_below("fedtune", "fedtune") | {
        name for folder in CARRIED for name in files_below(folder, f"fedtune/_app/{folder}")
    }


def test_the_wheel_holds_what_is_no_python(names: set[str]) -> None:
    """Said once more by name, for a file that is missing in both places is missing all the same."""
    simulations, server = "fedtune/_app/simulations", "fedtune/_app/server"
    needed = {f"{simulations}/base_model/{file}" for file in ("config.json", "model.safetensors", "tokenizer.json")}
    needed |= {f"{simulations}/scenarios/demo.toml", f"{server}/report.html.j2", f"{server}/report.css"}
    assert needed <= names


def files_below(folder: str, as_: str) -> set[str]:
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(PurePosixPath(as_, *path.relative_to(ROOT / folder).parts)) for path in files}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--no-index"]
    subprocess.run([*pip, "--target", str(folder), str(wheel)], check=True, capture_output=True)
    return folder


def python(installed: Path, cwd: Path, words: Sequence[str]) -> str:
    """Runs Python with the wheel and what it depends on. -S leaves `.pth` files unread, so an editable install is out of
    sight, and -P the folder that the command runs in."""
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    command = [sys.executable, "-S", "-P", *words]
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_all_modules_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "from fedtune.paths import put_app_on_path; put_app_on_path()\n"
        "import fedtune, client, server, simulations, strategies\n"
        "print(*(module.__file__ for module in (fedtune, client, server, simulations, strategies)), sep='\\n')"
    )
    files = [Path(line) for line in python(installed, tmp_path, ["-c", code]).splitlines()]
    app = installed / "fedtune" / "_app"
    assert files == [installed / "fedtune/__init__.py", *(app / folder / "__init__.py" for folder in CARRIED)]


def test_the_wheel_runs_a_job_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    cli = ["-m", "fedtune.cli"]
    assert python(installed, tmp_path, [*cli, "--version"]) == f"fedtune {__version__}\n"
    assert "ffa_lora" in python(installed, tmp_path, [*cli, "strategies"])
    assert list(tmp_path.iterdir()) == []
    settings = [word for setting in SMALL for word in ("--set", setting)]
    assert "report:" in python(installed, tmp_path, [*cli, "simulate", "demo", *settings])
    assert (tmp_path / "runs/demo/adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "runs/demo/report.html").is_file()
