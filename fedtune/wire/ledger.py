"""What one message costs: its bytes, how many of them are header, what the network adds, what it were without codecs."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.envelope import Envelope
from fedtune.payload import Payload
from fedtune.wire.ends import PACKED
from fedtune.wire.packed import overhead
from fedtune.wire.raw import plain_size
from fedtune.wire.transport import transport_size

OF_THE_WIRE = ("codec", "since")  # in the header of a packed message, and of no other


@dataclass(frozen=True)
class Cost:
    """Of one message or of many, in one direction."""

    bytes: int = 0  # tensors and header
    header: int = 0  # of these: the JSON before the tensors, and what a packed message says of them before its first stream
    transport: int = 0  # estimated, beside these
    plain: int = 0  # tensors and header, were every number sent as it is

    def __add__(self, other: Cost) -> Cost:
        sums = self.bytes + other.bytes, self.header + other.header
        return Cost(*sums, self.transport + other.transport, self.plain + other.plain)


def cost_of(envelope: Envelope, payload: Payload | None = None) -> Cost:
    """`payload` is what the message says; where that is not known, it counts as plain."""
    header = envelope.header_size()
    size = header + sum(len(tensor.data) for tensor in envelope.tensors)
    about = sum(overhead(tensor.data) for tensor in envelope.tensors if tensor.stype == PACKED)
    plain = size if payload is None else plain_bytes(envelope, payload)
    return Cost(size, header + about, transport_size(envelope), plain)


def plain_bytes(envelope: Envelope, payload: Payload) -> int:
    """Of the same message without codecs; a message that went without them is as large as it is."""
    if all(tensor.stype != PACKED for tensor in envelope.tensors):
        return envelope.size()
    header = {name: value for name, value in envelope.header.items() if name not in OF_THE_WIRE}
    return plain_size(payload, header)
