"""The tensors that a seed method moves on the resident model: what the whole model and the adapter's slot have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from client.allowance import check
from client.data.batches import collate
from client.data.examples import Example
from client.fit import on_device, parts_of
from client.model import ResidentModel
from fedtune.directions import Combination
from fedtune.recipe import Part, Recipe

HALVES = {torch.bfloat16: 16, torch.float16: 13}  # bits of float32 that each drops


class Place(ABC):
    """Named parameters of the resident model, and the loss that they give."""

    def __init__(self, resident: ResidentModel, parameters: Mapping[str, nn.Parameter]) -> None:
        self.resident, self.parameters = resident, parameters
        self.autocast = False  # bf16 where the job asks for it: a difference of such losses is mostly noise
        self.batch: Sequence[Example] = ()
        self.micro_batch: int | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}

    @abstractmethod
    def rebuild(self, recipe: Recipe, lr: float) -> None:
        """The parameters become those that they began with, and what the recipe adds."""

    @abstractmethod
    def shifted(self, change: Combination, scale: float) -> AbstractContextManager[None]: ...

    @abstractmethod
    def fitted(self, first_order: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
        """What `first_order`, training by gradients, says of itself; these parameters take part in it."""

    @abstractmethod
    def began(self, name: str) -> Tensor:
        """The parameter as `rebuild` left it, float32."""

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters.items():
            yield name, parameter.detach().cpu().float() - self.began(name).cpu()

    def move(self, change: Part, scale: float, draw: torch.Generator) -> None:
        """`w += scale * change`; weights of 16 bits are rounded up or down by chance, right in the mean: to the nearest, most
        small steps would be lost."""
        for name, parameter in self.parameters.items():
            check()
            if parameter.dtype is torch.float32 and parameter.is_contiguous():
                change.add_to(name, parameter.data, scale)
            else:
                summed = parameter.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
                change.add_to(name, summed, scale)
                put(parameter, summed, draw)

    @torch.no_grad()
    def loss(self) -> float:
        """Of the batch, in nats per token (or example). The model is in evaluation mode: no dropout."""
        return sum(part.item() for part in self._losses({}))

    def derivative(self, change: Combination) -> float:
        names = {id(parameter): name for name, parameter in self.resident.peft.named_parameters()}
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # the only kernel with a forward mode
            duals = {
                names[id(parameter)]: forward_ad.make_dual(parameter.detach(), _direction(name, parameter, change))
                for name, parameter in self.parameters.items()
            }
            slopes = [forward_ad.unpack_dual(part).tangent for part in self._losses(duals)]
            return sum(slope.item() for slope in slopes if slope is not None)

    def _losses(self, instead: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Of the parts of the batch; they sum to its loss. `instead` replaces parameters by their full names."""
        resident = self.resident
        resident.peft.eval()
        for part, share, options in parts_of(resident, self.batch, self.micro_batch or len(self.batch)):
            given = {**on_device(collate(part, resident.pad), resident.device), **options}
            with torch.autocast(resident.device.type, dtype=torch.bfloat16, enabled=self.autocast):
                output = functional_call(resident.peft, dict(instead), (), given) if instead else resident.peft(**given)
                yield output.loss * share


def put(parameter: nn.Parameter, value: Tensor, draw: torch.Generator) -> None:
    """Write a float32 value into a parameter, with stochastic rounding where it has 16 bits."""
    if dropped := HALVES.get(parameter.dtype):
        bits = value.view(torch.int32)
        noise = torch.randint(0, 2**dropped, bits.shape, generator=draw, dtype=torch.int32, device=bits.device)
        value = (bits + noise & -(2**dropped)).view(torch.float32)
    parameter.data.copy_(value)


def _direction(name: str, parameter: nn.Parameter, change: Combination) -> Tensor:
    tangent = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
    change.add_to(name, tangent)
    return tangent.to(parameter.dtype)
