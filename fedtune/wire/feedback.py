"""Error feedback: what a client's codec lost of its last update waits in its memory and is added to the next one.

    x = update + e,  sent: C(x),  e <- x - C(x)

(Seide et al. 2014; Karimireddy et al., ICML 2019). An error is of one tensor in the answers to one kind of ask. It is dropped
when the tensor's shape changes, and fades by `decay` for each round in which the client did not answer: what it lost then was
measured at a model that has moved on. Another run begins with none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune.memory import Memory
from fedtune.wire.raw import UNREADABLE

ERROR, LAST = "wire.error.", "wire.last."  # in a client's memory, before the kind of an ask
NEVER = {"round": -1, "ask": "", "run": ""}


class Feedback(MutableMapping[str, Tensor]):
    """The errors of a client's answers to one kind of ask, by the names of tensors, in its memory.

    `header` is that of the answer that is about to be made: its ask, round and run.
    """

    def __init__(self, memory: Memory, kind: str, header: Mapping[str, Any], decay: float) -> None:
        self._memory, self._prefix = memory, f"{ERROR}{json.dumps(kind)}."
        before, now = _last(memory, kind), {key: header.get(key) for key in NEVER}
        rounds = now["round"] - before["round"]
        if before["run"] != now["run"] or before["ask"] == now["ask"] or rounds < 0:
            self.clear()  # an ask that comes again finds what was before it (client/memories.py), unless that is gone
        elif rounds > 1:
            self._fade(math.prod([decay] * (rounds - 1)))  # a power would be each machine's own
        memory[LAST + kind] = torch.from_numpy(np.frombuffer(json.dumps(now).encode(), np.uint8).copy())

    def _fade(self, left: float) -> None:
        for name in list(self):
            self[name] = self[name] * left

    def __getitem__(self, name: str) -> Tensor:
        return self._memory[self._prefix + name]

    def __setitem__(self, name: str, error: Tensor) -> None:
        self._memory[self._prefix + name] = error

    def __delitem__(self, name: str) -> None:
        del self._memory[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in list(self._memory) if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _last(memory: Memory, kind: str) -> Mapping[str, Any]:
    """Of the answer before this one. Of a memory that is damaged nothing is believed."""
    try:
        about = json.loads(memory[LAST + kind].numpy().tobytes())
        return {"round": int(about["round"]), "ask": str(about["ask"]), "run": about["run"]}
    except UNREADABLE:
        return NEVER
