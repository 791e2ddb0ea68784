"""Recipes as folders of a few kilobytes: `recipe.safetensors` and, with where it came from, `fedtune.json`.

Parts of one kind (class, settings, names of vectors) lie end to end in the same tensors, so that thousands of steps cost their
numbers and nothing more:

    order                the kind of each part, in the order of the recipe
    0.seeds              the vectors of all parts of kind 0, one after the other
    0.seeds.lengths      how many numbers of it belong to each
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedtune.errors import RunFolderError
from fedtune.folders import replaced
from fedtune.recipe import READABLE, Part, Recipe

NAME = "recipe.safetensors"
FORMAT, ABOUT = "fedtune recipe 2", "fedtune"


def write_recipe(folder: Path, recipe: Recipe, provenance: Mapping[str, Any]) -> None:
    """Write `folder` as a whole: a crash leaves the old one or none. Of `provenance`, `lr` is needed to compute the model."""
    tensors, kinds = _tensors(recipe)
    about = json.dumps({"format": FORMAT, "by_rate": recipe.by_rate, "kinds": kinds})
    with replaced(folder) as new:
        (new / NAME).write_bytes(save(tensors, metadata={ABOUT: about}))  # several keys would come in an order of chance
        (new / "fedtune.json").write_text(json.dumps(dict(provenance), indent=2) + "\n", encoding="utf-8")


def read_recipe(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe and its provenance. Raises RunFolderError."""
    try:
        with safe_open(folder / NAME, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            about = json.loads((opened.metadata() or {}).get(ABOUT, "{}"))
        provenance = json.loads((folder / "fedtune.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise RunFolderError(f"{folder} holds no recipe that can be read: {error}") from error
    if about.get("format") != FORMAT:
        raise RunFolderError(f"{folder / NAME} is of format {about.get('format')!r}; wanted {FORMAT!r}")
    try:
        return Recipe(tuple(_parts(tensors, about["kinds"], folder)), _flag(about["by_rate"])), provenance
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise RunFolderError(f"{folder / NAME} is damaged: {type(error).__name__}: {error}") from error


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _tensors(recipe: Recipe) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """What the file holds, and the kinds of parts that there are."""
    kinds, order, pieces = dict[str, int](), list[int](), dict[str, list[Tensor]]()
    for part in recipe.parts:
        _require_readable(part)
        vectors = part.vectors()
        kind = {"class": type(part).__name__, "settings": part.settings(), "vectors": sorted(vectors)}
        number = kinds.setdefault(json.dumps(kind, sort_keys=True), len(kinds))
        order.append(number)
        for name, vector in vectors.items():
            pieces.setdefault(f"{number}.{name}", []).append(vector)
    tensors = {"order": torch.tensor(order, dtype=torch.int32)}
    for name, of_parts in pieces.items():
        tensors[name] = torch.cat(of_parts)
        tensors[f"{name}.lengths"] = torch.tensor([len(one) for one in of_parts], dtype=torch.int32)
    return tensors, [json.loads(kind) for kind in kinds]


def _require_readable(part: Part) -> None:
    if type(part).__name__ not in READABLE:
        raise RunFolderError(
            f"a part of class {type(part).__name__} cannot be written to a file: give it `settings`, `vectors` and `read` as "
            "fedtune/recipe.py says, and put @readable above the class"
        )


def _parts(tensors: Mapping[str, Tensor], kinds: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[Part]:
    for kind in kinds:
        if kind["class"] not in READABLE:
            raise RunFolderError(f"{folder / NAME} holds parts of class {kind['class']}, which no loaded strategy knows")
    names = [f"{number}.{name}" for number, kind in enumerate(kinds) for name in kind["vectors"]]
    pieces = {name: iter(torch.split(tensors[name], tensors[f"{name}.lengths"].tolist())) for name in names}
    for number in tensors["order"].tolist():
        vectors = {name: next(pieces[f"{number}.{name}"]) for name in kinds[number]["vectors"]}
        yield READABLE[kinds[number]["class"]].read(kinds[number]["settings"], vectors)
