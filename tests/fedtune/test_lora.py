"""LoRA algebra against the dense matrices that it never builds, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune import lora
from fedtune.adapter import Factors
from fedtune.aggregation import aggregation_error
from fedtune.testing import product

quick = settings(max_examples=40, deadline=None, derandomize=True)


def pair(d: int, k: int, r: int, scale: float = 1.0, seed: int = 0) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(r, k, generator=draw), torch.randn(d, r, generator=draw), scale)


def mean_error(family: list[Factors], weights: list[float], published: Factors) -> float:
    return aggregation_error({"m": lora.stack(family, weights)}, {"m": published})["aggregation_error.m"]


def close(given: Tensor, wanted: Tensor, rtol: float = 1e-6) -> None:
    assert (given.double() - wanted).norm() <= rtol * wanted.norm() + 1e-30


sizes = st.integers(1, 7)
scales = st.sampled_from([0.25, 1.0, 2.0, 16 / 3**0.5])
pairs = st.builds(pair, sizes, sizes, st.integers(0, 8), scales, st.integers(0, 1000))


@st.composite
def families(draw: st.DrawFn) -> tuple[list[Factors], list[float]]:
    """Pairs for one matrix, of any ranks and scales, and their weights over orders of magnitude."""
    d, k, count = draw(sizes), draw(sizes), draw(st.integers(1, 4))
    family = [pair(d, k, draw(st.integers(0, 4)), draw(scales), draw(st.integers(0, 1000))) for _ in range(count)]
    return family, [draw(st.sampled_from([1e-4, 0.1, 0.5, 1.0, -1.0])) for _ in range(count)]


def summed(family: list[Factors], weights: list[float]) -> Tensor:
    return torch.stack([weight * product(one) for one, weight in zip(family, weights, strict=True)]).sum(0)


@quick
@given(families())
def test_stack_is_the_weighted_sum_of_products(drawn: tuple[list[Factors], list[float]]) -> None:
    family, weights = drawn
    stacked = lora.stack(family, weights)
    assert (stacked.rank, stacked.scale) == (sum(one.rank for one in family), 1.0)
    largest = sum(abs(w) * product(one).norm() for one, w in zip(family, weights, strict=True))
    assert (product(stacked) - summed(family, weights)).norm() <= 1e-12 * largest


def test_stack_wants_pairs_and_as_many_weights() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        lora.stack([], [])
    with pytest.raises(ValueError, match="shorter"):
        lora.stack([pair(3, 4, 2)] * 2, [1.0])


@quick
@given(pairs)
def test_product_norm_is_that_of_the_dense_product(one: Factors) -> None:
    assert lora.product_norm(one) == pytest.approx(product(one).norm().item(), rel=1e-9, abs=1e-12)


@quick
@given(pairs)
def test_svd_is_that_of_the_dense_product(one: Factors) -> None:
    U, S, Vt = lora.svd(one)
    close(U @ torch.diag(S) @ Vt, product(one), 1e-12)
    wanted = torch.linalg.svdvals(product(one))
    torch.testing.assert_close(S, wanted[: len(S)], rtol=1e-9, atol=1e-9)
    assert len(S) == min(one.rank, *one.shape)
    identity = torch.eye(len(S), dtype=torch.float64)
    torch.testing.assert_close(U.T @ U, identity)
    torch.testing.assert_close(Vt @ Vt.T, identity)


def test_signs_of_the_svd_are_fixed() -> None:
    """The same product from other factors: -A and -B, or its own SVD with signs turned."""
    one = pair(5, 4, 3, 2.0)
    turned = Factors(-one.A, -one.B, one.scale)
    U, _, Vt = lora.svd(one)
    for wanted, given_ in zip((U, Vt), lora.svd(turned)[::2], strict=True):
        torch.testing.assert_close(given_, wanted)
    assert (lora.largest_entries(Vt) > 0).all()
    assert lora.largest_entries(torch.tensor([[1.0, -3.0], [2.0, 0.5]])).tolist() == [-3.0, 2.0]


@quick
@given(pairs, st.integers(1, 4), st.sampled_from([None, 3**-0.5]))
def test_refactor_is_the_best_of_its_rank_and_tells_the_loss(one: Factors, rank: int, row_norm: float | None) -> None:
    U, S, Vt = torch.linalg.svd(product(one), full_matrices=False)
    kept, discarded = lora.refactor(one, rank, row_norm)
    best = U[:, :rank] @ torch.diag(S[:rank]) @ Vt[:rank]
    close(product(kept), best, 1e-5)
    assert kept.rank <= rank
    assert kept.scale == 1.0
    total = S.square().sum().item()
    assert discarded == pytest.approx(S[rank:].square().sum().item() / total if total else 0.0, rel=1e-6, abs=1e-12)


def test_refactor_splits_evenly_or_gives_rows_a_norm() -> None:
    one = pair(6, 5, 3)
    even, _ = lora.refactor(one, 3)
    torch.testing.assert_close(even.A.norm(dim=1), even.B.norm(dim=0))
    rows, _ = lora.refactor(one, 3, row_norm=0.5)
    torch.testing.assert_close(rows.A.norm(dim=1), torch.full((3,), 0.5))
    S = torch.linalg.svdvals(product(one))[:3].float()
    torch.testing.assert_close(rows.B.norm(dim=0), S / 0.5)


def test_refactor_leaves_out_directions_that_float32_cannot_see() -> None:
    one, other = pair(6, 5, 1, seed=1), pair(6, 5, 1, seed=2)
    assert lora.refactor(lora.stack([one, other], [1.0, 1e-9]), 4)[0].rank == 1
    assert lora.refactor(lora.stack([one, other], [1.0, 1e-5]), 4)[0].rank == 2
    assert lora.refactor(Factors(one.A, 0 * one.B, 1.0), 4)[0].rank == 1
    assert lora.refactor(pair(6, 5, 0), 4)[0].rank == 0


@quick
@given(pairs)
def test_compact_keeps_the_product_in_no_more_directions_than_there_are(one: Factors) -> None:
    small = lora.compact(one)
    close(product(small), product(one), 1e-12)
    assert small.rank == min(one.rank, *one.shape)


@quick
@given(pairs, st.integers(0, 9))
def test_first_and_rest_add_up(one: Factors, rank: int) -> None:
    head, tail = lora.first(one, rank), lora.rest(one, rank)
    assert (head.rank, tail.rank) == (min(rank, one.rank), max(one.rank - rank, 0))
    close(product(head) + product(tail), product(one), 1e-12)


@quick
@given(pairs, scales)
def test_another_scale_keeps_the_product(one: Factors, scale: float) -> None:
    other = lora.with_scale(one, scale)
    assert other.scale == scale
    assert other.A is one.A
    close(product(other), product(one))


def test_padding_keeps_the_product() -> None:
    one = pair(4, 3, 2, 2.5)
    wide = lora.padded(one, 5)
    assert (wide.A.shape, wide.B.shape, wide.scale) == ((5, 3), (4, 5), 2.5)
    assert torch.equal(product(wide), product(one))
    assert lora.padded(one, 2).rank == 2


@quick
@given(families())
def test_residual_and_error_of_the_mean(drawn: tuple[list[Factors], list[float]]) -> None:
    family, weights = drawn
    published = pair(*family[0].shape, 2, 0.7, seed=5)
    exact = summed(family, weights)
    close(product(lora.residual(family, weights, published)), exact - product(published), 1e-9)
    missed = (exact - product(published)).norm().item()
    wanted = missed / exact.norm().item() if exact.norm() > 1e-9 else None
    if wanted is not None:
        assert mean_error(family, weights, published) == pytest.approx(wanted, rel=1e-6)


def test_error_of_the_mean_of_nothing() -> None:
    nothing, something = pair(3, 3, 0), pair(3, 3, 1)
    assert mean_error([nothing], [1.0], nothing) == 0.0
    assert mean_error([nothing], [1.0], something) == pytest.approx(product(something).norm().item())
    assert mean_error([something], [1.0], something) < 1e-7


@pytest.mark.parametrize("shape", [(4, 6), (5, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_merged_adds_the_products_either_way_up(shape: tuple[int, int], transposed: bool) -> None:
    """A square weight in a Conv1D takes the transpose too, though the shapes would fit without it."""
    d, k = shape
    one, other = pair(d, k, 2, 1.5, seed=1), pair(d, k, 3, 0.5, seed=2)
    weight = torch.randn((k, d) if transposed else (d, k), generator=torch.Generator().manual_seed(0))
    change = product(one) + product(other)
    close(lora.merged(weight, [one, other], transposed), weight.double() + (change.T if transposed else change))


def test_merged_rounds_once() -> None:
    """Eight changes of 2^-9 make 2^-6: each alone is below half a step of bfloat16 at 1, whose steps are 2^-7."""
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    small = Factors(torch.ones(1, 1), torch.full((1, 1), 2.0**-9), 1.0)
    merged = lora.merged(weight, [small] * 8)
    assert merged.dtype == torch.bfloat16
    assert merged.item() == 1 + 2.0**-6
    assert lora.merged(weight, [small]).item() == 1.0
    assert weight.item() == 1.0


# what grows, and what stands for a whole matrix


def test_a_stack_is_the_sum_however_much_is_put_on_it() -> None:
    """20 pairs of rank 3 on a 6 x 4 matrix, weights 1 to 20: the dense sum, with at most 4 directions."""
    pairs = [pair(6, 4, 3, seed=seed) for seed in range(20)]
    stack = lora.Stack()
    for weight, one in enumerate(pairs, 1):
        stack.add(one, weight)
    wanted = sum((weight * product(one) for weight, one in enumerate(pairs, 1)), torch.zeros(()))
    assert stack.pair().rank <= 4
    torch.testing.assert_close(product(stack.pair()), wanted, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_a_matrix_is_a_pair_beside_an_identity(shape: tuple[int, int]) -> None:
    matrix = torch.arange(float(math.prod(shape))).reshape(shape)
    one = lora.of_matrix(matrix)
    assert one.rank == min(shape)
    assert torch.equal(product(one).float(), matrix)


def test_joined_adds_products_and_keeps_the_first_in_front() -> None:
    one, other = pair(6, 4, 2, seed=1), pair(6, 4, 3, seed=2)
    both = lora.joined(one, other)
    torch.testing.assert_close(product(both), product(one) + product(other))
    torch.testing.assert_close(product(lora.first(both, 2)), product(one))


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.64, 1), (0.65, 2), (0.98, 2), (1.0, 3)])
def test_energy_keeps_as_few_directions_as_hold_it(energy: float, rank: int) -> None:
    """Singular values 8, 5.9 and 1: squares 64, 34.81 and 1 of 99.81, so 0.641, 0.990 and 1 accumulate."""
    Q, _ = torch.linalg.qr(pair(6, 4, 3, seed=3).B.double())
    whole = Factors(torch.eye(3, 4, dtype=torch.float64), Q * torch.tensor([8.0, 5.9, 1.0], dtype=torch.float64), 1.0)
    kept, discarded = lora.refactor(whole, 3, energy=energy)
    assert kept.rank == rank
    assert discarded == pytest.approx(1 - [64, 98.81, 99.81][rank - 1] / 99.81, abs=1e-9)


def test_a_core_goes_into_b() -> None:
    one, core = pair(6, 4, 2, seed=1), torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    torch.testing.assert_close(product(lora.with_core(one, core)), one.scale * one.B.double() @ core.double() @ one.A.double())
    assert lora.with_core(one, None) is one
