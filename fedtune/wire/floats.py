"""Floats as bit patterns: `fp32` loses nothing, `fp16` and `bf16` round to nearest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fedtune.wire.stage import Array, Draw, Form, Kind, Stage


class Words(Stage):
    """Each number as one word of so many bits."""

    bits: ClassVar[int]

    def carrier(self, given: Form) -> Form:
        return Form((given.count,), Kind.WORDS, 0, 2**self.bits - 1)


@dataclass(frozen=True)
class Fp32(Words):
    name: ClassVar[str] = "fp32"
    exact: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    bits: ClassVar[int] = 32

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        return np.ascontiguousarray(x, np.float32).reshape(-1).view(np.uint32), {}

    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        return carrier.view(np.float32)

    def error(self, x: Array) -> float:
        return 0.0


class _Half(Words):
    """Through torch, which knows both formats."""

    bits: ClassVar[int] = 16
    dtype: ClassVar[torch.dtype]
    most: ClassVar[float]  # larger numbers are cut to it: infinity is no update
    relative: ClassVar[float]  # half the distance to the next number
    least: ClassVar[float]  # half of the smallest that there is

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        cut = torch.from_numpy(np.ascontiguousarray(x, np.float32).reshape(-1)).clamp(-self.most, self.most)
        return cut.to(self.dtype).view(torch.int16).numpy().view(np.uint16), {}

    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        words = torch.from_numpy(np.ascontiguousarray(carrier).view(np.int16))
        plain: Array = words.view(self.dtype).float().numpy()
        return plain

    def error(self, x: Array) -> float:
        sizes = np.abs(x.astype(np.float64))
        kept = np.maximum(sizes * self.relative, self.least)
        return float(np.linalg.norm(np.where(sizes > self.most, sizes - self.most + kept, kept)))


@dataclass(frozen=True)
class Fp16(_Half):
    name: ClassVar[str] = "fp16"
    dtype: ClassVar[torch.dtype] = torch.float16
    most: ClassVar[float] = 65504.0
    relative: ClassVar[float] = 2.0**-11
    least: ClassVar[float] = 2.0**-25


@dataclass(frozen=True)
class Bf16(_Half):
    name: ClassVar[str] = "bf16"
    dtype: ClassVar[torch.dtype] = torch.bfloat16
    most: ClassVar[float] = float(torch.finfo(torch.bfloat16).max)
    relative: ClassVar[float] = 2.0**-8
    least: ClassVar[float] = 2.0**-134
