"""What a hostile, broken or confused sender makes of a message: drawn from a generator, so that a seed stands for all of it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from fedtune.envelope import Envelope, WireTensor

HUGE = 10**400  # more than a float can be
DEEP: Any = []
for _ in range(40):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    *(0, -0.0, -1, 1, 2, 3, 1e308, -1e308, 1e-320, math.nan, math.inf, -math.inf, HUGE, -HUGE, 2**31, 2**63, 2**64, 0.5),
    *(True, False, None, "", "0", "1", "nan", "1.0", "2.0", "9.9", "hello", "train", "evaluate", "start", "ann", "zoe"),
    *("\x00", "\ud800", "../../x", "a\nb", "x" * 300, "x" * 70_000, [], {}, [1, 2], {"a": 1}, {"": {}}, [[]], DEEP),
    *({"run": "x", "serial": HUGE, "client": [], "seal": "no"}, ["ann"], {"ann": math.nan}),
)
NAMES = (
    *("ask", "run", "round", "client", "base", "kind", "version", "weight", "metrics", "roles", "scalars", "codec", "since"),
    *("failed", "resend", "seconds", "stamp", "signature", "job", "undone", "serial", "unanswered", "unknown_run"),
    *("examples", "rank", "scale", "limits", "loss", "tokens", "x"),
)
ROUNDS = (-1, 0, 1, 2, 3, 4, 7, 1_000_000, HUGE, "1", "two", 1.5, math.nan, None, [1])
WEIGHTS = (0, -1, 1e308, math.nan, math.inf, -math.inf, 1e-320, 4, 6, 1e9, HUGE, "5", None, [5], True)
ASKS = ("0.0", "0.evaluate", "1.0", "1.1", "1.evaluate", "2.0", "2.evaluate", "3.0", "-1.0", "1", "", "hello", None, 1.0)
CLIENTS = ("ann", "bob", "cy", "zoe", "", "ANN", "ann\x00", "../ann", "\ud800", None, 7, ["ann"])
NUMBERS = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, 0.0, 1e19)
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "uint8", "bool", "complex64", "", "O", "f4")
STYPES = ("fedtune.packed", "fedtune.raw", "raw", "fedtune.sealed", "numpy.ndarray", "", "x")

Mutation = Callable[[Random, Envelope], Envelope]


def mutated(draw: Random, envelope: Envelope, others: Sequence[Envelope] = ()) -> Envelope:
    """One to three changes; `others` are messages of other places, which may be sent in this one's."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if others and draw.random() < 0.12:
            envelope = _replayed(draw, envelope, draw.choice(others))
        else:
            envelope = draw.choice(MUTATIONS)(draw, envelope)
    return envelope


def damaged(draw: Random, data: bytes) -> bytes:
    """Bits flipped, a piece cut off, left out, doubled, or written over."""
    if not data:
        return draw.randbytes(draw.randrange(1, 9))
    first, second = sorted((draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)))
    what = draw.randrange(8)
    if what < 3:
        return _flipped(draw, data)
    if what == 3:
        return data[:first]
    if what == 4:
        return data[:first] + data[second:]
    if what == 5:
        return data[:second] + data[first:second][:4096] + data[second:]
    if what == 6:
        return data[:first] + draw.randbytes(min(second - first, 64)) + data[min(second, first + 64) :]
    return data + draw.randbytes(draw.randrange(1, 65))


def _flipped(draw: Random, data: bytes) -> bytes:
    flipped = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def rewritten(draw: Random, value: Any) -> Any:
    """A JSON value with one place of it, however deep, replaced, left out, renamed or swapped with another."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return draw.choice(VALUES)
    if isinstance(value, list):
        place = draw.randrange(len(value))
        return [rewritten(draw, inner) if number == place else inner for number, inner in enumerate(value)]
    name, what = draw.choice(sorted(value)), draw.random()
    if what < 0.15:
        return {key: inner for key, inner in value.items() if key != name}
    if what < 0.3:
        other = draw.choice(sorted(value))
        return {**value, name: value[other], other: value[name]}
    if what < 0.4:
        return {**{key: inner for key, inner in value.items() if key != name}, draw.choice(NAMES): value[name]}
    return {**value, name: rewritten(draw, value[name])}


def _header(draw: Random, envelope: Envelope) -> Envelope:
    header = rewritten(draw, dict(envelope.header))
    return replace(envelope, header=header if isinstance(header, dict) else {"x": header})


def _added(draw: Random, envelope: Envelope) -> Envelope:
    return replace(envelope, header={**envelope.header, draw.choice(NAMES): draw.choice(VALUES)})


def _named(name: str, values: Sequence[Any]) -> Mutation:
    return lambda draw, envelope: replace(envelope, header={**envelope.header, name: draw.choice(values)})


def _text(draw: Random, envelope: Envelope) -> Envelope:
    """Of the header as it travels; what is no header any more is the business of those who read bytes."""
    text = damaged(draw, envelope.header_json().encode()).decode(errors="replace")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        return _header(draw, envelope)
    return replace(envelope, header=header) if isinstance(header, dict) else envelope


def _replayed(draw: Random, envelope: Envelope, other: Envelope) -> Envelope:
    """As it is, or its tensors under our header, or with our names for round and ask."""
    what = draw.randrange(3)
    if what == 0:
        return other
    if what == 1:
        return replace(envelope, tensors=other.tensors)
    same = {name: envelope.header[name] for name in ("ask", "run", "round", "client") if name in envelope.header}
    return replace(other, header={**other.header, **same})


def _one(change: Callable[[Random, WireTensor], WireTensor]) -> Mutation:
    """Of one tensor; where there is none, of the header."""

    def mutation(draw: Random, envelope: Envelope) -> Envelope:
        if not envelope.tensors:
            return _header(draw, envelope)
        place = draw.randrange(len(envelope.tensors))
        changed = change(draw, envelope.tensors[place])
        return replace(envelope, tensors=(*envelope.tensors[:place], changed, *envelope.tensors[place + 1 :]))

    return mutation


def _data(draw: Random, tensor: WireTensor) -> WireTensor:
    data = damaged(draw, tensor.data)
    honest = tensor.shape == (len(tensor.data),)  # of packed bytes the shape follows, so that the length hides nothing
    return replace(tensor, data=data, shape=(len(data),) if honest else tensor.shape)


def _bits(draw: Random, tensor: WireTensor) -> WireTensor:
    return replace(tensor, data=_flipped(draw, tensor.data)) if tensor.data else _data(draw, tensor)


def _number(draw: Random, tensor: WireTensor) -> WireTensor:
    """A float32 somewhere."""
    if len(tensor.data) < 4:
        return _data(draw, tensor)
    place = 4 * draw.randrange(len(tensor.data) // 4)
    number = struct.pack("<f", draw.choice(NUMBERS))
    return replace(tensor, data=tensor.data[:place] + number + tensor.data[place + 4 :])


def _larger(draw: Random, tensor: WireTensor) -> WireTensor:
    """All its float32 times as much."""
    count, times = len(tensor.data) // 4, draw.choice((-1.0, 0.0, 10.0, 1e3, 1e20, 1e38))
    numbers = (max(min(number * times, 3e38), -3e38) for number in struct.unpack(f"<{count}f", tensor.data[: 4 * count]))
    return replace(tensor, data=struct.pack(f"<{count}f", *numbers) + tensor.data[4 * count :])


def _about(draw: Random, tensor: WireTensor) -> WireTensor:
    what = draw.randrange(4)
    if what == 0:
        return replace(tensor, dtype=draw.choice(DTYPES))
    if what == 1:
        return replace(tensor, stype=draw.choice(STYPES))
    if what == 2:
        return replace(tensor, name=draw.choice((*NAMES, "", "x" * 300, tensor.name + ".A", tensor.name[1:])))
    return replace(tensor, shape=_shape(draw, tensor.shape))


def _shape(draw: Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    sizes = (0, 1, -1, 2, 2**31, 2**62, 2**63 - 1)
    what = draw.randrange(4)
    if what == 0:
        return shape[::-1]
    if what == 1:
        return (*shape, draw.choice(sizes))
    if what == 2:
        return shape[:-1]
    return tuple(draw.choice(sizes) if draw.random() < 0.5 else size for size in shape)


def _tensors(draw: Random, envelope: Envelope) -> Envelope:
    """One too few, one twice, or two whose data are swapped."""
    tensors = list(envelope.tensors)
    if not tensors:
        data = draw.randbytes(8)
        return replace(envelope, tensors=(WireTensor(draw.choice(NAMES), "uint8", (8,), draw.choice(STYPES), data),))
    one, other = draw.randrange(len(tensors)), draw.randrange(len(tensors))
    what = draw.randrange(3)
    if what == 0:
        del tensors[one]
    elif what == 1:
        tensors.insert(other, replace(tensors[one], name=tensors[one].name + draw.choice(("", "2"))))
    else:
        first, second = tensors[one], tensors[other]
        tensors[one], tensors[other] = replace(first, data=second.data), replace(second, data=first.data)
    return replace(envelope, tensors=tuple(tensors))


MUTATIONS: tuple[Mutation, ...] = (
    *(_header, _header, _added, _text, _tensors),
    *(_one(_data), _one(_data), _one(_bits), _one(_bits), _one(_number), _one(_larger), _one(_about)),
    *(_named("weight", WEIGHTS), _named("round", ROUNDS), _named("ask", ASKS), _named("client", CLIENTS)),
)
