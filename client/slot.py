"""The adapter in the resident model's slot, moved by seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from client.model import ResidentModel
from client.place import Place
from fedtune.directions import Combination
from fedtune.payload import payload_of
from fedtune.recipe import Recipe


class Slot(Place):
    """Factors and whole parameters under their names in a payload. They are few: a shift replaces all at once."""

    def __init__(self, resident: ResidentModel) -> None:
        super().__init__(resident, payload_of(resident.live()).tensors)  # type: ignore[arg-type]  # live parameters
        self._base = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._began = self._base

    def rebuild(self, recipe: Recipe, lr: float) -> None:
        self._began = {name: base.clone() for name, base in self._base.items()}
        for name, parameter in self.parameters.items():
            recipe.add_to(name, self._began[name], lr)
            parameter.data.copy_(self._began[name])

    def began(self, name: str) -> Tensor:
        return self._began[name]

    def fitted(self, first_order: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
        return first_order()

    @contextmanager
    def shifted(self, change: Combination, scale: float) -> Iterator[None]:
        kept = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = change.added_to(name, parameter, scale)
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = kept[name]
