"""Streams as bytes close to their entropy. The first byte says how: as tokens or as planes, whichever is expected shorter.

    0         not coded (streams.py)
    1         planes
    2 + m     tokens with m mantissa bits

There is one table of frequencies, or one a plane, for the whole stream; it travels with it.
"""

from __future__ import annotations

import numpy as np

from fedtune.errors import MalformedMessage
from fedtune.wire.planes import Planes, fits, read_planes
from fedtune.wire.stage import Array, Form
from fedtune.wire.tokens import Tokens, read_tokens

PLANES, TOKENS = 1, 2


def coded(values: Array, form: Form) -> bytes:
    """`values` (form.count,) of `form.dtype`, each within the form's range. Nothing at all where there is none."""
    if not values.size:
        return b""
    tokens = Tokens.fitted(values, form)
    if fits(form) and (planes := Planes.fitted(values, form)).cost < tokens.cost:
        return bytes([PLANES]) + planes.written(values, form)
    return bytes([TOKENS + tokens.mantissa]) + tokens.written(values, form)


def decoded(data: bytes | memoryview, form: Form) -> Array:
    """Raises MalformedMessage."""
    if not form.count and not data:
        return np.empty(0, form.dtype)
    way = data[0] if data else 0
    if way >= TOKENS and form.count:
        return read_tokens(data[1:], form, way - TOKENS)
    if way == PLANES and form.count and fits(form):
        return read_planes(data[1:], form)
    raise MalformedMessage(
        f"a stream of {form.count} {form.kind} came in {len(data)} bytes that begin with {bytes(data[:1])!r}"
    )
