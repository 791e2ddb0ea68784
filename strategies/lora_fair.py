"""LoRA-FAIR (Bian et al., ICCV 2025, arXiv 2411.14961): averaged factors, and B corrected on the server.

    A = sum_i p_i A_i,  B = sum_i p_i B_i,  DW = sum_i p_i s_i B_i A_i                                  eq. (5), (6)
    dB = argmin |DW/s - (B + dB) A|_F^2 + lambda |dB|_F^2
       = ((DW/s) A^T - B A A^T) (A A^T + lambda I)^-1
    published: A, B + dB

DW is held as a stack of factors, so `DW A^T` (d, r) needs no d x k matrix and only an r x r system is solved, in float64.
Two choices differ from the paper. It names a cosine as the distance and gradient steps as the solver: a cosine does not
see the length of what it compares, so dB could grow or shrink at will; with the squared norm the minimum is closed form.
And lambda stands beside A A^T, so it is given relative to it: `lambda = regularization * tr(A A^T) / r`.

What of DW lies outside the row space of A stays lost: a smaller error than FedAvg's, not none.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.adapter import Factors
from fedtune.aggregation import aggregation_error, exact_mean
from fedtune.errors import StrategyError
from fedtune.payload import adapter_of, payload_of
from fedtune.strategy import ADAPTER, Answers, Ask, ClientInfo, Fold, ServerState
from strategies.fedavg import FedAvg

SMALLEST = 1e-12  # below it float64 cannot tell A A^T + lambda I from A A^T


@dataclass(frozen=True)
class LoraFair(FedAvg):
    """LoRA-FAIR: FedAvg whose server corrects B towards the exact mean. Needs one rank for all clients."""

    name: ClassVar[str] = "lora_fair"
    paper: ClassVar[str] = "Bian et al., ICCV 2025, arXiv 2411.14961"
    secure_sum: ClassVar[bool] = False
    regularization: float = 0.01  # lambda, relative to the mean eigenvalue of A A^T

    def __post_init__(self) -> None:
        if not (math.isfinite(self.regularization) and self.regularization >= SMALLEST):
            raise StrategyError(
                f"strategy 'lora_fair' needs regularization of at least {SMALLEST:g}, given {self.regularization}"
            )

    def round(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Generator[Ask, Answers, ServerState]:
        answers = yield Ask("train", self.broadcast(state), Fold.EACH, wants=ADAPTER)
        scales = payload_of(state.adapter, ()).scalars  # everybody's, whatever a client says
        averaged = adapter_of(replace(answers.mean(), scalars=scales), like=state.adapter)
        exact = exact_mean(answers)
        lora = {path: corrected(pair, exact[path], self.regularization) for path, pair in averaged.lora.items()}
        return replace(state, adapter=replace(averaged, lora=lora), metrics=aggregation_error(exact, lora))


def corrected(mean: Factors, exact: Factors, regularization: float) -> Factors:
    """The averaged pair with `B + dB` in place of B."""
    return replace(mean, B=(mean.B.double() + correction(mean, exact, regularization)).float())


def correction(mean: Factors, exact: Factors, regularization: float) -> Tensor:
    """dB (d, r), for which `s (B + dB) A` is nearest to the product of `exact`."""
    A, B = mean.A.double(), mean.B.double()  # (r, k), (d, r)
    gram = A @ A.T  # (r, r)
    penalty = regularization * gram.trace() / mean.rank
    if penalty == 0:  # A = 0: no B makes a difference
        return torch.zeros_like(B)
    wanted = (exact.scale / mean.scale) * exact.B.double() @ (exact.A.double() @ A.T)  # DW/s A^T, (d, r)
    system = gram + penalty * torch.eye(mean.rank, dtype=torch.float64)
    dB: Tensor = torch.linalg.solve(system, wanted - B @ gram, left=False)
    return dB
