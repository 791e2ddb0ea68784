"""The resident model's own weights, moved by seeds: rebuilt from a recipe, shifted for a forward pass, given back unchanged.

Memory is that of inference. The base weights and the sum of all changes (float32) lie in files that are mapped into memory, so
nothing drifts: a rebuild always computes `base + sum` and rounds it once. For a shift no weight is written at all: while a
module computes, it sees a shifted copy of its own parameters, made just before and dropped right after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from client.allowance import check
from client.mapped import in_file
from client.model import ResidentModel
from client.place import Place
from fedtune.directions import Combination
from fedtune.recipe import Part, Recipe


class WholeModel(Place):
    """One for a resident model. While it is `open` the LoRA layers are switched off; `close` leaves the base as it was."""

    def __init__(self, resident: ResidentModel, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(resident, parameters)
        self._base = self._mapped({name: parameter.dtype for name, parameter in parameters.items()})
        self._sum = self._mapped(dict.fromkeys(parameters, torch.float32))
        for name, parameter in parameters.items():
            self._base[name].copy_(parameter.detach())
        self._recipe: Recipe | None = Recipe()  # what the sum is of
        self._clean, self._hooks = True, list[RemovableHandle]()  # whether the parameters are base and sum
        self._require_gradients(False)
        self._shift: tuple[Combination, float] | None = None
        self._kept: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # what a shifted copy stands in for, and where that lies
        self._room: list[Tensor] = []  # for shifted copies, one after the other in the same memory
        self.moved = 0.0  # share of the weights in which the last recipe differs from the one that was here before

    def open(self) -> None:
        self.resident.switch_lora(on=False)
        for module, own in self._owners().items():
            shift = module.register_forward_pre_hook(lambda _, __, own=own: self._put_shifted(own))
            back = module.register_forward_hook(lambda _, __, ___, own=own: self._put_back(own), always_call=True)
            self._hooks += [shift, back]

    def close(self) -> None:
        """The base weights again, exactly, and the LoRA layers."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._room.clear()
        self._require_gradients(False)
        for name, base in self._base.items():
            self._put(name, base)
        self.resident.switch_lora(on=True)

    def fitted(self, first_order: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
        """In float32 until the next `rebuild`: 16 bits would lose most steps of an optimiser."""
        self._require_gradients(True)
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()
        try:
            return first_order()
        finally:
            self._require_gradients(False)

    def _require_gradients(self, on: bool) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_(on)
            parameter.grad = None
        self._clean = False

    def rebuild(self, recipe: Recipe, lr: float) -> None:
        """Of a recipe that goes on where the last one ended, only the new parts are computed."""
        known = len(self._recipe.parts) if self._recipe and recipe.extends(self._recipe) else None
        same = known == len(recipe.parts)
        if same and self._clean:
            return
        self._recipe = None  # should this break off half way, the next one starts from the base
        changed = sum(self._rebuilt(name, recipe, lr, known) for name in self.parameters)
        if not same:
            trained = any(total.any() for total in self._sum.values())  # else it is the base, whatever was there before
            self.moved = trained * changed / sum(parameter.numel() for parameter in self.parameters.values())
        self._recipe, self._clean = recipe, True

    def move(self, change: Part, scale: float, draw: torch.Generator) -> None:
        self._clean = False
        super().move(change, scale, draw)

    def began(self, name: str) -> Tensor:
        return self._rounded(name).float()

    @property
    def is_open(self) -> bool:
        return bool(self._hooks)

    @contextmanager
    def shifted(self, change: Combination, scale: float) -> Iterator[None]:
        self._shift = change, scale
        try:
            yield
        finally:
            while self._kept:  # where Ctrl-C came within a module
                self._put_back_one()
            self._shift = None

    def _rebuilt(self, name: str, recipe: Recipe, lr: float, known: int | None) -> int:
        """Write one parameter anew; how many of its numbers are others than the last recipe gave."""
        check()
        before, total = self._rounded(name), self._sum[name]
        if known is None:
            total.zero_()
        on_device = total.to(self.resident.device)  # on a CPU the mapped file itself
        recipe.add_to(name, on_device, lr, after=known or 0)
        total.copy_(on_device)
        after = self._rounded(name)
        self._put(name, after)
        return int((after != before).sum())

    def _put(self, name: str, value: Tensor) -> None:
        """Into the parameter, in the dtype of the base: training may have left float32."""
        parameter = self.parameters[name]
        if parameter.dtype is not value.dtype:
            parameter.data = torch.empty_like(parameter, dtype=value.dtype)
        parameter.data.copy_(value)

    def _rounded(self, name: str) -> Tensor:
        """The parameter that the recipe gives: base and sum, added in float32 and rounded once."""
        base = self._base[name]
        return (base.float() + self._sum[name]).to(base.dtype)

    def _owners(self) -> dict[nn.Module, list[tuple[str, nn.Parameter]]]:
        """Each module with the parameters that it computes with. Attention of torch reads its children's."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        owners: dict[nn.Module, list[tuple[str, nn.Parameter]]] = {}
        inside: set[nn.Module] = set()
        for module in self.resident.peft.modules():
            attention = isinstance(module, nn.MultiheadAttention)
            own = [] if module in inside else list(module.parameters(recurse=attention))
            inside |= set(module.modules()) if attention else set()
            if named := [(names[id(parameter)], parameter) for parameter in own if id(parameter) in names]:
                owners[module] = named
        return owners

    def _put_shifted(self, own: list[tuple[str, nn.Parameter]]) -> None:
        if self._shift is None:
            return
        change, scale = self._shift
        around = {id(parameter) for parameter, _, _ in self._kept}  # shifted for a module around this one, which shares them
        for name, parameter in own:
            data, room = parameter.data, self._room_for(parameter)
            self._kept.append((parameter, data, room))
            if id(parameter) not in around and change.directions.touches(name):
                out = room[: data.numel()].view(data.shape)
                parameter.data = change.added_to(name, data, scale, out=out).to(data.dtype)

    def _put_back(self, own: list[tuple[str, nn.Parameter]]) -> None:
        if self._shift is None:
            return
        for _ in own:
            self._put_back_one()

    def _put_back_one(self) -> None:
        parameter, data, room = self._kept.pop()
        parameter.data = data
        self._room.append(room)

    def _room_for(self, parameter: nn.Parameter) -> Tensor:
        """float32 memory that is large enough, taken from what is not in use."""
        size = parameter.numel()
        number = next((number for number, room in enumerate(self._room) if room.numel() >= size), None)
        return torch.empty(size, device=parameter.device) if number is None else self._room.pop(number)

    def _mapped(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """A tensor in a file for each parameter, on the CPU, zero."""
        return {name: in_file(self.parameters[name].shape, dtype) for name, dtype in dtypes.items()}
