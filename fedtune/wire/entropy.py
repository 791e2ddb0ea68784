"""Streams as bytes close to their entropy. The first byte says how: as tokens or as planes, whichever is expected shorter.

There is one table of frequencies, or one a plane, for the whole stream; it travels with it.
"""

from __future__ import annotations

from fedtune.errors import MalformedMessage
from fedtune.wire.planes import Planes, fits, read_planes
from fedtune.wire.stage import Array, Form
from fedtune.wire.tokens import Tokens, read_tokens

TOKENS, PLANES = b"\1", b"\2"  # 0 is left to streams that are not coded


def coded(values: Array, form: Form) -> bytes:
    """`values` (form.count,) of `form.dtype`, each within the form's range. Nothing at all where there is none."""
    if not values.size:
        return b""
    tokens = Tokens.fitted(values, form)
    if fits(form) and (planes := Planes.fitted(values, form)).cost < tokens.cost:
        return PLANES + planes.written(values, form)
    return TOKENS + tokens.written(values, form)


def decoded(data: bytes, form: Form) -> Array:
    """Raises MalformedMessage."""
    if data[:1] == TOKENS and form.count:
        return read_tokens(data[1:], form)
    if data[:1] == PLANES and form.count and fits(form):
        return read_planes(data[1:], form)
    raise MalformedMessage(f"a stream of {form.count} {form.kind} came that begins with {data[:1]!r}")
