"""Norms of updates: what counts in one, what is beyond any limit, and who is far beyond the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedtune.errors import Refused
from fedtune.payload import Payload, Role, vectors
from fedtune.strategy import Ask, Limits
from server import norms
from server.norms import norm_of, remembered, require_norm, too_far

TRAIN = Ask("train")


def named(tensors: Mapping[str, list[float] | Tensor], role: Role) -> Payload:
    return Payload({name: torch.as_tensor(t) for name, t in tensors.items()}, dict.fromkeys(tensors, role))


def test_an_update_is_as_long_as_its_way_from_where_it_began() -> None:
    """(1, 2) -> (4, 6): the way is (3, 4). And (0, 0) -> (12, 0) beside it: |(3, 4, 12)| = 13."""
    began = named({"q.lora_A": [[1.0, 2.0]], "q.lora_B": [[0.0], [0.0]]}, Role.A)
    ended = named({"q.lora_A": [[4.0, 6.0]], "q.lora_B": [[12.0], [0.0]]}, Role.A)
    assert norm_of(ended, began, TRAIN) == 13
    assert norm_of(began, began, TRAIN) == 0


def test_a_factor_that_was_not_sent_began_as_0_and_a_whole_parameter_nobody_knows_how() -> None:
    assert norm_of(named({"q.lora_B": [3.0, 4.0]}, Role.B), Payload(), TRAIN) == 5
    assert norm_of(named({"head": [3.0, 4.0]}, Role.DENSE), Payload(), TRAIN) == 0
    assert norm_of(named({"head": [3.0, 4.0]}, Role.DENSE), named({"head": [3.0, 0.0]}, Role.DENSE), TRAIN) == 4


def test_a_factor_of_another_rank_is_held_against_the_rows_that_both_have() -> None:
    """Rows (1, 0) and (0, 1) were sent. Of rank 1, (1, 3) is 3 away; of rank 3 the third row, (4, 0), is new."""
    began = named({"q.lora_A": [[1.0, 0.0], [0.0, 1.0]]}, Role.A)
    assert norm_of(named({"q.lora_A": [[1.0, 3.0]]}, Role.A), began, TRAIN) == 3
    assert norm_of(named({"q.lora_A": [[1.0, 0.0], [0.0, 1.0], [4.0, 0.0]]}, Role.A), began, TRAIN) == 4


def test_vectors_are_steps_unless_they_only_measure() -> None:
    """Seeds are whole numbers, and scores cannot be below 0."""
    limits = {"seeds": Limits(2, 0, 99, integers=True), "pulls": Limits(2, -9, 9), "scores": Limits(2, 0, 99)}
    given = vectors({"seeds": torch.tensor([50, 60]), "pulls": torch.tensor([3.0, -4.0]), "scores": torch.tensor([70.0, 9])})
    assert norm_of(given, Payload(), Ask("train", vectors=limits)) == 5
    assert norm_of(given, vectors({"pulls": torch.tensor([3.0, -4.0])}), Ask("train", vectors=limits)) == 5  # not a difference
    assert norm_of(vectors({"own": torch.tensor([6.0, 8.0])}), Payload(), TRAIN) == 10  # nobody says what it may be


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_of_any_kind_are_added_up_alike(dtype: torch.dtype) -> None:
    assert norm_of(named({"q.lora_A": torch.full((4, 4), 0.5, dtype=dtype)}, Role.A), Payload(), TRAIN) == 2  # sqrt(16 / 4)


def test_the_largest_numbers_are_no_infinity() -> None:
    """3e38 squared is none of float32's numbers, and 1e300 squared none of float64's; 4 of each: twice as long."""
    for largest, dtype in ((3e38, torch.float32), (1e300, torch.float64)):
        update = named({"q.lora_A": torch.full((2, 2), largest, dtype=dtype)}, Role.A)
        assert norm_of(update, Payload(), TRAIN) == pytest.approx(2 * largest)
        with pytest.raises(Refused, match=r"wanted at most 1e\+18: float32 cannot hold"):
            require_norm(norm_of(update, Payload(), TRAIN))


def test_a_tensor_of_many_chunks_is_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """0, 1, ..., 10 less 1 each: 1 + 0 + 1 + 4 + ... + 81 = 286."""
    monkeypatch.setattr(norms, "CHUNK", 3)
    began, ended = named({"head": torch.ones(11)}, Role.DENSE), named({"head": torch.arange(11.0)}, Role.DENSE)
    assert norm_of(ended, began, TRAIN) == pytest.approx(math.sqrt(286), rel=1e-15)


def test_the_job_says_how_far_an_update_may_go() -> None:
    require_norm(5.0, 5.0)
    with pytest.raises(Refused, match=r"its update has a norm of 5.001, wanted at most 5 \(gate.max_norm\)$"):
        require_norm(5.001, 5.0)


def test_whoever_goes_far_beyond_the_median_is_named_with_the_reason() -> None:
    """Of 1, 2, 3, 61: the median is 2.5, and 10 times that 25."""
    far = too_far({"ann": 1.0, "bob": 61.0, "cy": 2.0, "dee": 3.0}, [], 10)
    assert far == {
        "bob": "its update has a norm of 61, wanted at most 10 times the median of 2.5 (gate.max_ratio)",
    }
    assert too_far({"ann": 1.0, "bob": 25.0, "cy": 2.0, "dee": 3.0}, [], 10) == {}
    assert too_far({"ann": 1.0, "bob": 61.0, "cy": 2.0, "dee": 3.0}, [], 0) == {}


def test_fewer_than_three_norms_say_nothing_and_former_ones_count() -> None:
    assert too_far({"ann": 1.0, "bob": 1e6}, [], 10) == {}
    assert list(too_far({"ann": 1.0, "bob": 1e6}, [1.0], 10)) == ["bob"]
    assert list(too_far({"bob": 1e6}, [1.0, 1.0], 10)) == ["bob"]


def test_who_does_not_move_counts_as_nobody() -> None:
    """Else two clients that send back what they got would have all others refused."""
    assert too_far({"ann": 0.0, "bob": 0.0, "cy": 1.0}, [], 10) == {}
    assert remembered([], {"ann": 0.0, "cy": 1.0}) == (1.0,)


def test_when_all_go_further_than_before_nobody_is_odd() -> None:
    before = [1.0] * 50
    assert too_far({"ann": 100.0, "bob": 110.0, "cy": 120.0}, before, 10) == {}
    assert list(too_far({"ann": 100.0, "bob": 110.0, "cy": 2000.0}, before, 10)) == ["cy"]


def test_the_last_norms_are_remembered_by_client() -> None:
    assert remembered([5.0], {"bob": 2.0, "ann": 1.0}) == (5.0, 1.0, 2.0)
    assert remembered(range(1, 65), {"ann": 7.0}) == (*range(2, 65), 7.0)


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=6), st.lists(st.floats(1e-9, 1e9), max_size=4), st.data())
def test_the_order_in_which_answers_come_plays_no_role(lengths: list[float], before: list[float], data: st.DataObject) -> None:
    came = {f"client {number}": length for number, length in enumerate(lengths)}
    order = data.draw(st.permutations(list(came)))
    turned = {client: came[client] for client in order}
    assert too_far(turned, before, 5) == too_far(came, before, 5)
    assert remembered(before, turned) == remembered(before, came)


def test_the_order_plays_no_role_where_somebody_is_refused() -> None:
    came = {"ann": 1.0, "bob": 1.5, "cy": 100.0, "dee": 2.0}
    assert {tuple(too_far(dict(order), [], 5)) for order in itertools.permutations(came.items())} == {("cy",)}
