"""How many examples fit into memory at a time: where it runs out, the same work is done again with half as many.

What has proved to be too much is not tried again on the same resident model, and so for the rest of the job.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedtune.errors import ClientFailed

if TYPE_CHECKING:
    from client.model import ResidentModel

Kind = Literal["training", "forward passes", "evaluation"]
Result = TypeVar("Result")

log = logging.getLogger("fedtune.trainer")
# How a RuntimeError says it: the CPU's allocator, the driver, cuBLAS.
SHORT = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
INSTEAD = "--set data.max_length=…, adapter.rank=… with less, --set train.checkpointing=true, or a smaller model"
_fits: WeakKeyDictionary[ResidentModel, dict[Kind, int]] = WeakKeyDictionary()


def within_memory(
    resident: ResidentModel, kind: Kind, wanted: int, work: Callable[[int], Result], drop: Callable[[], object] | None = None
) -> Result:
    """`work(size)`, with `size` examples in memory at a time: `wanted`, or as many as fit. `drop` takes back what an attempt
    has left that broke off; its draws are taken back here. Raises ClientFailed where not even one fits."""
    size = min(wanted, _fits.get(resident, {}).get(kind, wanted))
    while True:
        drawn = _random_state(resident.device)
        try:
            return work(size)
        except (MemoryError, RuntimeError) as error:
            if not is_short(error):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
        # Only here, where the error is gone, and with it the frames that hold the failed attempt's tensors.
        if drop is not None:
            drop()
        _free(resident.device)
        _set_random_state(resident.device, drawn)
        size = _lowered(resident, kind, size, reason)


def lowered(resident: ResidentModel) -> dict[str, float]:
    """`micro_batch`, where it had to be lowered for training on this model: part of an answer's metrics."""
    fits = _fits.get(resident, {})
    known = [fits[kind] for kind in ("training", "forward passes") if kind in fits]
    return {"micro_batch": float(min(known))} if known else {}


def is_short(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or here."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SHORT)


def _lowered(resident: ResidentModel, kind: Kind, size: int, reason: str) -> int:
    if size <= 1:
        log.error("memory is short: %s with one example at a time does not fit (%s)", kind, reason)
        raise ClientFailed(f"memory ran out in {kind} with one example at a time (train.micro_batch = 1): type {INSTEAD}")
    half = size // 2
    log.warning("memory is short: %s goes on with %d in place of %d examples at a time (%s)", kind, half, size, reason)
    _fits.setdefault(resident, {})[kind] = half
    return half


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of torch's generators that dropout draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    here, there = state
    torch.set_rng_state(here)
    if there is not None:
        torch.cuda.set_rng_state(there, device)
