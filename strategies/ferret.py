"""Ferret (Shu et al., ICML 2025, arXiv 2409.06277): first-order local training, of which only projections travel.

    client: w = w_0 + what the rounds so far have added;  trains w as ever;  Delta_l, the change of each tensor l
            gamma_k = <Delta_l, v_k> / K_l along K_l directions that are fresh in each round and common to all
    server: gamma = sum_i p_i gamma_i                          K numbers in all, appended to the history
    all:    w_l <- w_l + server_lr sum_k gamma_k v_k

The directions are signs, with E[v v^T] = 1, so the sum over k is Delta_l in the mean. (The paper's are truncated normal, of
variance 1/(3 d_l), and need the factor 3 d_l / K_l. The published code has d_l / K_l: a third of it.) It is also mostly noise
where K_l << d_l, with an error of sqrt(d_l / K_l) times Delta_l: of whole models `server_lr` must then be far below 1, about
as zeroth order's learning rate is below that of gradients. `projection = "orthogonal"` has its own shrinking, so its
`server_lr` may be above 1, up to n/K; and it is much the faster. Both, with their errors: fedtune/projections.py.

As all use the same directions only sums are asked for, and a round is K numbers down for each that a client missed
(strategies/catch_up.py). A client of a phone's memory this is not for: local training is by gradients.

K is split over the tensors by `allocation`, at least 1 each: in the first round in proportion to their sizes d_l, later so that
sum_l d_l/K_l |Delta_l|^2, the square of all noise, is least: K_l ~ sqrt(d_l) |Delta_l|. The norms are those of the last round's
mean change, estimated from its coefficients. "norms" is the paper's K_l ~ |Delta_l|, "sizes" stays with the first split.

`trains = "adapter"`: the same on A, B and the whole parameters. A client is sent the adapter that the run began with once and
keeps it. Factors have far fewer numbers than weights, so the error is much smaller for the same K.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedtune.adapter import Adapter
from fedtune.errors import ClientFailed, StrategyError
from fedtune.job import Job
from fedtune.memory import Memory
from fedtune.payload import Payload, adapter_of, payload_of, vectors
from fedtune.projections import Kind, Projected, Projection
from fedtune.recipe import Recipe
from fedtune.seeds import seed_of
from fedtune.strategy import Answer, Answers, Ask, ClientInfo, Limits, LocalModel, Movable, ServerState, Strategy
from strategies.allocation import Rule, Split
from strategies.catch_up import HELD, Rounds, caught_up, everything, grown, lacking, rounds_in
from strategies.kept_start import start_of, with_start
from strategies.seeded import require_movable_weights

GAMMAS = "gammas"
SIZE = "size."  # in the state, before the name of a tensor of the whole model
POSITIVE = ("K", "server_lr", "clip")


@dataclass(frozen=True)
class Ferret(Strategy):
    """Ferret: first-order training of the whole model, or an adapter; up and down go K projections of the change."""

    name: ClassVar[str] = "ferret"
    paper: ClassVar[str] = "Shu et al., ICML 2025, arXiv 2409.06277"
    up: ClassVar[str] = "K"
    down: ClassVar[str] = "missed*K"  # and, with trains = "adapter", once r*(d + k) + h
    secure_sum: ClassVar[bool] = True
    trains: Literal["whole", "adapter"] = "whole"
    K: int = 4096  # directions of a round, of all tensors together
    projection: Kind = "signs"
    allocation: Rule = "least_noise"
    server_lr: float = 1.0
    clip: float = 1000.0  # of a coefficient: a client cuts its own, and the server refuses what is beyond
    seed: int = 0  # of all directions

    def __post_init__(self) -> None:
        for setting in POSITIVE:
            if not 0 < getattr(self, setting) < math.inf:
                raise StrategyError(f"strategy 'ferret' needs {setting} above 0 and finite, given {getattr(self, setting)}")

    # server

    @property
    def trains_whole(self) -> bool:
        return self.trains == "whole"

    @property
    def exact_down(self) -> str:  # type: ignore[override]
        return "" if self.trains_whole else "clients keep the adapter that the run began with, and its hash is checked"

    def check_job(self, job: Job) -> None:
        if self.trains_whole:
            require_movable_weights(job, self.name)

    def check(self, clients: Sequence[ClientInfo]) -> None:
        super().check(clients)
        if self.trains_whole and clients and clients[0].sizes:
            self._split.first(clients[0].sizes)

    def start(self, adapter: Adapter) -> ServerState:
        state = ServerState(adapter)
        if not self.trains_whole:
            self._split.first(self._sizes(state))
        return state

    def round(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Generator[Ask, Answers, ServerState]:
        if cohort and not self._sizes(state):
            sizes = {SIZE + name: float(size) for name, size in cohort[0].sizes.items()}
            state = replace(state, scalars={**state.scalars, **sizes})
        ids = [client.id for client in cohort]
        most = self.clip * (1 + 1e-6)  # float32 may round up
        limits = Limits(self.K, -most, most, shortest=self.K)
        answers = yield Ask("train", self.broadcast(state), per_client=self._lacking(state, ids), vectors={GAMMAS: limits})
        return grown(state, {GAMMAS: answers.mean().tensors[GAMMAS]}, ids, answers.weights)

    def published(self, state: ServerState) -> Adapter | Recipe:
        recipe = self._recipe(rounds_in(state.tensors), self._sizes(state))
        if self.trains_whole:
            return recipe
        start = payload_of(state.adapter)
        tensors = {name: tensor.clone() for name, tensor in start.tensors.items()}
        for name, tensor in tensors.items():
            recipe.add_to(name, tensor, lr=1.0)
        return adapter_of(replace(start, tensors=tensors), like=state.adapter)

    def broadcast(self, state: ServerState) -> Payload:
        rounds = everything(state)
        return rounds if self.trains_whole else with_start(rounds, state.adapter, whole=True)

    def evaluation(self, state: ServerState, clients: Sequence[str]) -> Ask:
        return Ask("evaluate", self.broadcast(state), per_client=self._lacking(state, clients))

    def _lacking(self, state: ServerState, clients: Collection[str]) -> Mapping[str, Payload]:
        """For each client that holds something, what it lacks. An adapter is held by whoever answered at all."""
        by_client = lacking(state, clients)
        if self.trains_whole:
            return by_client
        noted = {client: everything(state) for client in clients if f"{HELD}.{client}" in state.scalars}
        different = {id(rounds): rounds for rounds in (noted | by_client).values()}
        sent = {key: with_start(rounds, state.adapter, whole=False) for key, rounds in different.items()}
        return {client: sent[id(rounds)] for client, rounds in (noted | by_client).items()}

    def _sizes(self, state: ServerState) -> dict[str, int]:
        """Of each tensor that trains, by names in order; of the whole model empty before the first round."""
        told = {name.removeprefix(SIZE): int(size) for name, size in state.scalars.items() if name.startswith(SIZE)}
        own = {name: tensor.numel() for name, tensor in payload_of(state.adapter).tensors.items()}
        return dict(sorted((told if self.trains_whole else own).items()))

    # client

    def answer(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        model, past = self._rebuilt(ask.payload, local, memory)
        metrics = model.fit()
        counts = self._split.of_all(_gammas(past), _sizes_of(model))[-1]
        kept = {name: self._projection.coefficients(name, change, len(past), counts[name]) for name, change in model.changes()}
        gammas = torch.cat([kept[name] for name in counts])
        if not torch.isfinite(gammas).all():
            raise ClientFailed("its training diverged: the change of its weights is not finite; lower train.lr")
        return Answer(vectors({GAMMAS: gammas.clamp(-self.clip, self.clip).float()}), local.examples, metrics)

    def use(self, payload: Payload, local: LocalModel, memory: Memory) -> None:
        self._rebuilt(payload, local, memory)

    def _rebuilt(self, payload: Payload, local: LocalModel, memory: Memory) -> tuple[Movable, Rounds]:
        """The tensors as the rounds so far have made them, and these rounds."""
        if self.trains == "adapter":
            local.load(start_of(payload, memory))
        model, past = local.movable(self.trains), caught_up(payload, memory)
        model.rebuild(self._recipe(past, _sizes_of(model)))
        return model, past

    # both

    @property
    def _projection(self) -> Projection:
        return Projection(seed_of("directions", self.seed), self.projection)

    @property
    def _split(self) -> Split:
        return Split(self.K, self.allocation, self._projection)

    def _recipe(self, past: Rounds, sizes: Mapping[str, int]) -> Recipe:
        """One part for each round, so that whoever was there and whoever comes later add the same numbers in the same order."""
        counts = self._split.of_all(_gammas(past), sizes) if past else []
        changes = [self.server_lr * gammas for gammas in _gammas(past)]
        parts = [Projected(self._projection, t, counts[t], change) for t, change in enumerate(changes)]
        return Recipe(tuple(parts), by_rate=False)


def _gammas(past: Rounds) -> list[Tensor]:
    """Of each round (K,)."""
    return [round[GAMMAS] for round in past]


def _sizes_of(model: Movable) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in sorted(model.shapes.items())}
