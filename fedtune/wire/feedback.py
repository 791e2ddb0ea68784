"""Error feedback: what a client's codec lost of its last update waits in its memory and is added to the next one.

    x = update + e,  sent: C(x),  e <- x - C(x)

(Seide et al. 2014; Karimireddy et al., ICML 2019). An error is of one tensor in the answers to one kind of ask. It is dropped
when the tensor's shape changes, and fades by `decay` for each round in which the client did not answer: what it lost then was
measured at a model that has moved on.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

import torch
from torch import Tensor

from fedtune.memory import Memory

ERROR, ROUND = "wire.error.", "wire.round."  # in a client's memory, before the kind of an ask


class Feedback(MutableMapping[str, Tensor]):
    """The errors of a client's answers to one kind of ask, by the names of tensors, in its memory."""

    def __init__(self, memory: Memory, kind: str, round: int, decay: float) -> None:
        self._memory, self._prefix = memory, f"{ERROR}{kind}."
        last = memory.get(ROUND + kind)
        if last is not None:
            self._fade(round - int(last), decay)
        memory[ROUND + kind] = torch.tensor(round)

    def _fade(self, rounds: int, decay: float) -> None:
        """After so many rounds; another run, which counts its rounds anew, begins with none."""
        for name in list(self):
            if rounds < 0:
                del self[name]
            elif rounds > 1:
                self[name] = self[name] * decay ** (rounds - 1)

    def __getitem__(self, name: str) -> Tensor:
        return self._memory[self._prefix + name]

    def __setitem__(self, name: str, error: Tensor) -> None:
        self._memory[self._prefix + name] = error

    def __delitem__(self, name: str) -> None:
        del self._memory[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._memory if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
