"""FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313): A is drawn once and frozen, only B trains and travels.

    sum_i p_i s B_i A_0 = s (sum_i p_i B_i) A_0          the mean is exact, and noise on B stays linear

A_0 never travels: both sides draw it from `seed`, the same bits everywhere (fedtune.seeds). It likes a learning rate 2
to 10 times that of LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedtune.adapter import Adapter, Factors
from fedtune.payload import Payload, Role, adapter_of, payload_of
from fedtune.seeds import lora_a
from fedtune.strategy import ServerState
from strategies.one_factor import OneFactor


@dataclass(frozen=True)
class FfaLora(OneFactor):
    """FFA-LoRA: A frozen from a shared seed, B averaged (exact). Needs one rank for all clients."""

    name: ClassVar[str] = "ffa_lora"
    paper: ClassVar[str] = "Sun et al., ICLR 2024, arXiv 2403.12313"
    up: ClassVar[str] = "r*d + h"
    down: ClassVar[str] = "r*d + h"
    seed: int = 0  # of A_0

    def start(self, adapter: Adapter) -> ServerState:
        lora = {path: replace(pair, A=self.frozen_a(path, pair.B, pair.shape[1])) for path, pair in adapter.lora.items()}
        return ServerState(replace(adapter, lora=lora))

    def frozen_a(self, path: str, B: Tensor, k: int) -> Tensor:
        """A_0 of a module, (r, k)."""
        return lora_a(self.seed, path, B.shape[1], k)

    def broadcast(self, state: ServerState) -> Payload:
        payload = payload_of(state.adapter, (Role.B, Role.DENSE))
        widths = {f"{path}.k": float(pair.shape[1]) for path, pair in state.adapter.lora.items()}
        return replace(payload, scalars={**payload.scalars, **widths})

    def received(self, payload: Payload) -> Adapter:
        lora = {}
        for name, B in payload.tensors.items():
            if payload.roles[name] is Role.B:
                path = name.removesuffix(f".{Role.B}")
                A = self.frozen_a(path, B, int(payload.scalars[f"{path}.k"]))
                lora[path] = Factors(A, B, payload.scalars[f"{path}.scale"])
        return adapter_of(payload, like=Adapter(lora))
