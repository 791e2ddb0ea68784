"""A core R (r, r) between the two factors of a LoRA layer: the layer computes `s B R A x`, and only R needs to train."""

from __future__ import annotations

from collections.abc import Mapping

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

SLOT, NAME = "default", "core"


def put_cores(layers: Mapping[str, LoraLayer], cores: Mapping[str, Tensor]) -> None:
    """Give the named layers their cores and take away those of all others."""
    for path, layer in layers.items():
        down = layer.lora_A[SLOT]
        if path in cores:
            _put(down, cores[path])
        elif hasattr(down, NAME):
            down.core_hook.remove()
            del down.core, down.core_hook


def cores_of(layers: Mapping[str, LoraLayer]) -> dict[str, nn.Parameter]:
    return {path: layer.lora_A[SLOT].core for path, layer in layers.items() if hasattr(layer.lora_A[SLOT], NAME)}


def _put(down: nn.Linear, core: Tensor) -> None:
    if not hasattr(down, NAME):
        down.core_hook = down.register_forward_hook(_times_core)
    down.core = nn.Parameter(core.detach().to(down.weight.device, down.weight.dtype, copy=True))


def _times_core(down: nn.Module, _: object, output: Tensor) -> Tensor:
    return nn.functional.linear(output, down.core)  # A x (.., r) becomes R A x
