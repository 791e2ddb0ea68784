"""Payload: named tensors and scalars, each tensor with the role that it plays, and its two ways to and from an Adapter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from fedtune.adapter import Adapter, Factors


class Role(StrEnum):
    """What a tensor is, so that a codec or a clip knows how to treat it."""

    A = "lora_A"  # (r, k)
    B = "lora_B"  # (d, r)
    CORE = "lora_R"  # (r, r), between B and A
    DENSE = "dense"  # a whole parameter
    VECTOR = "vector"  # scalars in a row: seeds' coefficients, norms per layer


@dataclass(frozen=True)
class Payload:
    """Named tensors with their roles, and named scalars. The name of a tensor is unique across roles."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    roles: Mapping[str, Role] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tensors.keys() != self.roles.keys():
            odd = sorted(self.tensors.keys() ^ self.roles.keys())
            raise ValueError(f"a payload needs a role for each tensor and no other, these differ: {odd}")


def payload_of(adapter: Adapter, parts: Collection[Role] = (Role.A, Role.B, Role.DENSE)) -> Payload:
    """The chosen parts of an adapter. Tensors are `<path>.lora_A`, `<path>.lora_B`, `<parameter>`; scalars are
    `<path>.scale`."""
    tensors: dict[str, Tensor] = {}
    roles: dict[str, Role] = {}
    scalars: dict[str, float] = {}
    for path, pair in adapter.lora.items():
        for role, tensor in ((Role.A, pair.A), (Role.B, pair.B)):
            if role in parts:
                tensors[f"{path}.{role}"], roles[f"{path}.{role}"] = tensor, role
        scalars[f"{path}.scale"] = pair.scale
    if Role.DENSE in parts:
        tensors |= adapter.dense
        roles |= dict.fromkeys(adapter.dense, Role.DENSE)
    return Payload(tensors, roles, scalars)


def role_of(name: str) -> Role:
    """Of a tensor of an adapter or a model, by its name: factors are named after theirs."""
    return next((role for role in (Role.A, Role.B) if name.endswith(f".{role}")), Role.DENSE)


def by_name(tensors: Mapping[str, Tensor]) -> Payload:
    """Tensors of an adapter or a model, each with the role that its name tells."""
    return Payload(tensors, {name: role_of(name) for name in tensors})


def joined(*payloads: Payload) -> Payload:
    """All that they hold; of what two hold by the same name, the later's."""
    tensors = {name: tensor for payload in payloads for name, tensor in payload.tensors.items()}
    roles = {name: role for payload in payloads for name, role in payload.roles.items()}
    return Payload(tensors, roles, {name: value for payload in payloads for name, value in payload.scalars.items()})


def vectors(named: Mapping[str, Tensor]) -> Payload:
    """Numbers in rows, each row under its name."""
    return Payload(named, dict.fromkeys(named, Role.VECTOR))


def adapter_of(payload: Payload, like: Adapter | None = None) -> Adapter:
    """The adapter in a payload; parts that were not sent are taken from `like`."""
    like = like or Adapter()
    pairs = {name.removesuffix(".scale"): scale for name, scale in payload.scalars.items() if name.endswith(".scale")}
    lora = {}
    for path, scale in pairs.items():
        known = like.lora.get(path)
        A, B = payload.tensors.get(f"{path}.{Role.A}"), payload.tensors.get(f"{path}.{Role.B}")
        if (A is None or B is None) and known is None:
            raise ValueError(f"'{path}' came with one factor only, and there is no adapter to take the other from")
        lora[path] = Factors(known.A if A is None and known else A, known.B if B is None and known else B, scale)  # type: ignore[arg-type]
    dense = {name: tensor for name, tensor in payload.tensors.items() if payload.roles[name] is Role.DENSE}
    return Adapter({**like.lora, **lora}, {**like.dense, **dense}, like.base)
