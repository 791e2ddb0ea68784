"""What this node leaves to the ask at work: steps, seconds, columns, evaluation. Looked at where the work is done, so that no
setting of a job leads past it.

An allowance is open for the thread that answers. Where none is, as in simulation, everything is allowed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedtune.errors import Forbidden, nearest

Batch = TypeVar("Batch")
NO_FIGURES = "type --set rounds.evaluate_every=0, or to do without this client's figures"


def forbidden(rule: str, given: str, allowed: object, instead: str) -> Forbidden:
    return Forbidden(f"policy.{rule}: given {given}, allowed {allowed}; ask the coordinator to {instead}")


@dataclass
class Allowance:
    """Of one round; `steps` and `seconds` are what it has used, by earlier asks too."""

    max_steps: float = math.inf
    max_seconds: float = math.inf
    evaluation: bool = True
    columns: Collection[str] | None = None  # absent is all
    steps: int = 0
    seconds: float = 0.0
    clock: Callable[[], float] = time.monotonic
    _began: float = field(init=False)

    def __post_init__(self) -> None:
        self._began = self.clock()

    @property
    def spent(self) -> float:
        """Seconds of the round until now."""
        return self.seconds + self.clock() - self._began

    def check(self) -> None:
        """Raises Forbidden when the time is over."""
        if self.spent > self.max_seconds:
            lower = "lower train.steps, train.batch or data.max_length"
            raise forbidden("max_seconds", "a round that takes longer", f"{self.max_seconds:g} s of work", lower)

    def step(self) -> None:
        self.check()
        if self.steps >= self.max_steps:
            lower = "lower train.steps, or how many batches its method probes"
            raise forbidden("max_steps", "a round that takes more batches, probes among them", f"{self.max_steps:g}", lower)
        self.steps += 1


_open: ContextVar[Allowance | None] = ContextVar("allowance", default=None)


@contextmanager
def within(allowance: Allowance) -> Iterator[Allowance]:
    token = _open.set(allowance)
    try:
        yield allowance
    finally:
        _open.reset(token)


def check() -> None:
    """Between two pieces of work. Raises Forbidden when the time of the round is over."""
    if allowance := _open.get():
        allowance.check()


@contextmanager
def uncounted() -> Iterator[None]:
    """Within, time passes that is not the round's."""
    allowance = _open.get()
    began = allowance.clock() if allowance else 0.0
    try:
        yield
    finally:
        if allowance:
            allowance.seconds -= allowance.clock() - began


def counted(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Each batch of the client's examples is a step."""
    for batch in batches:
        if allowance := _open.get():
            allowance.step()
        yield batch


def require_evaluation() -> None:
    """Raises Forbidden where nobody may know how well a model does on this client's held-out examples."""
    allowance = _open.get()
    if allowance and not allowance.evaluation:
        raise forbidden("evaluation", "an ask to evaluate", "none", NO_FIGURES)


def columns() -> Collection[str] | None:
    """That may be read; None is all."""
    allowance = _open.get()
    return allowance.columns if allowance else None


def shown(value: Any) -> str:
    """A value of the data for an error: on a node, whose errors travel, only what it is."""
    if _open.get() is None:
        return f"{value!r:.60}"
    length = f" of {len(value)}" if isinstance(value, str | list | dict) else ""
    return f"a {type(value).__name__}{length} (not shown, as this may travel)"


def shown_hint(value: str, known: Iterable[str]) -> str:
    """What a misspelt value of the data may have meant: on a node nothing, since the job chooses what is `known`."""
    return nearest(value, known) if _open.get() is None else ""


def shown_names(names: Iterable[str]) -> str:
    """Columns or clients of the data for an error; of a file without a header, the names are its first row."""
    return ", ".join(names) if _open.get() is None else f"{len(list(names))} (not shown, as this may travel)"
