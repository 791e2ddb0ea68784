"""Asks and answers as envelopes: the codec of tensors, and the header that every message carries.

Raw tensors only: float32, float16, bfloat16 (native, which Flower's own Array cannot hold), float64 and integers, little
endian. No pickle. The size that a header claims is checked against the bytes before a tensor is made.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedtune.envelope import WIRE_VERSION, Envelope, WireTensor
from fedtune.errors import ClientFailed, MalformedMessage
from fedtune.payload import Payload, Role
from fedtune.strategy import Answer, Ask

RAW = "fedtune.raw"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.uint8,
    )
}

LARGEST = 2**40  # numbers in one tensor
UNREADABLE = (KeyError, ValueError, TypeError, AttributeError, OverflowError)  # what a foreign header can raise

assert sys.byteorder == "little", "the raw codec sends little-endian bytes as they lie in memory"


def encoded(name: str, tensor: Tensor) -> WireTensor:
    return WireTensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), RAW, as_it_lies(tensor))


def as_it_lies(tensor: Tensor) -> bytes:
    """Its numbers in a row. torch cannot view all tensors without numbers as bytes."""
    plain = tensor.detach().cpu().contiguous().flatten()
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def decoded(wire: WireTensor) -> Tensor:
    """Raises MalformedMessage unless the bytes are exactly such a tensor."""
    dtype = DTYPES.get(str(wire.dtype))
    if wire.stype != RAW or dtype is None:
        raise MalformedMessage(f"'{wire.name}' came as {wire.stype}/{wire.dtype}, wanted {RAW} of {', '.join(DTYPES)}")
    _require_sizes(wire)
    wanted = math.prod(wire.shape) * dtype.itemsize
    if wanted != len(wire.data):
        raise MalformedMessage(f"'{wire.name}' of shape {wire.shape} needs {wanted} bytes, {len(wire.data)} came")
    if not wire.data:
        return torch.empty(wire.shape, dtype=dtype)
    return torch.frombuffer(bytearray(wire.data), dtype=dtype).reshape(wire.shape)


def _require_sizes(wire: WireTensor) -> None:
    """Sizes are whole, not negative, and such that torch can count with them even where one of them is 0."""
    whole = all(type(size) is int and size >= 0 for size in wire.shape)
    if not whole or math.prod(max(size, 1) for size in wire.shape) > LARGEST:
        raise MalformedMessage(f"'{wire.name}' came with shape {wire.shape}, wanted sizes of at least 0 and {LARGEST} in all")


def _pack(payload: Payload, header: Mapping[str, Any]) -> Envelope:
    return Envelope(_full(payload, header), tuple(encoded(name, tensor) for name, tensor in payload.tensors.items()))


def plain_size(payload: Payload, header: Mapping[str, Any]) -> int:
    """Bytes of a message with this header, were it sent as it is: numbers in the types that they have, and the header."""
    numbers = sum(tensor.numel() * tensor.element_size() for tensor in payload.tensors.values())
    return numbers + Envelope(_full(payload, header)).header_size()


def _full(payload: Payload, header: Mapping[str, Any]) -> dict[str, Any]:
    roles = {name: str(role) for name, role in payload.roles.items()}
    return {**header, "version": WIRE_VERSION, "roles": roles, "scalars": dict(payload.scalars)}


def require_version(header: Mapping[str, Any]) -> None:
    version = header.get("version")
    if version != WIRE_VERSION:
        raise MalformedMessage(
            f"a message of wire version {version} came, wanted {WIRE_VERSION}: install the same fedtune on both sides"
        )


def _unpack(envelope: Envelope) -> Payload:
    require_version(envelope.header)
    try:
        roles = {name: Role(role) for name, role in envelope.header["roles"].items()}
        scalars = {str(name): float(value) for name, value in envelope.header["scalars"].items()}
        return Payload({wire.name: decoded(wire) for wire in envelope.tensors}, roles, scalars)
    except UNREADABLE as error:
        raise MalformedMessage(f"a message came whose header cannot be read: {error}") from error


def pack_ask(ask: Ask, client: str, header: Mapping[str, Any]) -> Envelope:
    """The message for one client. `header` names run, round, ask id, base and strategy."""
    return _pack(ask.payload_for(client), {**header, "kind": ask.kind})


def unpack_ask(envelope: Envelope) -> Ask:
    return Ask(str(envelope.header.get("kind")), _unpack(envelope))


def pack_answer(answer: Answer, header: Mapping[str, Any]) -> Envelope:
    """`header` repeats ask id and base, and names the client."""
    return _pack(answer.payload, {**header, "weight": answer.weight, "metrics": dict(answer.metrics)})


def pack_failure(reason: str, header: Mapping[str, Any]) -> Envelope:
    """What a client sends when it could not answer."""
    return _pack(Payload(), {**header, "failed": reason})


def unpack_answer(envelope: Envelope) -> Answer:
    """Raises ClientFailed with the client's reason, or MalformedMessage."""
    if "failed" in envelope.header:
        raise ClientFailed(str(envelope.header["failed"]))
    return answer_with(_unpack(envelope), envelope.header)


def answer_with(payload: Payload, header: Mapping[str, Any]) -> Answer:
    """Weight and metrics as the header says. Raises MalformedMessage."""
    try:
        metrics = {str(name): float(value) for name, value in header["metrics"].items()}
        return Answer(payload, float(header["weight"]), metrics)
    except UNREADABLE as error:
        raise MalformedMessage(f"an answer came without weight or metrics: {error}") from error
