"""What is trained and sent: LoRA pairs by the module that they adapt, and dense tensors beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """One LoRA pair. It adds `scale * B @ A` to a weight of shape (d, k).

    `scale` is alpha/r, or alpha/sqrt(r) for rsLoRA: it belongs to the pair and is never assumed.
    """

    A: Tensor  # (r, k)
    B: Tensor  # (d, r)
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k) of the adapted weight."""
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True)
class Adapter:
    """A set of changes to the base model whose hash is `base`.

    `lora` maps the path of an adapted module (`model.layers.0.self_attn.q_proj`) to its pair; `dense` maps the name of
    a parameter (`score.weight`) to its whole new value.
    """

    lora: Mapping[str, Factors] = field(default_factory=dict)
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    base: str = ""

    @property
    def ranks(self) -> dict[str, int]:
        return {path: pair.rank for path, pair in self.lora.items()}

    def parameters(self) -> int:
        """How many numbers the adapter holds."""
        pairs = sum(pair.A.numel() + pair.B.numel() for pair in self.lora.values())
        return pairs + sum(tensor.numel() for tensor in self.dense.values())


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """Every tensor of it times `factor`: for gradients and differences, not for products."""
    lora = {path: Factors(pair.A * factor, pair.B * factor, pair.scale) for path, pair in adapter.lora.items()}
    return Adapter(lora, {name: tensor * factor for name, tensor in adapter.dense.items()}, adapter.base)
