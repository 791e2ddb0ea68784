"""RoLoRA (Chen et al., NeurIPS 2025, arXiv 2502.01755): the factors take turns, so that each mean is exact.

    odd rounds:   B = sum_i p_i B_i   with A frozen          sum_i p_i s B_i A = s B A
    even rounds:  A = sum_i p_i A_i   with B frozen          sum_i p_i s B A_i = s B A

B goes first: B starts at zero, and with it the gradient of A is zero. Unlike FFA-LoRA it learns both factors, for the same
traffic up. Down go both: a factor that has not changed since a client last saw it is sent again, since a client may have
missed the round that changed it and the broadcast carries no version.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fedtune.payload import Role
from fedtune.strategy import ServerState
from strategies.one_factor import OneFactor

PLAYED = "rounds"  # in the state: how many rounds were played


@dataclass(frozen=True)
class RoLoRA(OneFactor):
    """RoLoRA: B and A train in turn, B first (exact). Needs one rank for all clients."""

    name: ClassVar[str] = "rolora"
    paper: ClassVar[str] = "Chen et al., NeurIPS 2025, arXiv 2502.01755"
    up: ClassVar[str] = "r*(d if odd else k) + h"  # odd: whether the number of the round is
    down: ClassVar[str] = "r*(d + k) + h"

    def trains(self, state: ServerState) -> Role:
        return Role.A if state.scalars.get(PLAYED, 0.0) % 2 else Role.B

    def after(self, state: ServerState) -> ServerState:
        return replace(state, scalars={**state.scalars, PLAYED: state.scalars.get(PLAYED, 0.0) + 1})
