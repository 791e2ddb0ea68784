"""FedSVD (Lee et al., NeurIPS 2025, arXiv 2505.12805): FFA-LoRA whose A follows what was learnt.

    clients: train B_i, A frozen        server: B = sum_i p_i B_i,   U S V^T = svd(B A),   A' = V^T,   B' = U S

The refresh keeps the product, and the mean is exact as A is the same for all: `s B' A' = sum_i p_i s B_i A`. The next round
trains B on the directions that matter, on orthonormal rows: `|dL/dB| <= s |dL/dz| |x|`, whatever the round, so that clipping
and noise act on the same scale throughout. The random A of the first round is made orthonormal too, so that one learning
rate fits all rounds.

Where the product has fewer directions than r, the SVD fills A with further orthonormal rows from the span of the A before,
and B has zero columns there (the first round: B = 0). The signs of an SVD are open; lora.svd fixes them by a rule, and no
alignment with the A before is needed: a row of A flips together with its column of B, and nothing outlives a round that
would remember the old sign.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fedtune import lora
from fedtune.adapter import Adapter, Factors
from fedtune.strategy import ServerState
from strategies.one_factor import OneFactor


@dataclass(frozen=True)
class FedSVD(OneFactor):
    """FedSVD: B averaged, then A made anew from the SVD of the product (exact). Needs one rank for all clients."""

    name: ClassVar[str] = "fedsvd"
    paper: ClassVar[str] = "Lee et al., NeurIPS 2025, arXiv 2505.12805"
    up: ClassVar[str] = "r*d + h"
    down: ClassVar[str] = "r*(d + k) + h"
    steady: ClassVar[bool] = False

    def start(self, adapter: Adapter) -> ServerState:
        return self.after(ServerState(adapter))

    def after(self, state: ServerState) -> ServerState:
        pairs = {path: refreshed(pair) for path, pair in state.adapter.lora.items()}
        return replace(state, adapter=replace(state.adapter, lora=pairs))


def refreshed(pair: Factors) -> Factors:
    """The same product and scale, with orthonormal rows of A in the order of their weight."""
    U, S, Vt = lora.svd(pair)  # (d, r), (r,), (r, k)
    return Factors(Vt.float(), (U * S / pair.scale).float(), pair.scale)
