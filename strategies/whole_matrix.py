"""A pair of high rank on its way down: what nobody trains on from travels as a whole matrix where that is smaller."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune import lora
from fedtune.adapter import Adapter
from fedtune.payload import Payload, adapter_of, payload_of

REST = "rest"  # `<path>.rest`, (d, k)


def sent(adapter: Adapter, heads: Mapping[str, int]) -> Payload:
    """The adapter with the first `heads[path]` directions of each module as factors, and the rest so or as a matrix."""
    first, rests = {}, {}
    for path, pair in adapter.lora.items():
        head, (d, k) = heads.get(path, 0), pair.shape
        if (pair.rank - head) * (d + k) > d * k:
            rest = lora.rest(pair, head)
            first[path], rests[f"{path}.{REST}"] = lora.first(pair, head), rest.scale * rest.B @ rest.A
    return payload_of(Adapter({**adapter.lora, **first}, {**adapter.dense, **rests}))


def received(payload: Payload) -> Adapter:
    """The adapter that was sent; a matrix is again a pair, behind the directions that came as factors."""
    adapter = adapter_of(payload)
    names = {path: f"{path}.{REST}" for path in adapter.lora if f"{path}.{REST}" in adapter.dense}
    whole = dict(adapter.lora)
    for path, name in names.items():
        rest = lora.with_scale(lora.of_matrix(adapter.dense[name]), whole[path].scale)
        whole[path] = lora.joined(whole[path], rest)
    dense = {name: tensor for name, tensor in adapter.dense.items() if name not in names.values()}
    return Adapter(whole, dense)
