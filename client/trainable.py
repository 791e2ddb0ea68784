"""What a method that trains parts sees of the resident model: one client's batches on the tensors that it names."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from client.costs import measured_costs
from client.data.examples import Example
from client.fit import accumulate, fit, longest, losses
from client.gradients import Gradients
from client.masters import Masters
from client.model import ResidentModel
from client.room import within_memory
from client.slot_tensors import SlotTensors
from client.weights import OwnWeights
from fedtune.job import Train
from fedtune.job_sections import Data
from fedtune.trainable import Costs, Probe

Batches = Iterator[Sequence[Example]]


@dataclass
class TrainableModel:
    """A Trainable for one client in one round. `seeded` is entered around whatever draws: dropout."""

    place: OwnWeights | SlotTensors
    batches: Callable[[], Batches]  # of the round, from its first
    train: Train
    steps: int
    peak_lr: float
    seeded: Callable[[], AbstractContextManager[None]]
    data: Data = field(default_factory=Data)
    memory: float = math.inf  # bytes that a step may take on this client
    _trained: dict[str, Tensor] = field(default_factory=dict)  # in float32, where the model may have rounded

    @property
    def resident(self) -> ResidentModel:
        return self.place.resident

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.place.parameters.items()}

    def put(self, values: Mapping[str, Tensor]) -> None:
        self.place.put(values)
        self._trained = {}

    def values(self, names: Collection[str]) -> Mapping[str, Tensor]:
        return {name: self._trained[name].clone() if name in self._trained else self._now(name) for name in names}

    def probe(self, names: Collection[str], batches: int, signal: bool = False) -> Mapping[str, Probe]:
        given = list(islice(self.batches(), batches))
        with self.seeded(), self.resident.recomputing(self.memory < math.inf), self.alone(names) as parameters:
            self.resident.peft.train()
            attempt = partial(self._probed, parameters, given, signal)
            return within_memory(
                self.resident, "training", self._at_a_time(given), attempt, partial(_drop, parameters.values())
            )

    def _probed(
        self, parameters: Mapping[str, nn.Parameter], batches: Sequence[Sequence[Example]], signal: bool, size: int
    ) -> Mapping[str, Probe]:
        gradients = Gradients(parameters, signal)
        for batch in batches:
            with gradients.of_one_batch(whole=size >= len(batch)):
                accumulate(self.resident, batch, size)
        return gradients.probes()

    @torch.no_grad()
    def loss(self, batches: int) -> float:
        self.resident.peft.eval()
        given = list(islice(self.batches(), batches))
        return within_memory(self.resident, "forward passes", self._at_a_time(given), partial(self._mean_loss, given))

    def _mean_loss(self, batches: Sequence[Sequence[Example]], size: int) -> float:
        return sum(part.item() for batch in batches for part in losses(self.resident, batch, size)) / len(batches)

    def _at_a_time(self, batches: Sequence[Sequence[Example]]) -> int:
        return self.train.micro_batch or longest(batches)

    def fit(self, names: Collection[str]) -> Mapping[str, float]:
        self.place.will_change(names)
        try:
            with self.seeded(), self.alone(names) as parameters:
                masters = Masters(parameters, {**self.place.start, **self._trained})
                figures = fit(self.resident, self.batches(), self.train, self.steps, self.peak_lr, masters=masters)
        finally:
            self.place.changed(names)  # also where the training broke off
        self._trained |= masters.values()
        return figures

    def costs(self, layers: Sequence[Collection[str]]) -> Mapping[str, Costs]:
        return measured_costs(self, layers)

    @contextmanager
    def alone(self, names: Collection[str]) -> Iterator[dict[str, nn.Parameter]]:
        """Only these need a gradient: so no activations are kept below the lowest of them."""
        before = {parameter: parameter.requires_grad for parameter in self.resident.peft.parameters()}
        wanted = {name: self.place.parameters[name] for name in names}
        _drop(before)  # of a training that broke off
        for parameter in before:
            parameter.requires_grad_(False)
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        try:
            yield wanted
        finally:
            _drop(before)
            for parameter, needed in before.items():
                parameter.requires_grad_(needed)

    def _now(self, name: str) -> Tensor:
        start: Any = self.place.start.get(name)
        return (self.place.parameters[name] if start is None else start).detach().to("cpu", torch.float32, copy=True)


def _drop(parameters: Iterable[nn.Parameter]) -> None:
    """Their gradients."""
    for parameter in parameters:
        parameter.grad = None
