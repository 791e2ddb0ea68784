"""What methods share: the exact mean, the error of an aggregation, and the mean over those who own a direction."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune import aggregation
from fedtune.adapter import Adapter, Factors
from fedtune.aggregation import OwnerMean, aggregation_error, exact_mean, measured_error, split
from fedtune.folding import FoldedAnswers
from fedtune.payload import payload_of
from fedtune.strategy import Answer, Fold
from fedtune.testing import product


def pair(rank: int, seed: int, scale: float = 1.0, d: int = 5, k: int = 4) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, k, generator=draw), torch.randn(d, rank, generator=draw), scale)


def answers(pairs: dict[str, tuple[float, Factors]]) -> FoldedAnswers:
    given = {id: Answer(payload_of(Adapter({"m": one})), weight) for id, (weight, one) in pairs.items()}
    return FoldedAnswers({id: weight for id, (weight, _) in pairs.items()}, Fold.EACH, given.__getitem__)


def test_the_exact_mean_weighs_each_product_with_its_own_scale() -> None:
    """Weights 1 and 3: a quarter of one product and three of the other."""
    one, other = pair(2, 1, scale=0.5), pair(3, 2, scale=4.0)
    [(path, mean)] = exact_mean(answers({"a": (1, one), "b": (3, other)})).items()
    assert path == "m"
    torch.testing.assert_close(product(mean), 0.25 * product(one) + 0.75 * product(other), rtol=1e-12, atol=1e-12)


def test_the_exact_mean_of_many_keeps_no_more_directions_than_the_matrix_has() -> None:
    pairs = {f"c{i:02d}": (1.0, pair(3, i)) for i in range(20)}
    mean = exact_mean(answers(pairs))["m"]
    assert mean.rank <= 4
    wanted = sum((product(one) for _, one in pairs.values()), torch.zeros(())) / 20
    torch.testing.assert_close(product(mean), wanted, rtol=1e-10, atol=1e-12)


def test_the_error_is_relative_to_the_exact_product_per_module_and_together() -> None:
    """Modules of norm 3 and 4, that together have norm 5; what is published lacks 0.6 of the first and nothing of the other."""
    unit = Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]]), 1.0)
    exact = {"one": Factors(unit.A, 3 * unit.B, 1.0), "two": Factors(unit.A, unit.B, 4.0)}
    published = {"one": Factors(unit.A, unit.B, 2.4), "two": Factors(2 * unit.A, unit.B, 2.0)}
    assert aggregation_error(exact, published) == pytest.approx(
        {"aggregation_error.one": 0.6 / 3, "aggregation_error.two": 0, "aggregation_error": 0.6 / 5}, abs=1e-7
    )


def test_where_nothing_was_learnt_the_error_is_what_was_published_instead() -> None:
    nothing, something = Factors(torch.zeros(1, 2), torch.zeros(2, 1), 1.0), Factors(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    assert aggregation_error({"m": nothing}, {"m": nothing})["aggregation_error"] == 0
    assert aggregation_error({"m": nothing}, {"m": something})["aggregation_error"] == pytest.approx(2)


def test_what_is_too_large_to_stack_or_not_to_be_seen_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients, (5 + 4) x 2 numbers each: 36 may be stacked, 35 may not."""
    one = pair(2, 1)
    given, published = answers({"a": (1, one), "b": (1, one)}), Adapter({"m": one})
    monkeypatch.setattr(aggregation, "MOST", 36)
    assert measured_error(given, published)["aggregation_error"] == pytest.approx(0, abs=1e-7)
    monkeypatch.setattr(aggregation, "MOST", 35)
    assert measured_error(given, published) == {}
    monkeypatch.undo()
    assert measured_error(FoldedAnswers({"a": 1.0}, Fold.SUM, lambda _: Answer()), published) == {}


def test_the_errors_of_modules_are_told_from_other_metrics() -> None:
    layers, others = split({"aggregation_error": 0.5, "aggregation_error.a.b": 0.25, "loss": 3.0})
    assert layers == {"a.b": 0.25}
    assert others == {"aggregation_error": 0.5, "loss": 3.0}


@pytest.mark.parametrize(("rows", "own", "start"), [("kept", 0.75, 0.25), ("padded", 0.75, 0.0), ("owned", 1.0, 0.0)])
def test_what_counts_for_those_who_lack_a_row(rows: Literal["kept", "padded", "owned"], own: float, start: float) -> None:
    """Weights 1/4 and 3/4, ranks 1 and 2: row 0 is a/4 + 3b/4 for all; row 1 is b's beside what the other counts with, the row
    that both were given, zeros, or nothing; row 2 is nobody's and stays."""
    a, b, given = pair(1, 1), pair(2, 2), pair(3, 3)
    mean = OwnerMean(given, rows)
    mean.add(a, 0.25)
    mean.add(b, 0.75)
    got = mean.pair()
    torch.testing.assert_close(
        got.A, torch.stack([0.25 * a.A[0] + 0.75 * b.A[0], own * b.A[1] + start * given.A[1], given.A[2]])
    )
    columns = [0.25 * a.B[:, 0] + 0.75 * b.B[:, 0], own * b.B[:, 1] + start * given.B[:, 1], given.B[:, 2]]
    torch.testing.assert_close(got.B, torch.stack(columns, dim=1))


@pytest.mark.parametrize("rows", ["kept", "padded", "owned"])
def test_a_row_whose_owners_have_no_weight_stays(rows: Literal["kept", "padded", "owned"]) -> None:
    given = pair(2, 3)
    mean = OwnerMean(given, rows)
    mean.add(pair(1, 1), 1.0)
    mean.add(pair(2, 2), 0.0)
    got = mean.pair()
    torch.testing.assert_close(got.A[1], given.A[1])
    torch.testing.assert_close(got.B[:, 1], given.B[:, 1])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from([0.25, 1.0, 3.0]), st.sampled_from([0.5, 2.0]), st.integers(1, 4))
def test_a_single_owner_keeps_its_product_whatever_the_scales(own: float, known: float, rank: int) -> None:
    """The scale is folded in: s_i B_i A_i comes out at the scale of the result."""
    one = pair(rank, 7, scale=own)
    mean = OwnerMean(pair(rank, 8, scale=known))
    mean.add(one, 1.0)
    assert mean.pair().scale == known
    assert (product(mean.pair()) - product(one)).norm() < 1e-5 * product(one).norm()
    assert mean.pair().A.norm() / one.A.norm() == pytest.approx(math.sqrt(own / known), rel=1e-5)  # half in each factor
