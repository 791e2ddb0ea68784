"""The fold: answers are read one at a time in the order of client ids, so the same answers give the same bits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedtune.errors import RoundFailed
from fedtune.payload import Payload, Role
from fedtune.strategy import Answer, Answers, Fold

CHUNK = 2**17  # elements: 1 MB in float64. A copy of a whole large tensor would go out to memory and back


class FoldedAnswers(Answers):
    """What a strategy gets back. `read` fetches one client's answer from wherever it lies, each time that it is needed."""

    def __init__(self, weights: Mapping[str, float], fold: Fold, read: Callable[[str], Answer]) -> None:
        self._shares, self._fold, self._fetch = shares(weights), fold, read

    @property
    def weights(self) -> Mapping[str, float]:
        return self._shares

    def mean(self, roles: Collection[Role] | None = None) -> Payload:
        return weighted_mean(self._read(), roles)

    @property
    def visible(self) -> bool:
        return self._fold is not Fold.SUM

    def __iter__(self) -> Iterator[tuple[str, float, Answer]]:
        if not self.visible:
            raise TypeError("this ask declared Fold.SUM: use mean(), or yield Ask(..., fold=Fold.EACH) to see each answer")
        return self._read()

    def _read(self) -> Iterator[tuple[str, float, Answer]]:
        for client, share in self._shares.items():
            yield client, share, self._fetch(client)


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Each client's part of the whole, in the order of ids. Raises RoundFailed where there is nothing to divide."""
    total = sum(weights[client] for client in sorted(weights))
    if not total > 0:
        raise RoundFailed(f"there is nothing to average: the weights of the clients that answered are {dict(weights)}")
    return {client: weights[client] / total for client in sorted(weights)}


def weighted_mean(answers: Iterable[tuple[str, float, Answer]], roles: Collection[Role] | None = None) -> Payload:
    """`sum_i share_i payload_i` in float64, one answer at a time; float32 at the end. Integers become float32 too.

    What not all have sent is the mean over those who have, and is left out where their shares are 0. Raises RoundFailed where a
    tensor has another shape than in the answers before.
    """
    sums: dict[str, Tensor] = {}
    scalars: dict[str, float] = {}
    kinds: dict[str, Role] = {}
    sent: dict[str, float] = {}  # of each tensor, the shares of those who sent it
    total = 0.0
    for client, share, answer in answers:
        total += share
        for name, tensor in answer.payload.tensors.items():
            if roles is None or answer.payload.roles[name] in roles:
                kinds[name], sent[name] = answer.payload.roles[name], sent.get(name, 0.0) + share
                sums[name] = _added(sums.get(name), tensor, share, f"'{name}' of client '{client}'")
        for name, value in answer.payload.scalars.items():
            scalars[name] = scalars.get(name, 0.0) + share * value
        del answer  # before the next one is read: one at a time is in memory
    means = {}
    for name, share in sent.items():
        if share > 0:
            means[name] = (sums[name] if share == total else sums[name].div_(share)).to(torch.float32)
    return Payload(means, {name: kinds[name] for name in means}, scalars)


def _added(sum_so_far: Tensor | None, tensor: Tensor, share: float, what: str) -> Tensor:
    """`sum_so_far + share * tensor`, in the memory of the sum, which the first tensor makes."""
    if sum_so_far is None:
        total = torch.empty(tensor.shape, dtype=torch.float64, device=tensor.device)
        for part, given in zip(_chunks(total), _chunks(tensor), strict=True):
            torch.mul(given.double(), share, out=part)
        return total
    if sum_so_far.shape != tensor.shape:
        shapes = tuple(tensor.shape), tuple(sum_so_far.shape)
        raise RoundFailed(
            f"{what} has the shape {shapes[0]}, in the answers before it was {shapes[1]}: nothing can be averaged"
        )
    for part, given in zip(_chunks(sum_so_far), _chunks(tensor), strict=True):
        part.add_(given.double(), alpha=share)
    return sum_so_far


def _chunks(tensor: Tensor) -> Sequence[Tensor]:
    """The tensor in flat pieces of which a float64 copy stays in the processor's cache; a small one as it is."""
    return (tensor,) if tensor.numel() <= CHUNK else torch.split(tensor.reshape(-1), CHUNK)
