"""What the server computes, against the obvious way to compute it: refactoring a stack of factors, folding answers.

Both sides of a ratio run in this process with the same threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedtune import lora
from fedtune.adapter import Factors
from fedtune.folding import weighted_mean
from fedtune.payload import Payload, Role
from fedtune.strategy import Answer

Ratio = tuple[str, float, float, str]  # what is measured, the one side, the other, the goal of their ratio
LLAMA_Q_V = [(16, 2048), (2048, 16), (16, 2048), (512, 16)] * 16  # A and B of q_proj and v_proj, Llama-3.2-1B at rank 16
LARGE = [(4096, 4096)]  # 64 MiB


class LargestTensor(TorchDispatchMode):
    """While it is entered: the most bytes that the result of any operation had."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, Sequence) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return result


def refactoring(d: int = 4096, k: int = 4096, clients: int = 20, rank: int = 16) -> list[Ratio]:
    """The mean of all clients' products at one client's rank, from factors and from the d x k matrix."""
    draw = torch.Generator().manual_seed(0)
    pairs = [Factors(torch.randn(rank, k, generator=draw), torch.randn(d, rank, generator=draw), 2.0) for _ in range(clients)]
    weights = [1 / clients] * clients

    def ours() -> Factors:
        return lora.refactor(lora.stack(pairs, weights), rank)[0]

    torch.linalg.svd(torch.eye(8))  # the library is loaded by the first call
    seconds, small = fastest(ours)
    dense_seconds, large = fastest(lambda: densely(pairs, weights, rank), repeats=1)
    apart = (small.B @ small.A - large.B @ large.A).norm() / (large.B @ large.A).norm()
    if not apart < 1e-4:
        raise ArithmeticError(f"the two products are {apart:.1e} apart, wanted below 1e-4")
    with LargestTensor() as largest:
        ours()
    what = f"{clients} x rank {rank} refactored to {rank}, {d} x {k}"
    return [
        (f"{what}: dense product and SVD / ours, seconds", dense_seconds, seconds, ">= 50"),
        (f"{what}: our largest tensor / the matrix in float32, MB", largest.bytes / 1e6, 4e-6 * d * k, "<= 0.5"),
    ]


def densely(pairs: Sequence[Factors], weights: Sequence[float], rank: int) -> Factors:
    """In float32: the sum of the products, its SVD, and the leading directions of that."""
    product = torch.zeros(*pairs[0].shape)  # (d, k)
    for pair, weight in zip(pairs, weights, strict=True):
        product.addmm_(pair.B, pair.A, alpha=weight * pair.scale)
    U, S, Vt = torch.linalg.svd(product, full_matrices=False)
    root = S[:rank].sqrt()
    return Factors(root[:, None] * Vt[:rank], U[:, :rank] * root, 1.0)


def folding() -> list[Ratio]:
    return [
        _folding("20 answers of 64 LoRA tensors", LLAMA_Q_V, 20),
        _folding("20 answers of 64 MiB", LARGE, 20, different=4),
    ]


def _folding(what: str, shapes: Sequence[tuple[int, int]], count: int, different: int | None = None) -> Ratio:
    """`different`: so many answers are in memory, each of which comes several times; together they fit into no cache."""
    answers = [_answer(shapes) for _ in range(different or count)]
    stream = [(f"{number:02d}", 1 / count, answers[number % len(answers)]) for number in range(count)]
    size = count * sum(tensor.nbytes for tensor in answers[0].payload.tensors.values()) / 1e9
    seconds, yardstick = float("inf"), float("inf")
    for _ in range(5):  # in turn, so that a slow second of the machine falls on both
        seconds = min(seconds, fastest(lambda: weighted_mean(stream), repeats=1)[0])
        yardstick = min(yardstick, fastest(lambda: added_in_float32(stream), repeats=1)[0])
    return f"{what}: fold / torch.add in float32, GB/s", size / seconds, size / yardstick, ">= 0.5"


def added_in_float32(stream: Sequence[tuple[str, float, Answer]]) -> dict[str, Tensor]:
    """The yardstick: one operation for each tensor, into a sum that is there already."""
    sums = {name: torch.zeros_like(tensor) for name, tensor in stream[0][2].payload.tensors.items()}
    for _, share, answer in stream:
        for name, tensor in answer.payload.tensors.items():
            torch.add(sums[name], tensor, alpha=share, out=sums[name])
    return sums


def _answer(shapes: Sequence[tuple[int, int]]) -> Answer:
    tensors = {str(number): torch.randn(shape) for number, shape in enumerate(shapes)}
    return Answer(Payload(tensors, dict.fromkeys(tensors, Role.DENSE)))


def fastest(work: Callable[[], Any], repeats: int = 5) -> tuple[float, Any]:
    """Seconds of the fastest of a few calls, which other work on the machine disturbs least, and its result."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - began)
    return min(times), result
