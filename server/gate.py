"""The gate: an answer is let in only if it fits what was asked. What it refuses, it refuses with the reason.

Nothing here depends on the order in which answers come.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping

import torch

from fedtune.adapter import Adapter
from fedtune.envelope import Envelope
from fedtune.errors import MalformedMessage, Refused
from fedtune.payload import Role
from fedtune.strategy import Answer, Ask, ClientInfo, Fold
from fedtune.wire import unpack_answer
from server.limits import require_vectors, require_vectors_alone

NOTHING_ASKED = Ask("")
Shapes = Mapping[str, tuple[int, ...]]
NO_SHAPES: Shapes = {}
LARGEST = 1e18  # of scalars and figures: sums and squares of them stay finite
SCALE = ".scale"  # ends the name of a scalar that is the scale of a module
Schema = tuple[tuple[str, tuple[float, ...]], ...]  # of each tensor its name and shape, of each scale its value; by name


class Diverged(Refused):
    """A figure of the client's is not finite: of its held-out loss, that says that the model does it harm."""


def admit(
    envelope: Envelope,
    ask_id: str,
    client: ClientInfo,
    like: Adapter,
    max_weight: float,
    lower_rank: bool = False,
    ask: Ask = NOTHING_ASKED,
    shapes: Shapes = NO_SHAPES,
    decode: Callable[[Envelope], Answer] = unpack_answer,
) -> Answer:
    """The answer to `ask`, if it may enter; `lower_rank` says whether a client may send less than the rank that it
    declared, and `shapes` are those of the model's own weights, where they were asked for. Raises Refused, or ClientFailed with
    the client's own reason."""
    header = envelope.header
    if header.get("ask") != ask_id:
        raise Refused(f"it answers ask {header.get('ask')}, wanted {ask_id}")
    try:
        answer = decode(envelope)
    except MalformedMessage as error:
        raise Refused(str(error)) from error
    if header.get("base") != like.base:
        raise Refused(f"it was made on base model {header.get('base')}, wanted {like.base}")
    _require_weight(answer, client, max_weight)
    _require_finite(answer)
    require_vectors(answer, ask.vectors)
    if ask.tensors:
        _require_named(answer, ask.tensors.get(client.id, ()), ask.vectors)
    elif not ask.wants:
        require_vectors_alone(answer, ask.vectors)
    asked = {name: shapes[name] for name in ask.tensors.get(client.id, ()) if name in shapes}
    _require_shapes(answer, client, like, lower_rank, asked)
    _require_scales(answer, client, like, ask)
    _require_whole(answer, like, ask.wants)
    return answer


def misfits(schemas: Mapping[str, Schema]) -> dict[str, str]:
    """All answers to an ask need the same tensors, else a share would be counted that brought nothing: those that differ
    from most, each with the reason."""
    if not schemas:
        return {}
    counted = Counter(schemas[client] for client in sorted(schemas))
    usual = dict(counted.most_common(1)[0][0])
    reasons = {}
    for client, schema in schemas.items():
        given = dict(schema)
        odd = sorted(name for name in usual.keys() | given.keys() if usual.get(name) != given.get(name))
        if odd:
            reasons[client] = f"its tensors are not those of the other clients: {', '.join(odd[:3])}"
    return reasons


def schema_of(answer: Answer, fold: Fold = Fold.SUM) -> Schema:
    """What must be the same in all answers: names and, for a sum, shapes and scales too, as factors of one scale are added."""
    payload, summed = answer.payload, fold is not Fold.EACH
    shapes = {name: tuple(tensor.shape) if summed else () for name, tensor in payload.tensors.items()}
    scales = {name: (value,) if summed and name.endswith(SCALE) else () for name, value in payload.scalars.items()}
    return tuple(sorted({**scales, **shapes}.items()))


def _require_weight(answer: Answer, client: ClientInfo, max_weight: float) -> None:
    """Nobody's say is larger than by the examples that it registered with."""
    most = min(max_weight, client.examples)
    if not (math.isfinite(answer.weight) and 0 < answer.weight <= most):
        limit = "the examples that it registered with" if client.examples <= max_weight else "rounds.max_weight"
        raise Refused(f"its weight is {answer.weight:g}, wanted more than 0 and at most {most:g} ({limit})")


def _require_finite(answer: Answer) -> None:
    for name, tensor in answer.payload.tensors.items():
        if not torch.isfinite(tensor).all():
            raise Refused(f"'{name}' is not finite")
    for name, value in [*answer.payload.scalars.items(), *answer.metrics.items()]:
        if not math.isfinite(value):
            kind = Diverged if answer.metrics.get("loss") is value else Refused
            raise kind(f"'{name}' is {value}, wanted a finite number")
        if abs(value) > LARGEST:
            raise Refused(f"'{name}' is {value:g}, wanted at most {LARGEST:g} either way")


def _require_named(answer: Answer, names: Collection[str], vectors: Collection[str]) -> None:
    """Beside these vectors it holds the tensors that this client was to send, all of them and no others: whatever else came
    would be folded into the tensor of that name, which others may have trained."""
    roles = answer.payload.roles
    given = {name for name, role in roles.items() if not (role is Role.VECTOR and name in vectors)}
    if missing := sorted(set(names) - given):
        raise Refused(f"it lacks {', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""))
    if extra := sorted((given - set(names)) | answer.payload.scalars.keys()):
        raise Refused(f"{', '.join(extra[:3])} were not asked of it")


def _require_shapes(answer: Answer, client: ClientInfo, like: Adapter, lower_rank: bool, asked: Shapes) -> None:
    """Factors and whole parameters must fit the modules that the job adapts, at the rank that the client declared."""
    dense = {**asked, **{name: tuple(tensor.shape) for name, tensor in like.dense.items()}}
    wanted: dict[str, tuple[Role, tuple[int, ...]]] = {name: (Role.DENSE, shape) for name, shape in dense.items()}
    for path in like.lora:
        rank = _rank_sent(answer, path) if lower_rank else None
        wanted |= factor_shapes(like, path, min(rank or client.rank_of(path), client.rank_of(path)))
    for name, tensor in answer.payload.tensors.items():
        role, shape = answer.payload.roles[name], tuple(tensor.shape)
        if role is not Role.VECTOR and name not in wanted:
            raise Refused(f"'{name}' is no part of the adapter that the job describes")
        wanted_role, wanted_shape = wanted.get(name, (role, shape))
        if role is not wanted_role:
            raise Refused(f"'{name}' came as {role}, wanted {wanted_role}")
        if shape != wanted_shape:
            raise Refused(f"'{name}' is of shape {shape}, wanted {wanted_shape}")
        if role is not Role.VECTOR and not tensor.dtype.is_floating_point:
            raise Refused(f"'{name}' came as {str(tensor.dtype).removeprefix('torch.')}, wanted float32")


def _require_scales(answer: Answer, client: ClientInfo, like: Adapter, ask: Ask) -> None:
    """A scale is the client's own, the job's, or the one that it was sent: nobody makes its product larger by a word."""
    sent = ask.payload_for(client.id).scalars
    for name, value in answer.payload.scalars.items():
        if not name.endswith(SCALE):
            continue
        path = name.removesuffix(SCALE)
        if path not in like.lora:
            raise Refused(f"'{name}' is no part of the adapter that the job describes")
        known = {client.scale_of(path), like.lora[path].scale, sent.get(name, client.scale_of(path))}
        if not (value > 0 and any(math.isclose(value, scale, rel_tol=1e-6) for scale in known)):
            raise Refused(f"'{name}' is {value:g}, wanted one of {', '.join(f'{scale:g}' for scale in sorted(known))}")


def _require_whole(answer: Answer, like: Adapter, wants: Collection[Role]) -> None:
    """Nothing that was asked for is missing."""
    factors = [role for role in wants if role is not Role.DENSE]
    wanted = {f"{path}.{role}" for path in like.lora for role in factors} | (set(like.dense) if Role.DENSE in wants else set())
    scales = {f"{path}{SCALE}" for path in like.lora} if {Role.A, Role.B} & set(wants) else set()
    missing = sorted((wanted - answer.payload.tensors.keys()) | (scales - answer.payload.scalars.keys()))
    if missing:
        raise Refused(f"it lacks {', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""))


def factor_shapes(like: Adapter, path: str, rank: int) -> dict[str, tuple[Role, tuple[int, ...]]]:
    """Name, role and shape of all that a module of this rank can send."""
    d, k = like.lora[path].shape
    shapes = {Role.A: (rank, k), Role.B: (d, rank), Role.CORE: (rank, rank)}
    return {f"{path}.{role}": (role, shape) for role, shape in shapes.items()}


def _rank_sent(answer: Answer, path: str) -> int | None:
    A = answer.payload.tensors.get(f"{path}.{Role.A}")
    return A.shape[0] if A is not None and A.ndim == 2 and A.shape[0] else None
