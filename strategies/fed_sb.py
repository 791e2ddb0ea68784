"""Fed-SB (Singhal et al., TMLR 2026, arXiv 2502.15436): a module computes s B R A, and only R (r, r) trains and travels.

    sum_i p_i s B R_i A = s B (sum_i p_i R_i) A          exact for any number of clients, as A and B are the same for all

A (r, k) and B (d, r) are fixed before the first training: the leading singular directions of the clients' mean gradient at the
base model, both orthonormal. The paper computes that gradient in one place; here the cohort of the first round finds the
directions together, from sums alone (strategies/calibration.py says how, and what it costs once).

R starts at zero, not at the paper's singular values: before anybody has trained, the model is the base model, as with every
other method, and the step that they stand for would need a learning rate of its own.

A client keeps A and B in its Memory and is then sent R alone; before its first training it is sent all three. One that has
lost them says so and misses that round; as it did not answer, the next ask brings them again. What goes to all clients to be
evaluated is the published adapter, (B R, A). Heads are averaged. All clients train with the server's scale. As r^2 numbers
are few, ranks are higher than usual: 32 to 200.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.adapter import Adapter, Factors
from fedtune.errors import ClientFailed, StrategyError
from fedtune.memory import Memory
from fedtune.payload import Payload, Role, payload_of
from fedtune.strategy import Answer, Answers, Ask, ClientInfo, LocalModel, ServerState, Strategy
from strategies.calibration import PROJECT, SKETCH, leading_directions, slopes

FRAME = "frame"  # A and B of all modules; under this name stands a number that tells one such set from another
HOLDS = "holds."  # in the state, with a client's name: it has the frame


@dataclass(frozen=True)
class FedSB(Strategy):
    """Fed-SB: only an r x r core travels, between factors from a shared calibration (exact). Needs one rank for all clients."""

    name: ClassVar[str] = "fed_sb"
    paper: ClassVar[str] = "Singhal et al., TMLR 2026, arXiv 2502.15436"
    up: ClassVar[str] = "r*r + h"
    down: ClassVar[str] = "r*r + h"  # of a client that holds A and B; r*(d + k) more before its first training
    exact: ClassVar[bool] = True
    exact_down: ClassVar[str] = "every client must hold the same A and B for as long as the run lasts"
    secure_sum: ClassVar[bool] = True
    calibration_batches: int = 4  # of each client, for its gradient
    passes: int = 1  # of the calibration
    seed: int = 0  # of its random directions

    def __post_init__(self) -> None:
        for setting in ("calibration_batches", "passes"):
            if getattr(self, setting) < 1:
                raise StrategyError(f"strategy 'fed_sb' needs {setting} of at least 1, given {getattr(self, setting)}")

    def round(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Generator[Ask, Answers, ServerState]:
        if FRAME not in state.scalars:
            pairs = yield from leading_directions(state.adapter, self.passes)
            state = with_frame(state, pairs)
        core_alone = _sent(state, (Role.DENSE,))
        holders = {client.id: core_alone for client in cohort if f"{HOLDS}{client.id}" in state.scalars}
        answers = yield Ask(
            "train", _sent(state, (Role.A, Role.B, Role.DENSE)), per_client=holders, wants=(Role.CORE, Role.DENSE)
        )
        mean = answers.mean()
        adapter = replace(state.adapter, dense={**state.adapter.dense, **_of_role(mean, Role.DENSE)})
        scalars = _who_holds(state.scalars, cohort, answers.weights)
        return replace(state, adapter=adapter, tensors=_of_role(mean, Role.CORE), scalars=scalars)

    def published(self, state: ServerState) -> Adapter:
        lora = {path: _with_core(pair, state.tensors.get(f"{path}.{Role.CORE}")) for path, pair in state.adapter.lora.items()}
        return replace(state.adapter, lora=lora)

    def answer(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        if ask.kind in (SKETCH, PROJECT):
            return Answer(slopes(ask, local, self.calibration_batches, self.seed), local.examples)
        cores = {name.removesuffix(f".{Role.CORE}"): R for name, R in _of_role(ask.payload, Role.CORE).items()}
        local.load(_framed(ask.payload, memory), frozen=("A", "B"), cores=cores)
        metrics = local.fit()
        trained = {f"{path}.{Role.CORE}": R for path, R in local.cores().items()}
        dense = local.adapter().dense
        roles = {**dict.fromkeys(trained, Role.CORE), **dict.fromkeys(dense, Role.DENSE)}
        return Answer(Payload({**trained, **dense}, roles), local.examples, metrics)


def with_frame(state: ServerState, pairs: Mapping[str, Factors]) -> ServerState:
    """The state with these A and B, and R = 0."""
    cores = {f"{path}.{Role.CORE}": torch.zeros(pair.rank, pair.rank) for path, pair in pairs.items()}
    digest = hashlib.sha256()
    for path in sorted(pairs):
        digest.update(path.encode() + pairs[path].A.numpy().tobytes() + pairs[path].B.numpy().tobytes())
    number = float(int(digest.hexdigest()[:12], 16))  # 48 bits: exact as a float
    return ServerState(replace(state.adapter, lora=pairs), cores, {**state.scalars, FRAME: number})


def _sent(state: ServerState, parts: Collection[Role]) -> Payload:
    """The cores and these parts of the adapter."""
    rest = payload_of(state.adapter, parts)
    roles = {**rest.roles, **dict.fromkeys(state.tensors, Role.CORE)}
    return Payload({**rest.tensors, **state.tensors}, roles, {**rest.scalars, FRAME: state.scalars[FRAME]})


def _framed(given: Payload, memory: Memory) -> Adapter:
    """On the client: A and B as they came, and are kept from now on, or as they were kept; the heads as they came."""
    came = {**_of_role(given, Role.A), **_of_role(given, Role.B)}
    if came:
        memory.update({**came, FRAME: torch.tensor(given.scalars[FRAME], dtype=torch.float64)})
    if FRAME not in memory or memory[FRAME].item() != given.scalars[FRAME]:
        raise ClientFailed("it does not hold A and B of this run (its memory was lost); they come with the next ask")
    scales = {name.removesuffix(".scale"): scale for name, scale in given.scalars.items() if name.endswith(".scale")}
    lora = {path: Factors(memory[f"{path}.{Role.A}"], memory[f"{path}.{Role.B}"], scale) for path, scale in scales.items()}
    return Adapter(lora, _of_role(given, Role.DENSE))


def _who_holds(scalars: Mapping[str, float], asked: Sequence[ClientInfo], answered: Collection[str]) -> Mapping[str, float]:
    """Whoever answered holds the frame. Of those who were asked and did not, nothing is known."""
    unsure = {f"{HOLDS}{client.id}" for client in asked}
    kept = {name: value for name, value in scalars.items() if name not in unsure}
    return {**kept, **{f"{HOLDS}{client}": 1.0 for client in answered}}


def _of_role(payload: Payload, role: Role) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in payload.tensors.items() if payload.roles[name] is role}


def _with_core(pair: Factors, core: Tensor | None) -> Factors:
    """`s B R A` as a pair: R (r, r) goes into B. Before the calibration there is no core, and B = 0."""
    return pair if core is None else replace(pair, B=(pair.B.double() @ core.double()).float())
