"""When a round did harm: what it published is not finite, or the held-out loss has exploded.

No single client can bring that about: losses are compared client by client with those of the last evaluation, and the median
of the changes counts.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fedtune.errors import FedtuneError
from fedtune.strategy import ServerState
from server.records import RoundRecord
from server.report_units import one_line
from server.tally import Tally

MOST_IN_A_ROW = 3
ROLLED_BACK = "rolled back"  # begins the note of such a round


log = logging.getLogger("fedtune.serverapp")
T = TypeVar("T")


class Trouble(FedtuneError):
    """The round must not count; the message says why."""


def computed(half: Callable[[], T]) -> T:
    """Where the algebra of a method fails on numbers that are odd and yet finite, or on a state that lacks something, that is
    trouble of this round alone."""
    try:
        return half()
    except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
        log.warning("the strategy failed", exc_info=True)
        raise Trouble(f"the strategy could not compute it: {type(error).__name__}: {one_line(str(error), 200)}") from error


class Evaluated(Protocol):
    tally: Tally
    diverged: set[str]  # clients whose loss was not finite


def trouble(
    state: ServerState, round: Evaluated | None = None, before: Sequence[RoundRecord] = (), max_rise: float | None = None
) -> str:
    """Why the round must not count; empty where it may."""
    if name := not_finite(state):
        return f"'{name}' is not finite any more"
    if round is None:
        return ""
    now = {client: figures["loss"] for client, figures in round.tally.evaluated.items() if "loss" in figures}
    if len(round.diverged) > len(now):
        return f"the held-out loss of {len(round.diverged)} of {len(round.diverged) + len(now)} clients is not finite"
    rise = median_rise(last_losses(before), now)
    if max_rise is not None and rise > max_rise:
        return f"the held-out loss rose by {rise:.3g} (rounds.max_rise = {max_rise:g})"
    return ""


def not_finite(state: ServerState) -> str:
    """The first tensor that is not; empty where all are."""
    factors = {f"{path}.{part}": getattr(pair, part) for path, pair in state.adapter.lora.items() for part in "AB"}
    named: Iterable[tuple[str, Tensor]] = [*factors.items(), *state.adapter.dense.items(), *state.tensors.items()]
    bad = (name for name, tensor in named if tensor.is_floating_point() and not torch.isfinite(tensor).all())
    return next(bad, "")


def last_losses(before: Sequence[RoundRecord]) -> Mapping[str, float]:
    """Of each client, of the last round that counts and was evaluated."""
    last = last_evaluated(before)
    return {client: one.loss for client, one in last.clients.items() if one.loss is not None} if last else {}


def last_evaluated(before: Sequence[RoundRecord]) -> RoundRecord | None:
    """Of those that count."""
    for record in reversed(before):
        evaluated = any(client.loss is not None for client in record.clients.values())
        if evaluated and not any(note.startswith(ROLLED_BACK) for note in record.notes):
            return record
    return None


def median_rise(before: Mapping[str, float], now: Mapping[str, float]) -> float:
    """Over the clients that were evaluated both times; none is no rise. Of an even number the lower of the two in the middle:
    half of them alone decide nothing."""
    both = before.keys() & now.keys()
    return statistics.median_low(now[client] - before[client] for client in both) if both else 0.0


def in_a_row(undone: Collection[int], number: int) -> int:
    """How many rounds, up to this one, were rolled back without one that was not."""
    count = 0
    while number - count in undone:
        count += 1
    return count
