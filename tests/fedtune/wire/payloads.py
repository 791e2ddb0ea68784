"""Payloads for tests of the wire: of any names, roles, types, shapes and numbers, and what a receiver may know of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from fedtune.payload import Payload, Role
from fedtune.wire.codec import codec_from
from fedtune.wire.packed import Codecs
from fedtune.wire.presets import PRESETS
from fedtune.wire.raw import as_it_lies

SHAPES = ((), (1,), (7,), (300,), (3, 5), (16, 16), (64, 3), (2, 3, 4), (0,), (2, 0, 3))
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STAGES = (
    "bf16", "common | entropy", "delta_come(1, 1, 1) | entropy", "fp16 | entropy", "fp32", "fp32 | entropy", "int2 | entropy",
    "int4(16, nearest)", "int8", "powersgd(1) | int8 | entropy", "randk(0.5) | fp16", "rotate | int4 | entropy",
    "ternary | entropy", "topk(0.3) | entropy", "topk(0.05) | int4 | entropy", "uniform(1.0, true) | entropy",
)  # fmt: skip


def codecs(change: str, first: str = "bf16 | entropy") -> Codecs:
    return Codecs(codec_from(change), codec_from(first))


CODECS = {name: codecs(preset.up, preset.first) for name, preset in PRESETS.items()} | {
    text: codecs(text, STAGES[-1 - place]) for place, text in enumerate(STAGES)
}


def same_bits(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape, as_it_lies(one)) == (other.dtype, other.shape, as_it_lies(other))


def same_payload(one: Payload, other: Payload) -> bool:
    """Bit for bit, in the same order; NaN is NaN."""
    names = list(one.tensors) == list(other.tensors) and dict(one.roles) == dict(other.roles)
    scalars = [f"{name} {value!r}" for name, value in one.scalars.items()]
    return (
        names
        and all(same_bits(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
        and scalars == [f"{name} {value!r}" for name, value in other.scalars.items()]
    )


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int, how: str) -> Tensor:
    """`how`: one of HOW."""
    rng = np.random.default_rng(seed)
    if how == "bits":  # infinite, no numbers, subnormal: anything
        size = int(np.prod(shape)) * dtype.itemsize
        return torch.frombuffer(bytearray(rng.bytes(size) or bytes(8)), dtype=dtype)[: int(np.prod(shape))].reshape(shape)
    scale = {"normal": 1.0, "tiny": 1e-42, "huge": 1e38, "zeros": 0.0}[how]
    plain = np.asarray(rng.normal(size=shape) * scale * np.where(rng.random(shape) < 0.1, -0.0, 1.0))
    return torch.from_numpy(np.asarray(np.clip(plain, -3e38, 3e38))).to(dtype)


HOW = ("normal", "normal", "tiny", "huge", "zeros", "bits")
names = st.text(st.characters(codec="utf-8"), max_size=8)
scalars = st.dictionaries(names, st.floats(), max_size=3)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from([*FLOATS, torch.float32, torch.float64, torch.int64, torch.uint8]))
    how = draw(st.sampled_from(HOW if dtype in FLOATS else ("bits",)))
    return numbers(draw(st.sampled_from(SHAPES)), dtype, draw(st.integers(0, 2**32)), how)


@st.composite
def payloads(draw: st.DrawFn) -> Payload:
    parts = draw(st.dictionaries(names, st.tuples(tensors(), st.sampled_from(Role)), max_size=4))
    return Payload({name: t for name, (t, _) in parts.items()}, {name: r for name, (_, r) in parts.items()}, draw(scalars))


@st.composite
def known_to(draw: st.DrawFn, payload: Payload) -> Payload:
    """What a receiver may have of a payload: nothing, the same, close, or another tensor by the same name."""
    known = {name: one for name in payload.tensors if (one := draw(_known_as(payload.tensors[name]))) is not None}
    roles = {name: draw(st.sampled_from([payload.roles[name]] * 5 + [Role.A])) for name in known}
    return Payload(known, roles, payload.scalars if draw(st.booleans()) else draw(scalars))


@st.composite
def _known_as(draw: st.DrawFn, tensor: Tensor) -> Tensor | None:
    how = draw(st.sampled_from(["nothing", "same", "close", "close", "close", "another", "another type"]))
    if how == "nothing":
        return None
    if how == "close" and tensor.dtype in FLOATS:
        return tensor + (0.01 * numbers(tuple(tensor.shape), torch.float32, draw(st.integers(0, 99)), "normal")).to(
            tensor.dtype
        )
    if how == "another type":
        return tensor.to(torch.bfloat16)
    return draw(tensors()) if how == "another" else tensor.clone()


def small(seed: int = 0, **scalars: float) -> Payload:
    """Two modules and a vector."""
    shapes: Mapping[str, tuple[int, ...]] = {"q.lora_A": (4, 16), "q.lora_B": (24, 4), "k.lora_A": (4, 16), "k.lora_B": (16, 4)}
    factors = {
        name: numbers(shape, torch.float32, seed + place, "normal") for place, (name, shape) in enumerate(shapes.items())
    }
    roles = {name: Role.A if name.endswith("A") else Role.B for name in factors}
    vector = {"norms": torch.arange(5, dtype=torch.int64) + seed}
    return Payload({**factors, **vector}, {**roles, "norms": Role.VECTOR}, {"q.scale": 1.5, "k.scale": 1.5, **scalars})


def near(payload: Payload, seed: int = 0, step: float = 0.01) -> Payload:
    """After some training: other floats, the same whole numbers."""
    moved = {
        name: tensor + (step * numbers(tuple(tensor.shape), torch.float32, seed + place, "normal")).to(tensor.dtype)
        if tensor.dtype.is_floating_point
        else tensor
        for place, (name, tensor) in enumerate(payload.tensors.items())
    }
    return Payload(moved, payload.roles, payload.scalars)
