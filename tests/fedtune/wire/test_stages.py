"""Which stages there are: built in, of an installed package, registered in this process, or from a file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from fedtune.errors import JobError
from fedtune.paths import app_root
from fedtune.wire import stages
from fedtune.wire.codec import codec_from
from fedtune.wire.stage import Array, Draw, Form, Stage

CODE = """
from dataclasses import dataclass
from fedtune.wire.floats import Fp32

@dataclass(frozen=True)
class Mine(Fp32):
    name = "mine"
"""


@dataclass(frozen=True)
class Own(Stage):
    name: ClassVar[str] = "own"

    def carrier(self, given: Form) -> Form:
        return given

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        return x, {}

    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        return carrier


def test_what_is_installed_is_what_is_built_in() -> None:
    project = tomllib.loads((app_root() / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"][stages.GROUP] == stages.BUILT_IN
    assert {name: stages.stage_class(name).name for name in stages.BUILT_IN} == {name: name for name in stages.BUILT_IN}


def test_a_class_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "REGISTERED", {})
    with pytest.raises(JobError, match="unknown stage 'own'"):
        stages.stage_class("own")
    assert stages.register(Own) is Own
    assert stages.stage_class("own") is Own
    assert stages.known()["own"].endswith("test_stages:Own")


def test_a_name_that_belongs_to_another_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "REGISTERED", {})
    with pytest.raises(JobError, match=r"the name 'int8' belongs to fedtune.wire.integers:Int8; give Other another"):
        stages.register(type("Other", (Own,), {"name": "int8"}))
    with pytest.raises(JobError, match="Nameless has no name to register"):
        stages.register(type("Nameless", (Stage,), {}))


def test_a_class_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(CODE, encoding="utf-8")
    assert codec_from(f"{file}:Mine | entropy").stages[0].name == "mine"
    with pytest.raises(JobError, match=r"stage '.*/none.py:Mine' cannot be loaded: there is no file"):
        codec_from(f"{tmp_path}/none.py:Mine")
    with pytest.raises(JobError, match=r"'Path' in it is no subclass of fedtune.wire.stage.Stage"):
        codec_from("pathlib:Path")
