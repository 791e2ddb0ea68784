"""Fresh directions for clients of unequal ranks: a smaller client's rows of A are the first rows of a larger one's."""

from __future__ import annotations

import torch

from fedtune import lora
from fedtune.adapter import Factors
from fedtune.seeds import lora_a


def grown(pair: Factors, rank: int, path: str, seed: int) -> Factors:
    """The same product at no less than `rank`: rows of A as PEFT draws them, each from a seed of its own, and B = 0."""
    rank, k = max(rank, pair.rank), pair.shape[1]
    fresh = [lora_a(seed, f"{path}[{row}]", 1, k) for row in range(pair.rank, rank)]  # (1, k) each
    return Factors(torch.cat([pair.A, *fresh]), lora.padded(pair, rank).B, pair.scale)


def balanced(pair: Factors, scale: float) -> Factors:
    """The same product with another scale; both factors carry half of the difference."""
    half = (pair.scale / scale) ** 0.5
    return Factors(pair.A * half, pair.B * half, scale)
