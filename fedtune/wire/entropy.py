"""Streams as bytes close to their entropy: asymmetric numeral systems (constriction), a table of counts for each stream.

symbols   one table
gaps      the low bits as they are, where all of them are as frequent; the rest as symbols, rare large ones written out
words     bytes of the same place together: exponents have a table that pays, mantissas are left as they are
"""

from __future__ import annotations

import constriction
import numpy as np

from fedtune.errors import MalformedMessage
from fedtune.wire.stage import Array, Form

Ans = constriction.stream.stack.AnsCoder
Categorical = constriction.stream.model.Categorical


def coded(values: Array, form: Form) -> bytes:
    """`values` (form.count,) of `form.dtype`, each within the form's range."""
    offset = values.astype(np.int64) - form.low
    used, symbols, counts = np.unique(offset, return_inverse=True, return_counts=True)
    head = np.array([used.size], "<u4").tobytes() + used.astype("<u4").tobytes() + counts.astype("<u4").tobytes()
    if used.size < 2:
        return head
    coder = Ans()
    coder.encode_reverse(symbols.astype(np.int32), Categorical(counts / counts.sum(), perfect=False))
    return head + coder.get_compressed().astype("<u4").tobytes()


def decoded(data: bytes, form: Form) -> Array:
    """Raises MalformedMessage."""
    size = int(np.frombuffer(data[:4], "<u4")[0])
    used, counts = np.frombuffer(data[4 : 4 + 8 * size], "<u4").reshape(2, size).astype(np.int64)
    if size < 2:
        return np.full(form.count, form.low + (used[0] if size else 0)).astype(form.dtype)
    try:
        coder = Ans(np.frombuffer(data[4 + 8 * size :], "<u4").astype(np.uint32))
        symbols = coder.decode(Categorical(counts / counts.sum(), perfect=False), form.count)
    except ValueError as error:
        raise MalformedMessage(f"a stream cannot be decoded: {error}") from error
    return (used[symbols] + form.low).astype(form.dtype)
