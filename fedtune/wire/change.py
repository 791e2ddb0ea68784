"""One tensor on its way: as its difference to what the receiver has, and back.

Floats that must come back bit for bit are subtracted as whole numbers, their bit patterns. Where the receiver has nothing like
the tensor, it has zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedtune.wire.codec import CARRIER, Codec
from fedtune.wire.stage import Array


def difference(tensor: Tensor, base: Tensor | None, codec: Codec) -> Array:
    """What the codec is given: float32, of the tensor's shape."""
    x = as_float32(tensor)
    return x if codec.exact or base is None else x - as_float32(base)


def is_far(tensor: Tensor, base: Tensor) -> bool:
    """Whether the difference is larger than the tensor: a base that is unlike it only adds to what a codec loses."""
    x = as_float32(tensor)
    return bool(_square(x - as_float32(base)) > _square(x))


def _square(x: Array) -> float:
    return float(np.dot(x.reshape(-1), x.reshape(-1)))


def encoded(x: Array, base: Tensor | None, codec: Codec, key: int, name: str) -> dict[str, Array]:
    """`x` as `difference` gave it, finite."""
    streams = codec.encode(x, key, name)
    if codec.exact and base is not None:
        streams[CARRIER] = word_changes(streams[CARRIER], _words(base))
    return streams


def decoded(
    streams: Mapping[str, Array], base: Tensor | None, shape: tuple[int, ...], codec: Codec, key: int, name: str
) -> Array:
    """The tensor, float32, of this shape. Raises MalformedMessage."""
    if codec.exact:
        words = streams[CARRIER] if base is None else words_of(streams[CARRIER], _words(base))
        return codec.decode({**streams, CARRIER: words}, shape, key, name)
    x = codec.decode(streams, shape, key, name)
    return x if base is None else as_float32(base) + x


def word_changes(words: Array, base: Array) -> Array:
    """uint32 bit patterns to small numbers where they are close: their difference, its sign in the lowest bit."""
    change = (words - base).view(np.int32)
    return ((change << 1) ^ (change >> 31)).view(np.uint32)


def words_of(changes: Array, base: Array) -> Array:
    change = (changes >> np.uint32(1)).view(np.int32) ^ -(changes & np.uint32(1)).view(np.int32)
    words: Array = base + change.view(np.uint32)
    return words


def as_float32(tensor: Tensor) -> Array:
    plain: Array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return plain


def _words(tensor: Tensor) -> Array:
    return as_float32(tensor).reshape(-1).view(np.uint32)
