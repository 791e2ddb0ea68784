"""The classes of sequence classification: every client must number them alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from client.allowance import shown, shown_hint
from fedtune.errors import DataError


def in_order(labels: set[str]) -> list[str]:
    """Whole numbers by size, so that 0 … n-1 stay what they are; names by the alphabet."""
    if all(re.fullmatch(r"-?\d+", label) for label in labels):
        return sorted(labels, key=int)
    return sorted(labels)


def name_of(label: Any, where: str) -> str:
    """A label as text: 1, 1.0 and "1" are the same. Raises DataError."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, str | int) or label == "":
        raise DataError(f"{where}: 'label' is {shown(label)}; wanted a name or a whole number")
    return str(label)


def class_of(label: Any, labels: Sequence[str] | None, where: str) -> int:
    """The number of the class: the label's place in `labels`, or without them the label itself."""
    name = name_of(label, where)
    if labels is not None:
        if name not in labels:
            raise DataError(f"{where}: unknown label {shown(name)}{shown_hint(name, labels)}; known: {', '.join(labels)}")
        return list(labels).index(name)
    if not name.isdecimal():
        raise DataError(f"{where}: label {shown(name)} has no number, as no list of labels was given; use 0, 1, 2, …")
    return int(name)
