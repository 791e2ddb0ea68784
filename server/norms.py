"""How far an update goes: beyond a limit of the job's, or far beyond the others', it is refused. Part of the gate.

Its norm is that of the differences to what its tensors began as, in float64, all tensors together:

    factors, cores, whole parameters   minus what the ask sent, or what the method says that they began as
    factors that were not sent         themselves: they began as 0
    whole parameters not sent          not counted: nobody knows what they were
    vectors                            themselves; not those of whole numbers, or that cannot be below 0: they measure

The median that it is held against is over this ask's answers and those that were let in before. That is settled when all have
come: the order in which they come plays no role.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedtune.errors import Refused
from fedtune.payload import Payload, Role
from fedtune.strategy import Ask

HIGHEST = 1e18  # the product of two such factors is near the largest float32: what follows from it is not finite any more
FEWEST = 3  # norms that a median is worth something of
WINDOW = 64  # norms of former answers to asks of one kind
CHUNK = 2**17  # numbers: 1 MB in float64


def norm_of(update: Payload, began: Payload, ask: Ask) -> float:
    """0 of one that does not move at all, or has nothing that can be measured."""
    return math.hypot(*(_norm(*parts) for parts in _moved(update, began, ask)))


def require_norm(norm: float, most: float | None = None) -> None:
    """The limits that need no others to compare with. Raises Refused."""
    if most is not None and norm > most:
        raise Refused(f"its update has a norm of {norm:.4g}, wanted at most {most:g} (gate.max_norm)")
    if norm > HIGHEST:
        raise Refused(f"its update has a norm of {norm:.4g}, wanted at most {HIGHEST:g}: float32 cannot hold what comes of it")


def too_far(norms: Mapping[str, float], before: Sequence[float], max_ratio: float) -> dict[str, str]:
    """Those whose norm is more than `max_ratio` times the median, each with the reason. Who did not move counts as nobody: with
    them, half of the clients could make the median 0."""
    median = _median(norms.values(), before)
    if median is None or not max_ratio:
        return {}
    far = {client: norm for client, norm in norms.items() if norm > max_ratio * median}
    return {
        client: f"its update has a norm of {norm:.4g}, wanted at most {max_ratio:g} times the median of {median:.4g} "
        "(gate.max_ratio)"
        for client, norm in sorted(far.items())
    }


def _median(norms: Iterable[float], before: Sequence[float]) -> float | None:
    """Of all, or of this ask's alone where that is larger: when everybody goes further than in other rounds, nobody is odd."""
    own = [norm for norm in norms if norm > 0]
    medians = [statistics.median(known) for known in (own, [*own, *before]) if len(known) >= FEWEST]
    return max(medians, default=None)


def remembered(before: Sequence[float], norms: Mapping[str, float]) -> tuple[float, ...]:
    """With those that were let in now, by client, so that a run that is taken up again has the same."""
    return (*before, *(norm for _, norm in sorted(norms.items()) if norm > 0))[-WINDOW:]


def _moved(update: Payload, began: Payload, ask: Ask) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What counts, each with what it began as; None is 0."""
    for name, tensor in update.tensors.items():
        role, start = update.roles[name], began.tensors.get(name)
        if not tensor.dtype.is_floating_point:
            continue
        if role is Role.VECTOR:
            if name not in ask.vectors or ask.vectors[name].least < 0:
                yield tensor, None
        elif start is not None:
            yield tensor, _fitted(start, tensor)
        elif role is not Role.DENSE:
            yield tensor, None


def _fitted(start: Tensor, like: Tensor) -> Tensor:
    """What a factor began as, at the rank at which it comes: cut, or with zeros."""
    if start.shape == like.shape or start.ndim != like.ndim:
        return start if start.shape == like.shape else torch.zeros_like(like)
    common = tuple(slice(min(one, other)) for one, other in zip(start.shape, like.shape, strict=True))
    fitted = torch.zeros(like.shape, dtype=start.dtype)
    fitted[common] = start[common]
    return fitted


def _norm(tensor: Tensor, start: Tensor | None) -> float:
    """Without a copy of the whole in float64."""
    ended, began = tensor.flatten(), start.flatten() if start is not None else None
    chunks = range(0, len(ended), CHUNK)
    return math.hypot(*(_length(_difference(ended, began, first)) for first in chunks))


def _difference(ended: Tensor, began: Tensor | None, first: int) -> np.ndarray:
    part = ended[first : first + CHUNK].double()
    return (part if began is None else part - began[first : first + CHUNK].double()).numpy()


def _length(numbers: np.ndarray) -> float:
    """Scaled by the largest, so that no square is too large; numpy adds up in one thread, in the same order everywhere."""
    peak = float(np.abs(numbers).max(initial=0.0))
    return peak * math.sqrt(float(np.square(numbers / peak).sum())) if 0 < peak < math.inf else peak
