"""LoRA algebra on factors. No d x k matrix is built here, save where a weight of that size is being changed.

Notation: a pair stands for M = s B A with B (d, r), A (r, k). Sums are taken in float64 and returned in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fedtune.adapter import Factors

FLOAT32_NOISE = 2.0**-24  # relative to the largest singular value


def stack(pairs: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The pair whose product is exactly `sum_i weights[i] * s_i B_i A_i`; its rank is the sum of the ranks.

    FLoRA (Wang et al. 2024, arXiv 2409.05976, eq. 3): B side by side, A one above the other. Weight and scale stand on A
    alone, so the scale of the result is 1.
    """
    if not pairs:
        raise ValueError("stack: no pairs were given, at least one is wanted")
    A = torch.cat([w * p.scale * p.A.double() for p, w in zip(pairs, weights, strict=True)])  # (R, k)
    B = torch.cat([p.B.double() for p in pairs], dim=1)  # (d, R)
    return Factors(A, B, 1.0)


class Stack:
    """`sum_i w_i s_i B_i A_i` of one module, taken up one pair at a time; never of many more directions than the matrix has."""

    def __init__(self, *pairs: Factors) -> None:
        self._pairs, self._weights = list(pairs), [1.0] * len(pairs)

    def add(self, pair: Factors, weight: float = 1.0) -> None:
        self._pairs.append(pair)
        self._weights.append(weight)
        if sum(one.rank for one in self._pairs) > 2 * min(pair.shape):
            self._pairs, self._weights = [compact(stack(self._pairs, self._weights))], [1.0]

    def pair(self) -> Factors:
        """In float64, with scale 1."""
        whole = stack(self._pairs, self._weights)
        return whole if whole.rank <= min(whole.shape) else compact(whole)


def product_norm(pair: Factors) -> float:
    """Frobenius norm of s B A, from `tr((B^T B)(A A^T))`: O((d + k) r^2)."""
    A, B = pair.A.double(), pair.B.double()
    squared = ((B.T @ B) * (A @ A.T)).sum().item()
    return abs(pair.scale) * math.sqrt(max(squared, 0.0))


def svd(pair: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """U (d, q), S (q,), V^T (q, k) of s B A with q = min(r, d, k), in float64: two thin QR and one r x r SVD."""
    return leading(pair, len)


def leading(pair: Factors, choose: Callable[[Tensor], int]) -> tuple[Tensor, Tensor, Tensor]:
    """As `svd`, with the first n columns of U and rows of V^T only, where n is what `choose` makes of S: Q is never formed,
    but applied to these."""
    left, right = torch.geqrf(pair.B.double()), torch.geqrf(pair.A.double().T)
    U, S, Vt = torch.linalg.svd(pair.scale * _triangle(left[0]) @ _triangle(right[0]).T, full_matrices=False)
    n = choose(S)
    U, V = _times_q(*left, U[:, :n]), _times_q(*right, Vt[:n].T)  # (d, n), (k, n)
    signs = torch.sign(largest_entries(V.T))  # an SVD leaves signs open: fix them
    return U * signs, S, (V * signs).T


def _triangle(reflectors: Tensor) -> Tensor:
    """R (min(m, r), r) of a QR as LAPACK leaves it."""
    return reflectors[: min(reflectors.shape)].triu()


def _times_q(reflectors: Tensor, tau: Tensor, X: Tensor) -> Tensor:
    """`Q X` with X (min(m, r), n)."""
    padded_x = X.new_zeros(reflectors.shape[0], X.shape[1])
    padded_x[: X.shape[0]] = X
    return torch.ormqr(reflectors[:, : len(tau)], tau, padded_x)


def largest_entries(rows: Tensor) -> Tensor:
    """Of each row its entry of largest magnitude: (q, k) -> (q,)."""
    return rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).squeeze(1)


def refactor(pair: Factors, rank: int, row_norm: float | None = None, energy: float = 1.0) -> tuple[Factors, float]:
    """The best pair of at most `rank` for the same product, most important direction first, and the share of the
    squared norm that was discarded. Of `rank` only as many directions are taken as hold the share `energy` of the squared
    norm; those that float32 cannot tell from zero are left out, save the first.

    The singular values are split evenly (`B = U sqrt(S)`, `A = sqrt(S) V^T`), or, with `row_norm`, all stand in B and
    each row of A has that norm. The scale of the result is 1.
    """
    U, S, Vt = leading(pair, lambda S: directions(S, rank, energy))
    kept, squared = U.shape[1], S.square()
    total = squared.sum().item()
    discarded = squared[kept:].sum().item() / total if total > 0 else 0.0
    S = S[:kept]
    on_a = S.sqrt() if row_norm is None else torch.full_like(S, row_norm)
    on_b = S.sqrt() if row_norm is None else S / row_norm
    return Factors((on_a[:, None] * Vt).float(), (U * on_b).float(), 1.0), discarded


def directions(S: Tensor, rank: int, energy: float = 1.0) -> int:
    """How many of these singular values to keep."""
    squared = S.square()
    above_noise = int((S[:1] * FLOAT32_NOISE < S).sum())
    holding = len(S) if energy >= 1 else 1 + int((squared.cumsum(0) < energy * squared.sum()).sum())
    return min(rank, len(S), max(1, above_noise), holding)


def of_matrix(matrix: Tensor) -> Factors:
    """A whole (d, k) matrix as a pair: itself beside the identity of its smaller side."""
    d, k = matrix.shape
    return Factors(matrix, torch.eye(d), 1.0) if d < k else Factors(torch.eye(k), matrix, 1.0)


def joined(one: Factors, other: Factors) -> Factors:
    """The sum of two products as one pair, with the directions of `one` first; both need the same scale."""
    return Factors(torch.cat([one.A, other.A]), torch.cat([one.B, other.B], dim=1), one.scale)


def compact(pair: Factors) -> Factors:
    """The same product, in float64, with at most min(d, k) directions."""
    U, S, Vt = svd(pair)
    return Factors(S[:, None] * Vt, U, 1.0)


def first(pair: Factors, rank: int) -> Factors:
    """The leading `rank` directions of a pair: A[:rank], B[:, :rank]."""
    return Factors(pair.A[:rank], pair.B[:, :rank], pair.scale)


def rest(pair: Factors, rank: int) -> Factors:
    """What `first` leaves: `first(p, r)` and `rest(p, r)` add up to p."""
    return Factors(pair.A[rank:], pair.B[:, rank:], pair.scale)


def with_scale(pair: Factors, scale: float) -> Factors:
    """The same product with another scale; B carries the difference."""
    return Factors(pair.A, pair.B * (pair.scale / scale), scale)


def with_core(pair: Factors, core: Tensor | None) -> Factors:
    """`s B R A` as a pair: R (r, r) goes into B."""
    return pair if core is None else Factors(pair.A, pair.B @ core, pair.scale)


def padded(pair: Factors, rank: int) -> Factors:
    """The same product with zero rows and columns up to `rank`."""
    missing = rank - pair.rank
    A = torch.cat([pair.A, pair.A.new_zeros(missing, pair.A.shape[1])])
    B = torch.cat([pair.B, pair.B.new_zeros(pair.B.shape[0], missing)], dim=1)
    return Factors(A, B, pair.scale)


def residual(pairs: Sequence[Factors], weights: Sequence[float], published: Factors) -> Factors:
    """The pair whose product is `sum_i weights[i] s_i B_i A_i - s B A`: what publishing (A, B, s) leaves out."""
    return stack([*pairs, published], [*weights, -1.0])


def merged(weight: Tensor, pairs: Iterable[Factors], transposed: bool = False) -> Tensor:
    """`weight` (d, k) plus the products, added in float32 and rounded once to the weight's own dtype.

    `transposed` is for layers that store their weight as (k, d), such as GPT-2's Conv1D.
    """
    total = weight.float()
    for pair in pairs:
        delta = pair.scale * pair.B.float() @ pair.A.float()  # (d, k)
        total = total + (delta.T if transposed else delta).to(total.device)
    return total.to(weight.dtype)
