"""One tensor of a message on its way out: how it travels, and what the receiver will make of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedtune.payload import Payload
from fedtune.wire.change import as_float32, decoded, difference, encoded, is_far
from fedtune.wire.joined import Codecs
from fedtune.wire.schema import Mode, codable, fits, is_there
from fedtune.wire.stage import Array, Key

Errors = MutableMapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """`received` shares no memory with what was given: what it was may be written to later."""

    mode: Mode
    streams: Mapping[str, Array]
    received: Tensor


@dataclass(frozen=True)
class Packing:
    """What is the same for all tensors of a message; see `pack` in fedtune/wire/packed.py."""

    payload: Payload
    codecs: Codecs
    key: Key
    known: Payload
    fresh: bool = False
    errors: Errors | None = None
    same: Collection[str] = ()

    def part(self, name: str) -> Part:
        tensor, role = self.payload.tensors[name], self.payload.roles[name]
        if name in self.same and is_there(self.known, name, role, tuple(tensor.shape), tensor.dtype):
            return Part(Mode.SAME, {}, self.known.tensors[name])
        base = self.known.tensors[name] if fits(self.known, name, role, tuple(tensor.shape)) else None
        part = self._coded(name, tensor, base) if codable(tensor, role) else None
        return part or Part(Mode.RAW, {}, _own(tensor))

    def _coded(self, name: str, tensor: Tensor, base: Tensor | None) -> Part | None:
        """None where a number is not finite, now or when it is decoded: such tensors travel as they are."""
        base = None if base is None or is_far(tensor, base) else base
        mode = Mode.FIRST if base is None else Mode.FRESH if self.fresh else Mode.CHANGE
        codec = self.codecs.of(mode)
        x = self._with_error(name, difference(tensor, base, codec), mode, codec.exact)
        if not np.isfinite(x).all():
            return None
        streams = encoded(x, base, codec, self.key, name)
        if codec.exact:
            return Part(mode, streams, _own(tensor))
        received = torch.from_numpy(decoded(streams, base, x.shape, codec, self.key, name)).to(tensor.dtype)
        if not received.isfinite().all():
            return None
        if self.errors is not None and base is not None and mode is Mode.CHANGE:
            self.errors[name] = torch.from_numpy(x) - (received.float() - base.float())
        return Part(mode, streams, received)

    def _with_error(self, name: str, x: Array, mode: Mode, exact: bool) -> Array:
        """An error is added once, whatever becomes of it then: it is of differences, and what fits no more is dropped."""
        error = None if self.errors is None else self.errors.pop(name, None)
        if error is None or exact or mode is not Mode.CHANGE or (error.shape, error.dtype) != (x.shape, torch.float32):
            return x
        with np.errstate(over="ignore", invalid="ignore"):
            more = np.asarray(x + as_float32(error))
        return more if np.isfinite(more).all() else x


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()
