"""No d x k matrix where factors will do; and the benchmark's two sides compute the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedtune import lora
from fedtune.adapter import Factors
from fedtune.aggregation import aggregation_error
from fedtune.folding import weighted_mean
from fedtune.payload import Payload, Role
from fedtune.strategy import Answer
from simulations.bench import row
from simulations.bench_algebra import LargestTensor, added_in_float32, densely, refactoring

D, K, RANK, CLIENTS = 60, 50, 2, 5
FACTOR = 8 * D * RANK * (CLIENTS + 1)  # bytes: the B of everybody and of what was published, in float64


@pytest.fixture
def pairs() -> list[Factors]:
    draw = torch.Generator().manual_seed(0)
    return [Factors(torch.randn(RANK, K, generator=draw), torch.randn(D, RANK, generator=draw), 2.0) for _ in range(CLIENTS)]


WEIGHTS = [0.1, 0.2, 0.3, 0.3, 0.1]
ON_FACTORS: dict[str, Callable[[list[Factors]], object]] = {
    "refactor": lambda pairs: lora.refactor(lora.stack(pairs, WEIGHTS), RANK),
    "compact": lambda pairs: lora.compact(lora.stack(pairs, WEIGHTS)),
    "product_norm": lambda pairs: lora.product_norm(lora.stack(pairs, WEIGHTS)),
    "residual": lambda pairs: lora.residual(pairs, WEIGHTS, pairs[0]),
    "aggregation_error": lambda pairs: aggregation_error({"m": lora.stack(pairs, WEIGHTS)}, {"m": pairs[0]}),
}


@pytest.mark.parametrize("name", ON_FACTORS)
def test_nothing_larger_than_the_stacked_factors_is_made(name: str, pairs: list[Factors]) -> None:
    assert FACTOR < 4 * D * K  # the matrix, in float32
    with LargestTensor() as largest:
        ON_FACTORS[name](pairs)
    assert 0 < largest.bytes <= FACTOR


def test_a_matrix_would_be_seen(pairs: list[Factors]) -> None:
    with LargestTensor() as largest:
        densely(pairs, WEIGHTS, RANK)
    assert largest.bytes == 4 * D * K


def test_both_ways_give_the_same_product(pairs: list[Factors]) -> None:
    ours, _ = lora.refactor(lora.stack(pairs, WEIGHTS), RANK)
    other = densely(pairs, WEIGHTS, RANK)
    assert ours.B.shape == other.B.shape == (D, RANK)
    torch.testing.assert_close(ours.B @ ours.A, other.B @ other.A, rtol=1e-4, atol=1e-4)


def test_both_folds_give_the_same_mean() -> None:
    answers = [Answer(Payload({"x": torch.full((3,), float(n))}, {"x": Role.DENSE})) for n in (1, 4)]
    stream = [("a", 0.75, answers[0]), ("b", 0.25, answers[1])]
    for mean in (weighted_mean(stream).tensors, added_in_float32(stream)):
        assert mean["x"].tolist() == [1.75] * 3  # 3/4 * 1 + 1/4 * 4


def test_a_row_says_whether_the_goal_was_reached() -> None:
    assert row("a / b", 6.0, 2.0, ">= 3") == ["a / b", "6.00", "2.00", "3.000", ">= 3", "yes"]
    assert [row("", 1.0, 1.0, goal)[-1] for goal in (">= 1.1", "<= 1.1", "<= 0.9")] == ["NO", "yes", "NO"]


def test_the_measurement_runs() -> None:
    speed, memory = refactoring(d=40, k=30, clients=3, rank=2)
    assert min(speed[1:3]) > 0
    assert memory[2] == pytest.approx(4e-6 * 40 * 30)
