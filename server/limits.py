"""How large an answer can be, and what a vector in it may hold: how many numbers, of which kind, from where to where. Part of
the gate.

A slope moves every weight of the model, and a seed stands for a direction: neither is believed unseen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from fedtune.base import Blueprint
from fedtune.envelope import Envelope
from fedtune.errors import Refused
from fedtune.payload import Role
from fedtune.strategy import Answer, Ask, ClientInfo, Limits

SLACK = 2**20  # numbers beside what can be counted: vectors of which only the method knows
WIDEST = 8  # bytes of a number: twice those of a plain float32
HEADER = 2**20  # bytes of a header
NAMED = 2**9  # and for each tensor that may be named in it
TIMES = 4  # adapters in one answer: control variates, gradients and the like beside the adapter itself


def most_numbers(ask: Ask, client: ClientInfo, plan: Blueprint) -> int:
    """That an answer can have, before a byte of it is read."""
    adapter = sum(client.rank_of(path) * sum(pair.shape) for path, pair in plan.adapter.lora.items())
    adapter += sum(tensor.numel() for tensor in plan.adapter.dense.values())
    sent = sum(tensor.numel() for tensor in ask.payload_for(client.id).tensors.values())
    own = sum(math.prod(plan.shapes.get(name, ())) for name in ask.tensors.get(client.id, ()))
    return TIMES * adapter + sent + own + sum(limits.longest for limits in ask.vectors.values()) + SLACK


def require_small(envelope: Envelope, ask: Ask, client: ClientInfo, plan: Blueprint) -> None:
    """The answer is no larger than one to this ask can be, whatever codec it came by. Raises Refused; nothing is decoded."""
    names = 3 * len(plan.adapter.lora) + len(plan.adapter.dense) + len(ask.tensors.get(client.id, ())) + len(ask.vectors)
    most = HEADER + NAMED * TIMES * names
    header = envelope.header_size() + sum(len(tensor.name) + len(tensor.dtype) for tensor in envelope.tensors)
    if header > most:
        raise Refused(f"its header has {header:,} bytes, wanted at most {most:,}")
    data, most = sum(len(tensor.data) for tensor in envelope.tensors), WIDEST * most_numbers(ask, client, plan)
    if data > most:
        raise Refused(f"it has {data:,} bytes, wanted at most {most:,}")


def require_vectors(answer: Answer, wanted: Mapping[str, Limits]) -> None:
    """The answer's vectors are those that the ask names, within their limits; any, where it names none."""
    if not wanted:
        return
    payload = answer.payload
    given = {name: tensor for name, tensor in payload.tensors.items() if payload.roles[name] is Role.VECTOR}
    _require_names(given, wanted)
    for name, limits in wanted.items():
        _require_row(name, given[name], limits)
        _require_values(name, given[name], limits)
    for name, limits in wanted.items():
        if limits.beside and len(given[name]) != len(given[limits.beside]):
            lengths = f"{len(given[name])} and {len(given[limits.beside])}"
            raise Refused(f"'{name}' and '{limits.beside}' hold {lengths} numbers, wanted as many of both")


def require_vectors_alone(answer: Answer, wanted: Mapping[str, Limits]) -> None:
    """And it holds nothing beside them: else it would be unlike the answers of others, and of two, which is the misfit?"""
    extra = sorted({*answer.payload.tensors, *answer.payload.scalars} - wanted.keys())
    if wanted and extra:
        raise Refused(f"{', '.join(extra[:3])} were not asked for, wanted {', '.join(sorted(wanted))} alone")


def _require_names(given: Mapping[str, Tensor], wanted: Mapping[str, Limits]) -> None:
    if missing := sorted(wanted.keys() - given.keys()):
        raise Refused(f"it lacks the vectors {', '.join(missing)}")
    if extra := sorted(given.keys() - wanted.keys()):
        raise Refused(f"its vectors {', '.join(extra[:3])} were not asked for, wanted {', '.join(sorted(wanted))}")


def _require_row(name: str, tensor: Tensor, limits: Limits) -> None:
    """One row of so many numbers of that kind."""
    if tensor.ndim != 1:
        raise Refused(f"'{name}' is of shape {tuple(tensor.shape)}, wanted numbers in one row")
    if limits.integers and tensor.dtype.is_floating_point:
        raise Refused(f"'{name}' came as {str(tensor.dtype).removeprefix('torch.')}, wanted integers")
    count = len(tensor)
    if count > limits.longest:
        raise Refused(f"'{name}' holds {count} numbers: too many, wanted at most {limits.longest}")
    if count < limits.shortest:
        raise Refused(f"'{name}' holds {count} numbers: too few, wanted at least {limits.shortest}")


def _require_values(name: str, tensor: Tensor, limits: Limits) -> None:
    if not len(tensor):
        return
    lowest, highest = tensor.min().item(), tensor.max().item()  # Python compares whole numbers with others exactly
    if highest > limits.most:
        raise Refused(f"'{name}' holds {_written(highest)}, beyond {_written(limits.most)}")
    if lowest < limits.least:
        raise Refused(f"'{name}' holds {_written(lowest)}, below {_written(limits.least)}")


def _written(value: float) -> str:
    """A seed in full, a slope in short."""
    return str(value) if isinstance(value, int) else f"{value:g}"
