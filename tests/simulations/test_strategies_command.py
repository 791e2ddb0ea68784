"""`fedtune strategies`: what each method can do and sends, and methods of packages that others wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedtune.adapter import Adapter, Factors
from fedtune.base import Blueprint
from fedtune.job import Job, checked_job
from fedtune.registry import known, strategy_class, strategy_from
from server import report_units as units
from simulations.traffic import traffic

Command = Callable[..., tuple[int, str, str]]
PLUG_IN = """
from dataclasses import dataclass
from typing import ClassVar
from strategies.fedavg import FedAvg

@dataclass(frozen=True)
class Half(FedAvg):
    '''Half of FedAvg, for a test.'''
    name: ClassVar[str] = "half_avg"
    paper: ClassVar[str] = "nobody, never"
    up: ClassVar[str] = "r*(d + k)"
    mixed_ranks: ClassVar[bool] = True
    share: float = 0.5
"""
PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "half-avg"
version = "1"
[project.entry-points."fedtune.strategies"]
half_avg = "half_avg:Half"
"""
SGD = {"optimizer": "sgd", "clip": 0.0}


def plan(heads: bool = False) -> Blueprint:
    """Two modules, (6, 5) and (4, 4), at rank 2; perhaps a head of 12 numbers."""
    lora = {path: Factors(torch.zeros(2, k), torch.zeros(d, 2), 1.0) for path, d, k in (("one", 6, 5), ("two", 4, 4))}
    dense = {"head": torch.zeros(3, 4)} if heads else {}
    shapes = {f"{path}.weight": pair.shape for path, pair in lora.items()} | dict.fromkeys(dense, (3, 4))
    return Blueprint(Adapter(lora, dense), ("one", "two"), (), shapes)


def job(**keys: object) -> Job:
    return checked_job({"adapter": {"rank": 2, "alpha": 4.0}, **keys}, "test")


@pytest.mark.parametrize("heads", [False, True])
def test_the_bytes_of_fedavg_are_its_numbers_and_a_header(heads: bool) -> None:
    """2 x (6 + 5 + 4 + 4) = 38 numbers, and 12 of the head; 4 bytes each."""
    sent = traffic(strategy_from("fedavg", {}), job(), plan(heads))
    numbers = 38 + 12 * heads
    assert 4 * numbers < sent.up < 4 * numbers + 1000
    assert 4 * numbers < sent.down < 4 * numbers + 1000


def test_a_mixed_fleet_is_counted_as_its_mean() -> None:
    """Ranks 1 and 3 send 19 x 1 and 19 x 3 numbers: as many as two of rank 2."""
    mixed = traffic(strategy_from("flora", {}), job(clients={"count": 2, "ranks": {"a": 1, "b": 3}}), plan())
    even = traffic(strategy_from("flora", {}), job(clients={"count": 2}), plan())
    assert abs(mixed.up - even.up) < 10


@pytest.mark.parametrize(
    ("settings", "up", "down"),
    [
        ({}, 6 * 200, 4 * 4096),  # a seed's number in two bytes and its slope in four, for each step
        ({"seeds_per_step": 5}, 6 * 5 * 200, 4 * 4096),
        ({"sends": "sum"}, 4 * 4096, 4 * 4096),
        ({"K": 2048, "pro": True}, 6 * 200, 2 * 4 * 2048),  # and how likely each seed is
    ],
)
def test_a_round_of_fedkseed_is_a_few_bytes_for_each_seed_and_step(settings: dict[str, object], up: int, down: int) -> None:
    """Beside them is the header. With K = 4096 that is less than 18,000 bytes each way, header included."""
    sent = traffic(strategy_from("fedkseed", settings), job(train={**SGD, "steps": 200}), plan())
    assert 0 < sent.up - up < 300
    assert 0 < sent.down - down < 300
    assert max(sent.up, sent.down) < 18_000


def test_steps_are_counted_by_epochs_too() -> None:
    """Each of the counted clients has 100 examples: three passes in batches of 4 are 75 steps."""
    sent = traffic(strategy_from("fedkseed", {}), job(train={**SGD, "steps": 0, "epochs": 3.0, "batch": 4}), plan())
    assert 0 < sent.up - 6 * 75 < 300


def test_every_method_is_listed_with_what_it_sends(run_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run_command("strategies", "--job", "demo")
    assert code == 0
    words = {"exact": "exact", "mixed_ranks": "mixed ranks", "secure_sum": "secure sum", "personal": "personal models"}
    for name in known():
        row = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        cls = strategy_class(name)
        assert ", ".join(said for flag, said in words.items() if getattr(cls, flag)) in row
    demo = next(line for line in out.splitlines() if line.startswith("fedavg "))
    assert units.size(577_467) in demo  # down, as a plain run of the demo records it, header included
    assert units.size(577_607) in demo  # up


def test_the_table_fits_a_narrow_terminal(run_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run_command("strategies")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80


def test_a_job_that_is_wrong_ends_in_one_line(run_command: Command) -> None:
    code, _, err = run_command("strategies", "--job", "demo", "--set", "train.step=3")
    assert code == 2
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_package_that_pip_installed_shows_up(tmp_path: Path) -> None:
    """With its summary, settings, abilities and formula; and the rules of fedtune.testing run over it."""
    (tmp_path / "half_avg.py").write_text(PLUG_IN, encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(PYPROJECT + '[tool.hatch.build.targets.wheel]\ninclude = ["half_avg.py"]\n')
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", site, tmp_path], check=True, capture_output=True)
    script = (
        "import json; from fedtune.paths import put_app_on_path; put_app_on_path()\n"
        "from fedtune.registry import able, known, strategy_from; from fedtune.testing import check_strategy\n"
        "check_strategy(strategy_from('half_avg', {'share': 0.25}), (2, 2, 2))\n"
        "from rich.console import Console; from simulations.strategies_table import strategies_table\n"
        "console = Console(width=200); console.begin_capture(); console.print(strategies_table(None))\n"
        "print(json.dumps([known()['half_avg'], 'half_avg' in able('mixed_ranks'), console.end_capture()]))"
    )
    repository = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": f"{site}:{repository}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    reference, mixed, table = json.loads(ran.stdout)
    assert (reference, mixed) == ("half_avg:Half", True)
    [row] = [line for line in table.splitlines() if line.startswith("half_avg")]
    assert "Half of FedAvg, for a test." in row
    assert "mixed ranks, secure sum" in row
    assert "r(d + k)" in row
    assert "nobody, never" in table
    assert "settings: share (0.5)" in table
