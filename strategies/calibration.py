"""The leading singular directions of the clients' mean gradient G (d, k), found from sums alone: how `fed_sb` begins.

A range finder (Halko et al. 2011, algorithms 4.1 and 5.1), with the gradients of a LoRA pair as its two products with G. Where
a secure sum stands in between, no single client's gradient can be seen:

    "sketch":   A = Omega^T, B = 0:  dL_i/dB = s G_i Omega     (d, r)      Q = qr(sum_i p_i s G_i Omega)
    "project":  A = 0,       B = Q:  dL_i/dA = s Q^T G_i       (r, k)      U S V^T = svd(Q sum_i p_i s Q^T G_i)

In both, B A = 0: all gradients are those at the base model. Omega never travels: both sides draw it from a seed. With more
than one pass, the next sketch takes the rows V^T just found in place of Omega^T, which sharpens them where G has more than r
directions (power iteration). A pass costs each client `r*(d + k)` numbers up and `r*d + 2*h` down, from the second on r*k more.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping

import torch
from torch import Tensor

from fedtune import lora
from fedtune.adapter import Adapter, Factors
from fedtune.payload import Payload, Role, payload_of
from fedtune.seeds import uniform
from fedtune.strategy import Answers, Ask, LocalModel

SKETCH, PROJECT = "sketch", "project"  # kinds of ask


def leading_directions(start: Adapter, passes: int) -> Generator[Ask, Answers, dict[str, Factors]]:
    """Server half: the pair A = V^T, B = U of each module, both orthonormal, with the rank and scale that it has in `start`."""
    found: dict[str, Factors] = {}
    for _ in range(passes):
        sketches = yield Ask(SKETCH, _asked(start, Role.A, {path: pair.A for path, pair in found.items()}), wants=(Role.B,))
        summed = sketches.mean().tensors
        columns = {path: torch.linalg.qr(summed[f"{path}.{Role.B}"].double())[0].float() for path in start.lora}  # Q, (d, r)
        projections = yield Ask(PROJECT, _asked(start, Role.B, columns), wants=(Role.A,))
        summed = projections.mean().tensors
        found = {path: _directions(columns[path], summed[f"{path}.{Role.A}"], pair.scale) for path, pair in start.lora.items()}
    return found


def slopes(ask: Ask, local: LocalModel, batches: int, seed: int) -> Payload:
    """Client half: the gradient by the one factor that the ask leaves at zero, of the mean loss over so many batches."""
    given, sketching = ask.payload, ask.kind == SKETCH
    zero, fixed = (Role.B, "A") if sketching else (Role.A, "B")
    dense = {name: tensor for name, tensor in given.tensors.items() if given.roles[name] is Role.DENSE}
    paths = [name.removesuffix(".scale") for name in given.scalars if name.endswith(".scale")]
    pairs = {path: (_rows if sketching else _columns)(path, given, local, seed) for path in paths}
    local.load(Adapter(pairs, dense), frozen=(fixed, "dense"))
    return payload_of(Adapter(local.gradient(batches).lora), (zero,))


def _asked(start: Adapter, role: Role, factors: Mapping[str, Tensor]) -> Payload:
    """The factor that is fixed in this ask, the shapes of all, and the heads, without which there is no loss."""
    tensors = {f"{path}.{role}": tensor for path, tensor in factors.items()}
    sizes = {f"{path}.{side}": float(n) for path, m in start.lora.items() for side, n in zip("dk", m.shape, strict=True)}
    scales = {f"{path}.scale": pair.scale for path, pair in start.lora.items()}
    roles = {**dict.fromkeys(tensors, role), **dict.fromkeys(start.dense, Role.DENSE)}
    return Payload({**tensors, **start.dense}, roles, {**sizes, **scales})


def _rows(path: str, given: Payload, local: LocalModel, seed: int) -> Factors:
    """The rows that were found before, or Omega^T, and B = 0."""
    r, d, k = local.rank_of(path), int(given.scalars[f"{path}.d"]), int(given.scalars[f"{path}.k"])
    rows = given.tensors.get(f"{path}.{Role.A}")
    omega = uniform((r, k), 1.0, seed, "sketch", path) if rows is None else rows
    return Factors(omega, torch.zeros(d, r), given.scalars[f"{path}.scale"])


def _columns(path: str, given: Payload, local: LocalModel, seed: int) -> Factors:
    """A = 0 and B = Q."""
    r, k = local.rank_of(path), int(given.scalars[f"{path}.k"])
    return Factors(torch.zeros(r, k), given.tensors[f"{path}.{Role.B}"], given.scalars[f"{path}.scale"])


def _directions(Q: Tensor, projected: Tensor, scale: float) -> Factors:
    U, _, Vt = lora.svd(Factors(projected, Q, 1.0))  # (d, r), (r,), (r, k)
    return Factors(Vt.float(), U.float(), scale)
