"""The errors: the tree that is drawn is the tree that is, and the hint for a misspelt word."""

from __future__ import annotations

import inspect
import re

import pytest

from fedtune import errors
from fedtune.errors import FedtuneError, nearest


def drawn_tree() -> dict[str, str]:
    """Class to parent, read from the drawing in the docstring: four columns are one level."""
    tree, above = {}, {0: "Exception"}
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ([│ ]*)(├── |└── |)([A-Z]\w+)(  |$)", line):
            depth = len(found[1] + found[2]) // 4 + 1
            above[depth] = found[3]
            tree[found[3]] = above[depth - 1]
    return tree


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    classes = inspect.getmembers(errors, lambda found: inspect.isclass(found) and issubclass(found, FedtuneError))
    assert drawn_tree() == {name: cls.__base__.__name__ for name, cls in classes}
    assert len(classes) >= 10


@pytest.mark.parametrize(
    ("word", "hint"),
    [("fedavgg", ", did you mean 'fedavg'?"), ("florra", ", did you mean 'flora'?"), ("zzz", ""), ("", "")],
)
def test_the_nearest_known_word(word: str, hint: str) -> None:
    assert nearest(word, iter(["fedavg", "ffa_lora", "flora"])) == hint
