"""The page's strategy and the page's tests are taken from the page and run, outside the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.job import load_job
from fedtune.paths import app_root
from fedtune.registry import strategy_from
from fedtune.testing import check_strategy
from server.watchers import Quiet
from simulations.engine import simulate

PAGE = (app_root() / "docs" / "write-a-strategy.md").read_text(encoding="utf-8")
STRATEGY, TESTS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
[COMMAND] = re.findall(r"```sh\n(.*?)\n```", PAGE, re.DOTALL)
SMALL = ["rounds.count=2", "train.steps=1", "clients.count=2", "data.max_held_out=4", "compare=false"]


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "fedavgm.py"
    path.write_text(STRATEGY, encoding="utf-8")
    return path


def test_the_strategy_keeps_the_rules(plugin: Path) -> None:
    strategy = strategy_from(f"{plugin}:FedAvgM", {"beta": 0.3})
    assert strategy.beta == 0.3  # type: ignore[attr-defined]
    check_strategy(strategy)


def test_it_is_about_forty_lines() -> None:
    assert len(STRATEGY.splitlines()) <= 45


def test_the_tests_on_the_page_pass(plugin: Path) -> None:
    """As a stranger runs them: pytest in the folder of the two files."""
    (plugin.parent / "test_fedavgm.py").write_text(TESTS, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_fedavgm.py"]
    env = {**os.environ, "PYTHONPATH": str(app_root())}
    done = subprocess.run(command, cwd=plugin.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_the_command_on_the_page_runs(plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two short rounds of the demo; momentum makes the second differ from plain FedAvg's."""
    monkeypatch.chdir(plugin.parent)
    given = re.findall(r"--set (\S+)", COMMAND)
    assert COMMAND.startswith("fedtune simulate demo ")
    assert f"strategy.name={plugin.name}:FedAvgM" in given
    demo = app_root() / "simulations" / "scenarios" / "demo.toml"
    mine = simulate(load_job(demo, [*given, *SMALL]), tmp_path / "mine", Quiet())
    plain = simulate(load_job(demo, ["strategy.name=fedavg", *SMALL]), tmp_path / "plain", Quiet())
    assert [record.answered for record in mine.records] == [2, 2, 2]
    assert mine.records[1].loss == pytest.approx(plain.records[1].loss, abs=1e-5)
    assert mine.records[2].loss != pytest.approx(plain.records[2].loss, abs=1e-5)
    assert (mine.adapter / "adapter_model.safetensors").is_file()
