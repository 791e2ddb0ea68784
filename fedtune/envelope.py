"""One message as plain bytes, between the codec (torch), Flower (server, relay) and gRPC (relay, trainer).

It needs neither torch nor flwr, so the relay can carry it without knowing what is inside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WIRE_VERSION = 1


@dataclass(frozen=True)
class WireTensor:
    """One encoded tensor: `stype` names the codec, `data` are its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stype: str
    data: bytes


@dataclass(frozen=True)
class Envelope:
    """A header of JSON values and the encoded tensors, in the order of the payload."""

    header: Mapping[str, Any]
    tensors: tuple[WireTensor, ...] = field(default=())

    def header_json(self) -> str:
        return json.dumps(self.header, sort_keys=True, separators=(",", ":"))

    def header_size(self) -> int:
        return len(self.header_json().encode())

    def size(self) -> int:
        """Bytes that this message costs: tensors and header, without what the transport adds."""
        return self.header_size() + sum(len(tensor.data) for tensor in self.tensors)
