"""What values of a JSON file of ours must be: one whose checksum is right may still be of another version, or made by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Fits = Callable[[Any], bool]
LARGEST = 2**64  # nodes have numbers up to it


def text(value: Any) -> bool:
    """That can be hashed and written."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def figure(value: Any) -> bool:
    """Also one that is not finite."""
    return type(value) in (int, float)


def above_0(value: Any) -> bool:
    return figure(value) and value > 0


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def some(fit: Fits) -> Fits:
    return lambda value: isinstance(value, list) and all(map(fit, value))


def each(fit: Fits) -> Fits:
    """Under whatever names."""
    return lambda value: isinstance(value, dict) and all(text(name) and fit(inner) for name, inner in value.items())


def exactly(**fields: Fits) -> Fits:
    """These and no others."""
    return lambda value: isinstance(value, dict) and value.keys() == fields.keys() and holds(value, fields)


def holds(value: Mapping[str, Any], must: Mapping[str, Fits], may: Mapping[str, Fits] | None = None) -> bool:
    """All that it must, and whatever it may is as it should be; of other fields it says what it likes."""
    return all(name in value and fit(value[name]) for name, fit in must.items()) and all(
        fit(value[name]) for name, fit in (may or {}).items() if name in value
    )
