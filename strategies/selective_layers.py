"""Selective layers (Sun et al. 2024, arXiv 2408.15600): each client trains the few layers that it can afford and that matter.

    probe:  client i: v_i[l] = sum over a few batches of |g_l|^2, the gradient by layer l;  up go L numbers
    choose: masks m_i within the clients' budgets, by (P1) of strategies/layer_choice.py or another rule of layer_rules.py
    train:  client i: local steps on the layers with m_i(l) = 1 and on what always trains; up go their new values w_i,l
    server: w_l = sum_{i: m_i(l) = 1} n_i w_i,l / sum_{j: m_j(l) = 1} n_j        for each layer that somebody chose

The paper averages differences, w_l + sum_i p_i,l (w_i,l - w_l), which is the same: of each layer the weights sum to 1. Layers
that nobody chose stay as they are, to the bit. The server starts without weights and keeps those that have changed; down goes
what changed since the client's last visit (strategies/changed_tensors.py).

`trains = "weights"`: a layer's own parameters, with gradients and optimiser state for them alone, and no activations kept below
the lowest one that trains. "adapter": the LoRA pairs in it; factors are averaged as fedavg does. `always` names what trains on
every client beside its layers, such as `norm` or `lm_head`; heads that the job starts afresh always do.

`balance` is lambda of (P1), where 1 means: to train a layer alone costs a client as much as a mean gradient brings. (P1)'s own
lambda has the scale of squared norms and grows in effect with the cohort; it is `balance * mean(v) / (m - 1)`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedtune.adapter import Adapter
from fedtune.changed_weights import ChangedWeights
from fedtune.errors import StrategyError
from fedtune.job import Job
from fedtune.memory import Memory
from fedtune.payload import Payload, Role, adapter_of, by_name, joined, payload_of, vectors
from fedtune.seeds import seed_of
from fedtune.strategy import Answer, Answers, Ask, ClientInfo, Fold, Limits, LocalModel, ServerState, Strategy
from fedtune.trainable import Trainable
from strategies.changed_tensors import everything, lacking, noted, received, visited
from strategies.layer_budgets import RESOURCES, budgets_of, measured, told
from strategies.layer_rules import PROBING, Rule, importance_after, select
from strategies.layer_scores import MOST, score, scores_of
from strategies.layer_tensors import Parts, layers_in, mask_of, named_by, numbers_of
from strategies.seeded import require_movable_weights

WEIGHT = "weight."  # in the state, before the name of a parameter
ROUND, SCORES, COSTS, IMPORTANCE, MASK, LAYERS, GAIN = "round", "scores", "costs", "importance", "mask", "layers", "gain"

Step = Generator[Ask, Answers, ServerState]


@dataclass(frozen=True)
class SelectiveLayers(Strategy):
    """Selective layers: each client trains a few layers, chosen by the gradients of all within what it can afford."""

    name: ClassVar[str] = "selective_layers"
    paper: ClassVar[str] = "Sun et al. 2024, arXiv 2408.15600"
    up: ClassVar[str] = "chosen*d*k + h + L"
    down: ClassVar[str] = "changed*d*k + h + n - (-n//8)"
    exact_down: ClassVar[str] = "clients keep the tensors that have changed, and their hashes are checked"
    trains: Literal["weights", "adapter"] = "weights"
    layers: int = 2  # of a client that does not say what it can afford
    rule: Rule = "p1"
    balance: float = 0.0
    probe_every: int = 1  # rounds
    probe_batches: int = 1
    blocks: str = ""  # a pattern of the layers' names, where they are not found by themselves
    always: tuple[str, ...] = ()
    importance_rate: float = 10.0  # of rule "importance", for each nat that a client gains
    seed: int = 0  # of all draws

    def __post_init__(self) -> None:
        for setting in ("layers", "probe_every", "probe_batches"):
            if (given := getattr(self, setting)) < 1:
                raise StrategyError(f"strategy 'selective_layers' needs {setting} of at least 1, given {given}")
        for setting in ("balance", "importance_rate"):
            if not 0 <= (given := getattr(self, setting)) < math.inf:
                raise StrategyError(f"strategy 'selective_layers' needs {setting} of at least 0 and finite, given {given}")
        if self.rule == "snr" and self.probe_batches < 2:
            raise StrategyError('rule "snr" compares the gradients of several batches: set probe_batches to 2 or more')

    # server

    @property
    def trains_whole(self) -> bool:
        return self.trains == "weights"

    @property
    def exact_up(self) -> str:  # type: ignore[override]
        return "a model's own weights come up, and the server has none to add a difference to" if self.trains_whole else ""

    def check_job(self, job: Job) -> None:
        if self.trains_whole:
            require_movable_weights(job, self.name, "strategy.trains=adapter, which trains the adapters in the layers")

    def check(self, clients: Sequence[ClientInfo]) -> None:
        super().check(clients)
        if self.trains_whole and clients and clients[0].sizes:
            Parts.of(clients[0].sizes, self.blocks, self.always, ())

    def start(self, adapter: Adapter) -> ServerState:
        state = ServerState(adapter)
        if self.trains_whole:
            return state
        self._parts(state, ())  # said before anything is written
        return noted(state, payload_of(adapter).tensors, 0)

    def round(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Step:
        number, parts = int(state.scalars.get(ROUND, 0)) + 1, self._parts(state, cohort)
        if unknown := [c.id for c in cohort if c.limits.keys() & RESOURCES and f"{COSTS}.{c.id}" not in state.tensors]:
            state = yield from self._measure(state, cohort, number, parts, unknown)
        if self.rule in PROBING and self._probe_is_due(state, cohort, number):
            state = yield from self._probe(state, cohort, number, parts)
        chosen = self._choose(state, cohort, number, parts)
        names = {client.id: self._names(parts, row, client.id, number) for client, row in zip(cohort, chosen, strict=True)}
        return (yield from self._train(state, cohort, number, parts, chosen, names))

    def _measure(
        self, state: ServerState, cohort: Sequence[ClientInfo], number: int, parts: Parts, unknown: Collection[str]
    ) -> Step:
        """What a step costs those of whom it is not known, in their own bytes and seconds. Others are told of no layers."""
        wanted = dict.fromkeys(RESOURCES, Limits(3, 0, 1e18, 3))
        own = self._layers(cohort, parts) | dict.fromkeys({*_ids(cohort)} - {*unknown}, vectors({LAYERS: torch.zeros(0)}))
        answers = yield self._ask("measure", state, cohort, Fold.EACH, own, wanted)
        costs = {f"{COSTS}.{client}": told(answer.payload.tensors) for client, _, answer in answers if client in unknown}
        return visited(replace(state, tensors={**state.tensors, **costs}), _ids(cohort), answers.weights, number - 1)

    def _probe(self, state: ServerState, cohort: Sequence[ClientInfo], number: int, parts: Parts) -> Step:
        count = len(parts.layers)
        wanted = {SCORES: Limits(count, 0, MOST, count)}
        answers = yield self._ask("probe", state, cohort, Fold.EACH, self._layers(cohort, parts), wanted)
        scores = {f"{SCORES}.{client}": answer.payload.tensors[SCORES] for client, _, answer in answers}
        return visited(replace(state, tensors={**state.tensors, **scores}), _ids(cohort), answers.weights, number - 1)

    def _layers(self, cohort: Sequence[ClientInfo], parts: Parts) -> dict[str, Payload]:
        return dict.fromkeys(_ids(cohort), vectors({LAYERS: numbers_of(parts)}))

    def _probe_is_due(self, state: ServerState, cohort: Sequence[ClientInfo], number: int) -> bool:
        nobody = not any(f"{SCORES}.{client.id}" in state.tensors for client in cohort)
        return nobody or (number - 1) % self.probe_every == 0

    def _choose(self, state: ServerState, cohort: Sequence[ClientInfo], number: int, parts: Parts) -> np.ndarray:
        """(m, L): whether client i trains layer l."""
        if not cohort:
            return np.zeros((0, len(parts.layers)), dtype=bool)
        of_each = {name: {c.id: state.tensors.get(f"{name}.{c.id}") for c in cohort} for name in (COSTS, SCORES)}
        costs, budgets = budgets_of(cohort, of_each[COSTS], parts, self.layers)
        scores = scores_of(of_each[SCORES], len(parts.layers))
        return select(
            self.rule,
            costs,
            budgets,
            scores=scores,
            balance=self.balance * float(scores.mean()) / max(len(cohort) - 1, 1),
            draws=[seed_of("layers", self.seed, number, client.id) for client in cohort],
            importance=self._learnt(state, parts),
        )

    def _learnt(self, state: ServerState, parts: Parts) -> np.ndarray:
        return state.tensors.get(IMPORTANCE, torch.zeros(len(parts.layers))).double().numpy()

    def _names(self, parts: Parts, chosen: np.ndarray, client: str, number: int) -> tuple[str, ...]:
        """The tensors that this client trains."""
        draw = seed_of("half", self.seed, number, client) if self.rule == "half" else None
        return parts.of_layers([layer for layer, on in zip(parts.layers, chosen, strict=True) if on], draw)

    def _train(
        self,
        state: ServerState,
        cohort: Sequence[ClientInfo],
        number: int,
        parts: Parts,
        chosen: np.ndarray,
        names: Mapping[str, tuple[str, ...]],
    ) -> Step:
        wanted = {GAIN: Limits(1, -MOST, MOST, 1)} if self.rule == IMPORTANCE else {}
        masks = {mask: vectors({MASK: mask_of(mask, parts.sizes)}) for mask in set(names.values())}
        own = {client: masks[mask] for client, mask in names.items()}
        answers = yield self._ask("train", state, cohort, Fold.SEEN, own, wanted, names)
        new = {name: tensor for name, tensor in answers.mean().tensors.items() if name != GAIN}
        state = visited(noted(self._with(state, new), new, number), _ids(cohort), answers.weights, number - 1)
        learnt = self._importance(self._learnt(state, parts), dict(zip(names, chosen, strict=True)), answers)
        trained = {client: parts.shares(names[client]) for client in answers.weights}
        layers = sum(share for shares in trained.values() for share in shares.values()) / max(len(trained), 1)
        return replace(
            state,
            tensors={**state.tensors, **learnt},
            scalars={**state.scalars, ROUND: float(number)},
            metrics={"layers_per_client": layers, "tensors_changed": float(len(new))},
            selected=trained,
        )

    def _importance(self, before: np.ndarray, chosen: Mapping[str, np.ndarray], answers: Answers) -> dict[str, Tensor]:
        if self.rule != IMPORTANCE:
            return {}
        gains = {client: answer.payload.tensors[GAIN].item() for client, _, answer in answers}
        shares = np.array([answers.weights[client] for client in gains])
        rows = np.stack([chosen[client] for client in gains])
        after = importance_after(before, rows, np.array([*gains.values()]), shares, self.importance_rate)
        return {IMPORTANCE: torch.as_tensor(after, dtype=torch.float32)}

    def published(self, state: ServerState) -> Adapter | ChangedWeights:
        return ChangedWeights(self._values(state).tensors, state.adapter.base) if self.trains_whole else state.adapter

    def broadcast(self, state: ServerState) -> Payload:
        values = self._values(state)
        return self._scaled(everything(state, values.tensors, values.roles), state)

    def evaluation(self, state: ServerState, clients: Sequence[str]) -> Ask:
        return Ask("evaluate", self.broadcast(state), per_client=self._lacking(state, clients))

    def evaluated(self, state: ServerState, asked: Collection[str], answered: Collection[str]) -> ServerState:
        return visited(state, asked, answered, int(state.scalars.get(ROUND, 0)))

    def _ask(
        self,
        kind: str,
        state: ServerState,
        cohort: Sequence[ClientInfo],
        fold: Fold,
        own: Mapping[str, Payload],
        wanted: Mapping[str, Limits],
        tensors: Mapping[str, Collection[str]] | None = None,
    ) -> Ask:
        """What each client lacks, and its own. Who is sent the same gets the same object."""
        payload, sent = self.broadcast(state), self._lacking(state, _ids(cohort))
        pairs = {client: (sent.get(client, payload), own[client]) for client in own}
        both = {(id(one), id(other)): joined(one, other) for one, other in pairs.values()}
        by_client = {client: both[id(one), id(other)] for client, (one, other) in pairs.items()}
        return Ask(kind, payload, fold, by_client, vectors=wanted, tensors=tensors or {})

    def _lacking(self, state: ServerState, clients: Collection[str]) -> dict[str, Payload]:
        values = self._values(state)
        sent = lacking(state, values.tensors, values.roles, clients)
        scaled = {id(payload): self._scaled(payload, state) for payload in sent.values()}
        return {client: scaled[id(payload)] for client, payload in sent.items()}

    def _scaled(self, payload: Payload, state: ServerState) -> Payload:
        """And the scales of all pairs, where there are any."""
        scales = {} if self.trains_whole else payload_of(state.adapter, ()).scalars
        return replace(payload, scalars={**payload.scalars, **scales})

    def _parts(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Parts:
        own = {name: tensor.numel() for name, tensor in payload_of(state.adapter).tensors.items()}
        sizes = (cohort[0].sizes if cohort else {}) if self.trains_whole else own
        return Parts.of(sizes, self.blocks, self.always, state.adapter.dense)

    def _values(self, state: ServerState) -> Payload:
        """All that the server has of what trains."""
        if not self.trains_whole:
            return payload_of(state.adapter)
        tensors = {name.removeprefix(WEIGHT): t for name, t in state.tensors.items() if name.startswith(WEIGHT)}
        return Payload(tensors, dict.fromkeys(tensors, Role.DENSE))

    def _with(self, state: ServerState, new: Mapping[str, Tensor]) -> ServerState:
        if self.trains_whole:
            return replace(state, tensors={**state.tensors, **{WEIGHT + name: tensor for name, tensor in new.items()}})
        whole = payload_of(state.adapter)
        return replace(state, adapter=adapter_of(replace(whole, tensors={**whole.tensors, **new}), like=state.adapter))

    # client

    def answer(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        model = self._ready(ask.payload, local, memory)
        sizes = {name: math.prod(shape) for name, shape in model.shapes.items()}
        if ask.kind == "train":
            return self._trained(model, named_by(ask.payload.tensors[MASK], sizes), local)
        if not len(ask.payload.tensors[LAYERS]):
            return Answer(vectors(dict.fromkeys(RESOURCES, torch.zeros(3))), local.examples)
        parts = layers_in(ask.payload.tensors[LAYERS], sizes)
        if ask.kind == "measure":
            return Answer(vectors(measured(model.costs(list(parts.tensors.values())))), local.examples)
        probes = model.probe([n for names in parts.tensors.values() for n in names], self.probe_batches, self.rule == "snr")
        return Answer(vectors({SCORES: score(self.rule, parts, probes)}), local.examples)

    def _trained(self, model: Trainable, names: Sequence[str], local: LocalModel) -> Answer:
        learns = self.rule == IMPORTANCE
        before = model.loss(1) if learns else 0.0
        metrics = model.fit(names) if names else {}
        gain = {GAIN: torch.tensor([before - model.loss(1)])} if learns else {}
        return Answer(joined(by_name(model.values(names)), vectors(gain)), local.examples, metrics)

    def use(self, payload: Payload, local: LocalModel, memory: Memory) -> None:
        self._ready(payload, local, memory)

    def _ready(self, payload: Payload, local: LocalModel, memory: Memory) -> Trainable:
        """The model as the server has it."""
        values = received(payload, memory)
        if self.trains_whole:
            model = local.trainable("whole")
            model.put(values)
            return model
        scales = {name: value for name, value in payload.scalars.items() if name.endswith(".scale")}
        local.load(adapter_of(replace(by_name(values), scalars=scales)))
        return local.trainable("adapter")


def _ids(cohort: Sequence[ClientInfo]) -> list[str]:
    return [client.id for client in cohort]
