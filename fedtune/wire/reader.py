"""Bytes from the front to the end, and whole numbers in as few of them as they need."""

from __future__ import annotations

from fedtune.errors import MalformedMessage

LONGEST = 8  # bytes of a number: seven bits in each, the lowest first; the highest bit says that more come


class Reader:
    """Nothing is copied, and nothing is taken that is not there: MalformedMessage is raised."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = memoryview(data), 0

    def take(self, count: int) -> memoryview:
        if count > self.left:
            raise MalformedMessage(f"a message ends {count - self.left} bytes too early")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self) -> int:
        number = 0
        for place in range(LONGEST):
            byte = self.take(1)[0]
            number |= (byte & 127) << 7 * place
            if byte < 128:
                return number
        raise MalformedMessage(f"a number in a message has more than {LONGEST} bytes")

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def require_empty(self) -> None:
        if self.left:
            raise MalformedMessage(f"{self.left} bytes came behind the end of a message")


def as_bytes(number: int) -> bytes:
    """What `Reader.number` reads."""
    parts = [number & 127]
    while number := number >> 7:
        parts[-1] |= 128
        parts.append(number & 127)
    return bytes(parts)
