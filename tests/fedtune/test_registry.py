"""From a name in the job file to a strategy, and every way in which that can go wrong."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from fedtune import registry
from fedtune.errors import StrategyError
from fedtune.job import checked_job
from fedtune.paths import app_root
from fedtune.registry import BUILT_IN, GROUP, known, strategy_class, strategy_from
from fedtune.strategy import Strategy
from strategies.fedavg import FedAvg
from strategies.flora import FLoRA

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar

from strategies.fedavg import FedAvg


@dataclass(frozen=True)
class Mine(FedAvg):
    name: ClassVar[str] = "mine"
    strength: float = 0.5
    rounds: int = 1


class Loose(FedAvg.__base__):
    def round(self, state, cohort): ...
    def answer(self, ask, local, memory): ...


number = 3
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """plugin(text, name): a module in a folder outside the repository, importable by its name too."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str = PLUGIN, name: str = "outside_plugin.py") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    yield write
    for name in set(sys.modules) - before:
        if "plugin" in name:
            del sys.modules[name]


def test_built_ins_are_the_entry_points_of_the_package() -> None:
    project = tomllib.loads((app_root() / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"][GROUP] == BUILT_IN


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_loads_and_bears_its_name(name: str) -> None:
    assert strategy_class(name).name == name
    assert isinstance(strategy_from(name, {}), Strategy)
    assert name in known()


def test_settings_become_fields() -> None:
    assert strategy_from("flora", {"max_rank": 3, "start_from": "cold"}) == FLoRA(max_rank=3, start_from="cold")
    assert strategy_from("fedavg", {}) == FedAvg()


@pytest.mark.parametrize("suffix", [".py", ""])
def test_a_plugin_from_a_file(plugin: Callable[..., Path], suffix: str) -> None:
    path = plugin().with_suffix(suffix)
    mine = strategy_from(f"{path}:Mine", {"strength": 2, "rounds": 3})
    assert (mine.name, mine.strength, mine.rounds) == ("mine", 2.0, 3)  # type: ignore[attr-defined]


def test_a_plugin_from_a_relative_file(plugin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = plugin()
    monkeypatch.chdir(path.parent)
    assert strategy_class(f"{path.name}:Mine").name == "mine"
    assert strategy_class(f"./{path.name}:Mine").name == "mine"


def test_a_plugin_from_a_module(plugin: Callable[..., Path]) -> None:
    plugin()
    assert strategy_class("outside_plugin:Mine").name == "mine"


def test_two_plugins_of_one_file_name_do_not_mix(plugin: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, other = plugin(), plugin(PLUGIN.replace('"mine"', '"yours"'), "other/outside_plugin.py")
    assert [strategy_class(f"{path}:Mine").name for path in (one, other, one)] == ["mine", "yours", "mine"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fedavgg", "unknown strategy 'fedavgg', did you mean 'fedavg'?; known are " + ", ".join(known())),
        ("", "unknown strategy ''; known are"),
        ("/nowhere/mine.py:Mine", "there is no file /nowhere/mine.py; wanted 'file.py:Class' or 'package.module:Class'"),
        ("no_such_package.mine:Mine", "No module named 'no_such_package'"),
        (".relative:Mine", "cannot be loaded"),
        ("json:loads", "'loads' in it is no subclass of fedtune.strategy.Strategy"),
        ("json:Nothing", "'Nothing' in it is no subclass"),
        ("json:JSONDecoder", "'JSONDecoder' in it is no subclass"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, message: str) -> None:
    with pytest.raises(StrategyError) as raised:
        strategy_from(name, {})
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("attribute", "settings", "message"),
    [
        ("number", {}, "'number' in it is no subclass"),
        ("Loose", {}, "must be a dataclass: put @dataclass(frozen=True) above class Loose"),
        ("Mine", {"strenght": 1}, "has no setting 'strenght', did you mean 'strength'?; its settings are strength, rounds"),
        ("Mine", {"strength": "much"}, "setting 'strength': Input should be a valid number"),
        ("Mine", {"rounds": 1.5}, "setting 'rounds': Input should be a valid integer"),
        ("Mine", {"name": "other"}, "has no setting 'name'"),
    ],
)
def test_a_plugin_used_wrongly(plugin: Callable[..., Path], attribute: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(StrategyError) as raised:
        strategy_from(f"{plugin()}:{attribute}", settings)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def (:\n", "SyntaxError: invalid syntax (outside_plugin.py, line 1)"),
        ("import no_such_package\n", "No module named 'no_such_package'"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_plugin_that_does_not_import(plugin: Callable[..., Path], text: str, message: str) -> None:
    with pytest.raises(StrategyError) as raised:
        strategy_from(f"{plugin(text)}:Mine", {})
    assert message in str(raised.value)


def test_settings_of_built_ins_are_checked() -> None:
    with pytest.raises(StrategyError, match=r"'flora', setting 'start_from': .*'warm' or 'cold', given 'hot'"):
        strategy_from("flora", {"start_from": "hot"})
    with pytest.raises(StrategyError, match=r"has no setting 'max_rnk', did you mean 'max_rank'"):
        strategy_from("flora", {"max_rnk": 3})


def test_a_class_in_python_gets_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook: the class lies in no file that could be named."""
    monkeypatch.setattr(registry, "REGISTERED", {})

    @registry.register
    @dataclass(frozen=True)
    class Own(FedAvg):
        """One's own."""

        name: ClassVar[str] = "own"
        share: float = 0.5

    assert "own" in registry.known()
    assert registry.strategy_from("own", {"share": 0.25}) == Own(0.25)
    assert checked_job({"strategy": {"name": "own", "share": 0.25}}, "here").make_strategy() == Own(0.25)
    registry.register(Own)  # as when a cell is run again


def test_a_taken_name_is_not_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTERED", {})
    with pytest.raises(StrategyError, match=r"'flora' belongs to strategies\.flora:FLoRA; give Flora another"):
        registry.register(type("Flora", (FedAvg,), {"name": "flora"}))
    assert registry.REGISTERED == {}
