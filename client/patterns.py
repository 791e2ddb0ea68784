"""Where a job lets an adapter go: names of modules, and patterns of names that take no time to match, whatever the names are.

Where a pattern leaves a choice, Python's matcher tries every one: `(.|.)*!` has 2^n of them in a name of n letters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from client.allowance import forbidden
from fedtune.job_sections import AdapterSettings

LONGEST, STARS, GROUPS = 200, 2, 2  # characters, of `*` and `+`, and of `(up|down)`, in one pattern
MOST = 256  # in one setting: Python keeps the last 512 patterns compiled
NAME = re.compile(r"[\w.-]+", re.ASCII)
WORDS = r"\(((?:[\w-]|\\\.)+(?:\|(?:[\w-]|\\\.)+)*)\)"  # (up_proj|down_proj)
PATTERN = re.compile(rf"\^?(?:(?:[\w-]|\.|\\\.|\\d)[*+]?|{WORDS})+\$?", re.ASCII)
WANTED = rf"names, or patterns of names, . and \d with at most {STARS} of * and + and {GROUPS} groups such as (up|down)_proj"


def admit_adapter(adapter: AdapterSettings) -> None:
    """Raises Forbidden."""
    if isinstance(adapter.targets, str):
        _admit("targets", [adapter.targets], is_quick)
    else:
        _admit("targets", adapter.targets, _is_name)
    _admit("rank_pattern", adapter.rank_pattern, is_quick)
    _admit("alpha_pattern", adapter.alpha_pattern, is_quick)


def is_quick(pattern: str) -> bool:
    """Few choices: at most two of `*` and `+`, none behind a group, and two groups of different words."""
    if len(pattern) > LONGEST or not PATTERN.fullmatch(pattern):
        return False
    groups = [found.split("|") for found in re.findall(WORDS, pattern, re.ASCII)]
    stars = pattern.count("*") + pattern.count("+")
    return stars <= STARS and len(groups) <= GROUPS and all(len(set(words)) == len(words) for words in groups)


def _is_name(text: str) -> bool:
    return len(text) <= LONGEST and bool(NAME.fullmatch(text))


def _admit(setting: str, given: Collection[str], allowed: Callable[[str], bool]) -> None:
    instead = f"name the modules in adapter.{setting}, or to leave it out"
    if len(given) > MOST:
        raise forbidden(setting, f"adapter.{setting} with {len(given)} entries", f"at most {MOST}", instead)
    for text in given:
        if not allowed(text):
            raise forbidden(setting, f"adapter.{setting} with {text[:80]!r}", WANTED, instead)
