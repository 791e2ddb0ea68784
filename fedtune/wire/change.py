"""One tensor on its way: as its difference to what the receiver has, and back.

Floats that must come back bit for bit are subtracted as whole numbers, their bit patterns. Where the receiver has nothing like
the tensor, it has zeros. Numbers from the network can overflow: they end as infinite ones, which the gate refuses.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedtune.wire.codec import CARRIER, Codec
from fedtune.wire.slices import slices
from fedtune.wire.stage import Array, Key, Kind

WORDS = 2**32 - 1


def difference(tensor: Tensor, base: Tensor | None, codec: Codec) -> Array:
    """What the codec is given: float32, of the tensor's shape; infinite where the difference is too large."""
    x = as_float32(tensor)
    if codec.exact or base is None:
        return x
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x - as_float32(base))


def is_far(tensor: Tensor, base: Tensor) -> bool:
    """Whether the difference is larger than the tensor: a base that is unlike it only adds to what a codec loses."""
    x, b = as_float32(tensor).reshape(-1), as_float32(base).reshape(-1)
    change = size = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in slices(x.size):  # float64 sums of pieces: no machine sees another order but within one
            change += float(np.square(x[piece] - b[piece], dtype=np.float64).sum())
            size += float(np.square(x[piece], dtype=np.float64).sum())
    return change > size


def encoded(x: Array, base: Tensor | None, codec: Codec, key: Key, name: str) -> dict[str, Array]:
    """`x` as `difference` gave it, finite."""
    streams = codec.encode(x, key, name)
    if base is not None and _by_words(codec, x.shape):
        streams[CARRIER] = word_changes(streams[CARRIER], _words(base))
    return streams


def decoded(
    streams: Mapping[str, Array], base: Tensor | None, shape: tuple[int, ...], codec: Codec, key: Key, name: str
) -> Array:
    """The tensor, float32, of this shape. Raises MalformedMessage."""
    if base is not None and _by_words(codec, shape):
        streams = {**streams, CARRIER: words_of(streams[CARRIER], _words(base))}
    x = codec.decode(streams, shape, key, name)
    if base is None or codec.exact:
        return x
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(as_float32(base) + x)


def word_changes(words: Array, base: Array) -> Array:
    """uint32 bit patterns to small numbers where they are close: their difference, its sign in the lowest bit."""
    change = (words - base).view(np.int32)
    return ((change << 1) ^ (change >> 31)).view(np.uint32)


def words_of(changes: Array, base: Array) -> Array:
    words = np.empty(changes.shape, np.uint32)
    for piece in slices(changes.size):  # in pieces: all at once would take four times the memory of the tensor
        signs = -(changes[piece] & np.uint32(1)).view(np.int32)
        words[piece] = base[piece] + ((changes[piece] >> np.uint32(1)) ^ signs.view(np.uint32))
    return words


def as_float32(tensor: Tensor) -> Array:
    plain: Array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return plain


def _by_words(codec: Codec, shape: tuple[int, ...]) -> bool:
    """Whether an exact codec hands on every number's bit pattern."""
    form = codec.forms(shape)[CARRIER]
    return codec.exact and form.kind is Kind.WORDS and (form.low, form.high, form.count) == (0, WORDS, int(np.prod(shape)))


def _words(tensor: Tensor) -> Array:
    return as_float32(tensor).reshape(-1).view(np.uint32)
