"""A recipe comes back from its file as it was, and costs its numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fedtune.directions import Directions
from fedtune.errors import RunFolderError
from fedtune.recipe import READABLE, Recipe, readable
from fedtune.recipe_file import ABOUT, NAME, read_recipe, write_recipe

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
directions = st.builds(
    Directions,
    st.integers(0, 2**63 - 1),
    st.sampled_from(["rademacher", "gaussian"]),
    st.integers(1, 256).map(lambda n: n / 256),
    st.integers(0, 3),
)
parts = st.builds(Directions.sum, directions, st.dictionaries(st.integers(0, 2**62), numbers, max_size=5))


@given(st.lists(parts, max_size=5), st.lists(st.integers(0, 4), max_size=5), st.booleans())
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[Any], again: list[int], by_rate: bool
) -> None:
    """Some parts come again, so that kinds are mixed in any order; some are empty."""
    recipe = Recipe((*drawn, *(drawn[i] for i in again if i < len(drawn))), by_rate)
    folder = tmp_path_factory.mktemp("recipe") / "it"
    write_recipe(folder, recipe, {"lr": 0.5})
    assert read_recipe(folder) == (recipe, {"lr": 0.5})


def test_a_thousand_steps_cost_their_numbers(tmp_path: Path) -> None:
    """A step of two seeds: 2 x (8 + 4) bytes, two lengths and the kind, 4 bytes each. Key and settings stand there once."""
    noise = Directions(2**62)
    recipe = Recipe(tuple(noise.sum({step: 0.5, step + 7: 0.25}) for step in range(1000)))
    write_recipe(tmp_path / "recipe", recipe, {})
    assert (tmp_path / "recipe" / NAME).stat().st_size <= 1000 * (2 * 12 + 3 * 4) + 1000


@readable
@dataclass(frozen=True)
class Flat:
    """The same number everywhere: a part of a strategy that is not ours."""

    value: float

    def add_to(self, name: str, out: Tensor, scale: float = 1.0) -> None:
        out.add_(scale * self.value)

    def settings(self) -> dict[str, Any]:
        return {"unit": "nats"}

    def vectors(self) -> dict[str, Tensor]:
        return {"value": torch.tensor([self.value])}

    @classmethod
    def read(cls, settings: Mapping[str, Any], vectors: Mapping[str, Tensor]) -> Flat:
        assert settings == {"unit": "nats"}
        return cls(vectors["value"].item())


def test_a_strategy_brings_parts_of_its_own(tmp_path: Path) -> None:
    recipe = Recipe((Flat(1.5), Directions(3).sum({1: 2.0}), Flat(-0.5)), by_rate=False)
    write_recipe(tmp_path / "recipe", recipe, {})
    assert read_recipe(tmp_path / "recipe")[0] == recipe


def test_parts_that_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path / "recipe", Recipe((Flat(1.0),)), {})
    monkeypatch.delitem(READABLE, "Flat")
    with pytest.raises(RunFolderError, match="holds parts of class Flat, which no loaded strategy knows"):
        read_recipe(tmp_path / "recipe")
    with pytest.raises(RunFolderError, match=r"class Flat cannot be written to a file: give it .* put @readable above"):
        write_recipe(tmp_path / "other", Recipe((Flat(1.0),)), {})
    assert {path.name for path in tmp_path.iterdir()} == {"recipe"}


@pytest.mark.parametrize("damage", ["none", "half", "other", "provenance"])
def test_what_is_no_recipe_is_said(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe" / NAME
    if damage != "none":
        write_recipe(tmp_path / "recipe", Recipe((Flat(1.0),)), {})
    if damage == "half":
        file.write_bytes(file.read_bytes()[:40])
    if damage == "other":
        file.write_bytes(file.read_bytes().replace(b"fedtune recipe 2", b"fedtune recipe 9"))
    if damage == "provenance":
        (tmp_path / "recipe" / "fedtune.json").write_text("{", encoding="utf-8")
    wanted = "is of format 'fedtune recipe 9'; wanted 'fedtune recipe 2'" if damage == "other" else "no recipe that can be read"
    with pytest.raises(RunFolderError, match=wanted):
        read_recipe(tmp_path / "recipe")


@pytest.mark.parametrize(
    "damage",
    [
        {"kinds": [{}]},
        {"kinds": 5},
        {"by_rate": None},
        {"order": torch.tensor([5])},
        {"order": torch.tensor([0, 0])},
        {"0.seeds": torch.tensor([7])},
        {"0.seeds.lengths": torch.tensor([3])},
    ],
)
def test_a_recipe_whose_parts_do_not_fit_is_said(damage: dict[str, Any], tmp_path: Path) -> None:
    write_recipe(tmp_path, Recipe((Directions(5).sum({7: 0.5, 9: -1.0}),)), {})
    with safe_open(tmp_path / NAME, framework="pt") as opened:
        tensors, about = {name: opened.get_tensor(name) for name in opened.keys()}, json.loads(opened.metadata()[ABOUT])  # noqa: SIM118
    odd = {name: value for name, value in damage.items() if isinstance(value, Tensor)}
    told = {**about, **{name: value for name, value in damage.items() if name not in odd}}
    (tmp_path / NAME).write_bytes(save(tensors | odd, {ABOUT: json.dumps(told)}))
    with pytest.raises(RunFolderError, match="is damaged: "):
        read_recipe(tmp_path)


def test_a_crash_leaves_the_old_recipe_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path / "recipe", Recipe((Flat(1.0),)), {"round": 1})
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_recipe(tmp_path / "recipe", Recipe((Flat(2.0),)), {"round": 2})
    assert read_recipe(tmp_path / "recipe") == (Recipe((Flat(1.0),)), {"round": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_recipe(tmp_path / "other", Recipe((Flat(2.0),)), {})
    assert {path.name for path in tmp_path.iterdir()} == {"recipe"}


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    write_recipe(tmp_path / "recipe", Recipe((Directions(5).sum({7: 0.5, 9: -1.0}),)), {})
    with safe_open(tmp_path / "recipe" / NAME, framework="pt") as opened:
        assert opened.get_tensor("0.seeds").tolist() == [7, 9]
        assert opened.get_tensor("0.coefficients").tolist() == [0.5, -1.0]
        settings = {"key": 5, "kind": "rademacher", "density": 1.0, "blocks": 0, "modules": [], "spread": "positions"}
        kinds = [{"class": "Combination", "settings": settings, "vectors": ["coefficients", "seeds"]}]
        about = {"format": "fedtune recipe 2", "by_rate": True, "kinds": kinds}
        assert list(opened.metadata()) == ["fedtune"]
        assert json.loads(opened.metadata()["fedtune"]) == about
