"""Answers on disk, one file each, until the round is folded: memory does not grow with the cohort.

They are folded in the order of client ids, whatever order they came in, so the same answers give the same bits.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedtune.envelope import Envelope, WireTensor
from fedtune.payload import Payload, Role
from fedtune.strategy import Answer, Answers, Fold
from fedtune.wire import unpack_answer


class Spool:
    """The accepted answers to one ask."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, client: str, envelope: Envelope) -> None:
        """Atomic: either the whole answer lies in the spool or none of it."""
        path = self._path(client)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            tensors = [
                {"name": t.name, "dtype": t.dtype, "shape": t.shape, "stype": t.stype, "size": len(t.data)}
                for t in envelope.tensors
            ]
            file.write(json.dumps({"client": client, "header": dict(envelope.header), "tensors": tensors}).encode() + b"\n")
            for tensor in envelope.tensors:
                file.write(tensor.data)
        os.replace(temporary, path)

    def get(self, client: str) -> Envelope:
        with self._path(client).open("rb") as file:
            stored = json.loads(file.readline())
            tensors = tuple(
                WireTensor(t["name"], t["dtype"], tuple(t["shape"]), t["stype"], file.read(t["size"]))
                for t in stored["tensors"]
            )
        return Envelope(stored["header"], tensors)

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, client: str) -> Path:
        return self._folder / (client.encode().hex() + ".answer")


class SpooledAnswers(Answers):
    """What a strategy gets back: the spooled answers, read one at a time."""

    def __init__(self, spool: Spool, weights: Mapping[str, float], fold: Fold) -> None:
        total = sum(weights[client] for client in sorted(weights))
        self._shares = {client: weights[client] / total for client in sorted(weights)}
        self._spool, self._fold = spool, fold

    @property
    def weights(self) -> Mapping[str, float]:
        return self._shares

    def mean(self, roles: Collection[Role] | None = None) -> Payload:
        return weighted_mean(self._read(), roles)

    def __iter__(self) -> Iterator[tuple[str, float, Answer]]:
        if self._fold is not Fold.EACH:
            raise TypeError("this ask declared Fold.SUM: use mean(), or yield Ask(..., fold=Fold.EACH) to see each answer")
        return self._read()

    def _read(self) -> Iterator[tuple[str, float, Answer]]:
        for client, share in self._shares.items():
            yield client, share, unpack_answer(self._spool.get(client))


def weighted_mean(answers: Iterator[tuple[str, float, Answer]], roles: Collection[Role] | None = None) -> Payload:
    """`sum_i share_i payload_i` in float64, one answer at a time; float32 at the end. Integers become float32 too."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, float] = {}
    kinds: dict[str, Role] = {}
    for _, share, answer in answers:
        for name, tensor in answer.payload.tensors.items():
            if roles is None or answer.payload.roles[name] in roles:
                sum_so_far = tensors.get(name)
                tensors[name] = share * tensor.double() if sum_so_far is None else sum_so_far.add_(tensor.double(), alpha=share)
                kinds[name] = answer.payload.roles[name]
        for name, value in answer.payload.scalars.items():
            scalars[name] = scalars.get(name, 0.0) + share * value
    return Payload({name: tensor.to(torch.float32) for name, tensor in tensors.items()}, kinds, scalars)
