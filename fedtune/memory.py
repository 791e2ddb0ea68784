"""What a client keeps between rounds: control variates, error feedback. Never sent.

A memory has two parts: what many clients keep alike, as a broadcast, and the client's own. Each part has a name that follows
from its tensors, so whoever stores it (client/kept.py) knows what is stored already, and whether it came back whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedtune.errors import MALFORMED, Damaged


@dataclass(frozen=True)
class Part:
    """Some tensors of a memory; the name of an empty one is empty."""

    name: str
    tensors: Mapping[str, Tensor]

    def data(self) -> bytes:
        """Of two names for one tensor, as simulation keeps what is alike, safetensors would write neither."""
        seen, apart = set[int](), dict[str, Tensor]()
        for name, tensor in self.tensors.items():
            apart[name] = tensor.clone() if id(tensor) in seen else tensor
            seen.add(id(tensor))
        return save(apart)

    def size(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @classmethod
    def read(cls, name: str, data: bytes) -> Part:
        """Raises Damaged unless these are the tensors that the name was made from."""
        try:
            tensors = load(data)
        except (SafetensorError, RuntimeError, *MALFORMED) as error:
            raise Damaged(f"it cannot be read: {error}") from error
        if (found := _name({name: _digest(tensor) for name, tensor in tensors.items()})) != name:
            raise Damaged(f"it holds other tensors, of digest {found[:12]}")
        return cls(name, tensors)


class Memory(MutableMapping[str, Tensor]):
    """Named tensors. To be replaced, never to be written to: an ask that fails leaves them as they were."""

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, alike: MutableMapping[bytes, Tensor] | None = None) -> None:
        self._alike = alike
        self._tensors = {name: _own(tensor) for name, tensor in (tensors or {}).items()}
        self._kept: set[str] = set()  # names of what others keep alike
        self._digests: dict[str, tuple[Tensor, int, bytes]] = {}  # of each tensor as it was at that version

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = _own(tensor)
        self._kept.discard(name)
        self._digests.pop(name, None)

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]
        self._kept.discard(name)
        self._digests.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def keep(self, name: str, tensor: Tensor) -> None:
        """Of what many clients remember alike, as a broadcast, a simulation keeps one copy: read it, and never write to it.
        A node has its own of each."""
        own = _own(tensor)
        if self._alike is not None:
            digest = _digest(own)
            own = self._alike.setdefault(digest, own)
            self._digests[name] = own, own._version, digest
        self._tensors[name] = own
        self._kept.add(name)

    def copy(self) -> Memory:
        """To work on: its tensors are the same until they are replaced."""
        copied = Memory(alike=self._alike)
        copied._tensors, copied._kept, copied._digests = dict(self._tensors), set(self._kept), dict(self._digests)
        return copied

    def parts(self) -> tuple[Part, Part]:
        """What is kept alike, and the client's own."""
        return self._part(self._kept), self._part(self._tensors.keys() - self._kept)

    @classmethod
    def of(cls, kept: Part, own: Part, alike: MutableMapping[bytes, Tensor] | None = None) -> Memory:
        memory = cls(own.tensors, alike)
        for name, tensor in kept.tensors.items():
            memory.keep(name, tensor)
        return memory

    def _part(self, names: set[str]) -> Part:
        return Part(
            _name({name: self._digested(name) for name in names}), {name: self._tensors[name] for name in sorted(names)}
        )

    def _digested(self, name: str) -> bytes:
        """A tensor is hashed once; torch counts how often it was written to."""
        tensor = self._tensors[name]
        of, version, digest = self._digests.get(name, (None, 0, b""))
        if of is not tensor or version != tensor._version:
            digest = _digest(tensor)
            self._digests[name] = tensor, tensor._version, digest
        return digest


def _own(tensor: Tensor) -> Tensor:
    """A copy that shares its storage with nothing, in one piece: what safetensors can write."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _name(digests: Mapping[str, bytes]) -> str:
    told = [[name, digests[name].hex()] for name in sorted(digests)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest() if told else ""


def _digest(tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.numel():  # torch cannot view all tensors without numbers as bytes
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.digest()
