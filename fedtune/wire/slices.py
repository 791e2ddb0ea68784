"""Long streams in pieces that stay in the processor's cache: nothing wider than the stream itself is made of all of it."""

from __future__ import annotations

PIECE = 2**14  # numbers; a multiple of 8. The bytes of a coded stream depend on it: tables and raw bits take turns by piece


def slices(count: int) -> list[slice]:
    return [slice(start, min(start + PIECE, count)) for start in range(0, count, PIECE)]
