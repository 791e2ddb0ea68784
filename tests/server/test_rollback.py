"""When a round must not count: what it made is not finite, or most clients lost by it. One client alone decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fedtune.adapter import Adapter, Factors
from fedtune.strategy import ServerState
from server.records import ClientRecord, RoundRecord
from server.rollback import Trouble, computed, in_a_row, last_losses, median_rise, trouble
from server.tally import Tally

THREE = ("ann", "bob", "cy")


def state(number: float = 1.0, where: str = "B") -> ServerState:
    A, B, dense, more = (torch.ones(2, 2) for _ in range(4))
    {"A": A, "B": B, "dense": dense, "more": more}[where][1, 1] = number
    tensors: dict[str, Tensor] = {"momentum": more, "rounds": torch.tensor([3])}
    return ServerState(Adapter({"q": Factors(A, B, 1.0)}, {"head": dense}), tensors)


@dataclass
class Evaluated:
    tally: Tally
    diverged: set[str] = field(default_factory=set)


def evaluated(losses: Mapping[str, float], diverged: set[str] = frozenset()) -> Evaluated:  # type: ignore[assignment]
    tally = Tally(THREE)
    tally.evaluated = {client: {"loss": loss, "tokens": 1e9} for client, loss in losses.items()}
    return Evaluated(tally, set(diverged))


def before(*notes: str, **losses: float) -> RoundRecord:
    return RoundRecord(1, clients={client: ClientRecord(loss=loss) for client, loss in losses.items()}, notes=notes)


@pytest.mark.parametrize(("where", "name"), [("A", "q.A"), ("B", "q.B"), ("dense", "head"), ("more", "momentum")])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_must_not_count(where: str, name: str, number: float) -> None:
    assert trouble(state(number, where)) == f"'{name}' is not finite any more"
    assert trouble(state()) == ""


def test_the_median_of_the_changes_counts() -> None:
    """Changes of 0.2, -0.1 and 9: their median is 0.2. With 2.2 in place of 0.2 it is 2.2, which is beyond 1."""
    past = [before(ann=1.0, bob=1.0, cy=1.0)]
    assert trouble(state(), evaluated({"ann": 1.2, "bob": 0.9, "cy": 10.0}), past, 1.0) == ""
    why = trouble(state(), evaluated({"ann": 3.2, "bob": 0.9, "cy": 10.0}), past, 1.0)
    assert why == "the held-out loss rose by 2.2 (rounds.max_rise = 1)"
    assert trouble(state(), evaluated({"ann": 3.2, "bob": 0.9, "cy": 10.0}), past, None) == ""


def test_clients_that_were_not_evaluated_before_say_nothing() -> None:
    assert median_rise({"ann": 1.0}, {"bob": 50.0}) == 0
    assert trouble(state(), evaluated({"ann": 50.0}), [], 1.0) == ""


def test_losses_are_compared_with_those_of_the_last_round_that_counts() -> None:
    good, bad, unseen = before(ann=1.0), before("rolled back: why", ann=9.0), RoundRecord(3)
    assert last_losses([good, bad, unseen]) == {"ann": 1.0}
    assert last_losses([unseen]) == {}


def test_of_two_clients_one_decides_nothing() -> None:
    """Changes of 9 and 0: the lower of the two counts."""
    assert median_rise({"ann": 1.0, "bob": 1.0}, {"ann": 10.0, "bob": 1.0}) == 0
    assert trouble(state(), evaluated({"bob": 1.0}, {"ann"}), [before(ann=1.0, bob=1.0)], 1.0) == ""


def test_more_than_half_of_those_who_look_must_see_no_number() -> None:
    past = [before(ann=1.0, bob=1.0, cy=1.0)]
    assert trouble(state(), evaluated({"ann": 1.0, "bob": 1.0}, {"cy"}), past, 1.0) == ""
    why = trouble(state(), evaluated({"ann": 1.0}, {"bob", "cy"}), past, 1.0)
    assert why == "the held-out loss of 2 of 3 clients is not finite"
    assert trouble(state(), evaluated({}, {"bob"}), past, 1.0) == "the held-out loss of 1 of 1 clients is not finite"


def test_rounds_in_a_row() -> None:
    assert [in_a_row([2, 4, 5, 6], number) for number in (1, 2, 4, 6, 7)] == [0, 1, 1, 3, 0]


@pytest.mark.parametrize("error", [ZeroDivisionError("by 0"), KeyError("G"), RuntimeError("no such shape"), ValueError("odd")])
def test_a_method_that_cannot_compute_its_round_is_trouble_of_that_round(error: Exception) -> None:
    def half() -> None:
        raise error

    with pytest.raises(Trouble, match=f"the strategy could not compute it: {type(error).__name__}"):
        computed(half)
