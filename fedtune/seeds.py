"""Randomness that is named, never shared: every draw has its own seed from (seed, round, client, purpose).

`uniform` is made from raw Philox words (Salmon et al. 2011) as numpy ships them, with our own map to floats, so that
two machines get the same bits from the same names. `torch.manual_seed` gives no such promise across devices.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def seed_of(*names: object) -> int:
    """A 63-bit seed for this sequence of names; any difference in a name gives another seed."""
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def uniform(shape: tuple[int, ...], bound: float, *names: object) -> Tensor:
    """float32 tensor, uniform on [-bound, bound), the same bits on every machine."""
    words = np.random.Philox(key=seed_of(*names)).random_raw(int(np.prod(shape)))
    unit = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)  # 24 bits: exact in float32
    return torch.from_numpy((unit * np.float32(2) - np.float32(1)) * np.float32(bound)).reshape(shape)


def lora_a(seed: int, path: str, rank: int, k: int) -> Tensor:
    """The A that a module starts from, (rank, k): the distribution of PEFT, U(-1/sqrt(k), 1/sqrt(k))."""
    return uniform((rank, k), float(np.float32(1.0) / np.sqrt(np.float32(k))), seed, "lora_A", path, rank)


def generator(*names: object) -> torch.Generator:
    """A torch generator on the CPU for draws that need not be the same across versions of torch."""
    return torch.Generator().manual_seed(seed_of(*names) & 0xFFFFFFFF)
