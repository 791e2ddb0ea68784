"""What a Flower strategy remembers from round to round, as named tensors and scalars, and back.

That is each attribute that is no longer as the constructor left it: numbers, arrays, and lists, dicts and ArrayRecords of
arrays, empty ones too. Anything else is a TypeError, since it would be forgotten.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedtune.wire import DTYPES

Parts = dict[str, np.ndarray]


def changed(instance: Any, fresh: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors `<attribute>:<kind>:<place>:<key>` and scalars `<attribute>:<kind>` of what is not as in `fresh`."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, float] = {}
    for attribute, value in vars(instance).items():
        if _same(value, vars(fresh).get(attribute)):
            continue
        kind, parts = _kind(value), _parts(value)
        odd = [part.dtype for part in parts.values() if str(part.dtype) not in DTYPES]
        if kind is None or odd:
            raise TypeError(
                f"remembers '{attribute}' ({', '.join(map(str, odd)) or type(value).__name__}) from round to round, which no "
                "checkpoint can hold: wanted numbers, arrays, or a list, dict or ArrayRecord of arrays"
            )
        if not parts:
            scalars[f"{attribute}:{kind}"] = float(value) if isinstance(value, Real) else 0.0
        for place, (key, part) in enumerate(parts.items()):
            tensors[f"{attribute}:{kind}:{place}:{key}"] = torch.from_numpy(np.array(part))
    return tensors, scalars


def put_back(instance: Any, tensors: Mapping[str, Tensor], scalars: Mapping[str, float]) -> None:
    """Set what `changed` gave. The instance gets arrays of its own: some classes write into them."""
    for name, value in scalars.items():
        attribute, _, kind = name.partition(":")
        if kind:
            setattr(instance, attribute, MADE_OF_NUMBER[kind](value))
    found: dict[tuple[str, str], list[tuple[int, str, np.ndarray]]] = {}
    for name, tensor in tensors.items():
        attribute, kind, place, key = name.split(":", 3)
        found.setdefault((attribute, kind), []).append((int(place), key, np.array(tensor.numpy())))
    for (attribute, kind), parts in found.items():
        ordered = {key: part for _, key, part in sorted(parts, key=lambda part: part[0])}
        setattr(instance, attribute, MADE_OF_PARTS[kind](ordered))


MADE_OF_PARTS: dict[str, Callable[[Parts], Any]] = {
    "array": lambda parts: parts[""],
    "record": lambda parts: ArrayRecord({key: Array(part) for key, part in parts.items()}),
    "dict": dict,
    "list": lambda parts: list(parts.values()),
}
MADE_OF_NUMBER: dict[str, Callable[[float], Any]] = {
    "bool": bool,
    "int": int,
    "float": float,
    "none": lambda _: None,
    "record": lambda _: ArrayRecord(),  # the last three are empty
    "dict": lambda _: {},
    "list": lambda _: [],
}


def _kind(value: Any) -> str | None:
    """A key of the tables above; None for what no checkpoint can hold."""
    kinds = {"none": type(None), "bool": bool, "int": Integral, "float": Real, "array": np.ndarray, "record": ArrayRecord}
    whole = next((kind for kind, of in kinds.items() if isinstance(value, of)), None)
    joined = next((kind for kind, of in {"dict": dict, "list": list}.items() if isinstance(value, of)), None)
    return whole or (joined if not value or _parts(value) else None)


def _parts(value: Any) -> Parts:
    """The arrays in a value; nothing where there is anything else in it."""
    match value:
        case np.ndarray():
            return {"": value}
        case ArrayRecord():
            return {key: array.numpy() for key, array in value.items()}
        case dict() if all(isinstance(key, str) and isinstance(part, np.ndarray | np.generic) for key, part in value.items()):
            return {key: np.asarray(part) for key, part in value.items()}
        case list() if all(isinstance(part, np.ndarray | np.generic) for part in value):
            return {str(i): np.asarray(part) for i, part in enumerate(value)}
    return {}


def _same(value: Any, other: Any) -> bool:
    if value is other:
        return True
    ours, theirs = _parts(value), _parts(other)
    if ours or theirs:
        return ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)
    try:
        return pickle.dumps(value) == pickle.dumps(other)
    except Exception:  # a lock, a function made in the constructor: nobody knows
        return False
