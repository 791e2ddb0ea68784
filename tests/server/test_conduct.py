"""Who sits out after refused answers, for how long, and what it takes to be asked again."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from fedtune.errors import RoundFailed
from fedtune.job import Job
from fedtune.job_sections import Gate
from fedtune.strategy import ClientInfo
from server.conduct import Conduct, require_enough
from server.coordinator import draw_cohort

GATE = Gate(refusals=3, sits_out=5)
GOOD, BAD, NOTHING = (set(), {"ann"}), ({"ann"}, set()), (set(), set())  # (refused, accepted)


def through(*rounds: tuple[set[str], set[str]], gate: Gate = GATE) -> list[dict[str, int]]:
    """Who sits out each round, and the one after the last; nothing comes of a client that is not asked."""
    conduct, seen = Conduct(), []
    for number, (refused, accepted) in enumerate(rounds, 1):
        seen.append(out := conduct.out(number, gate))
        conduct = conduct.after(number, refused - out.keys(), accepted - out.keys(), gate)
    return [*seen, conduct.out(len(rounds) + 1, gate)]


def test_three_refused_rounds_in_a_row_cost_five_and_then_each_one_more() -> None:
    """Refused in 1, 2, 3; out from 4 to 8; refused in 9; out from 10 to 14."""
    seen = through(*[BAD] * 14)
    assert [number for number, out in enumerate(seen, 1) if out] == [*range(4, 9), *range(10, 15)]
    assert seen[3] == {"ann": 8}


def test_an_accepted_answer_wipes_the_slate_also_after_sitting_out() -> None:
    assert not any(through(BAD, BAD, GOOD, BAD, BAD, GOOD, BAD, BAD))
    seen = through(*[BAD] * 8, GOOD, BAD, BAD)  # out from 4 to 8, accepted in 9
    assert [number for number, out in enumerate(seen, 1) if out] == [*range(4, 9)]


def test_a_round_in_which_nothing_came_is_neither() -> None:
    assert through(BAD, BAD, NOTHING, BAD)[-1] == {"ann": 9}  # 4 + 5


def test_who_is_refused_anything_in_a_round_is_refused_in_it() -> None:
    """An honest answer to the one ask of a round does not make up for the other."""
    both = ({"ann"}, {"ann"})
    assert through(both, both, both)[-1] == {"ann": 8}


def test_nobody_sits_out_where_the_job_says_so_also_of_those_who_did() -> None:
    none = Gate(refusals=1, sits_out=0)
    assert not any(through(BAD, BAD, BAD, gate=none))
    assert Conduct({"ann": 3}, {"ann": 8}).out(5, none) == {}


def test_it_survives_a_checkpoint() -> None:
    conduct = Conduct().after(1, {"ann"}, {"bob"}, Gate(refusals=1, sits_out=2))
    assert Conduct.from_json(json.loads(json.dumps(conduct.as_json()))) == conduct == Conduct({"ann": 1}, {"ann": 3})


def clients(count: int) -> dict[str, ClientInfo]:
    return {f"c{number}": ClientInfo(f"c{number}", 1, 1) for number in range(count)}


def test_the_cohort_is_drawn_from_the_others(make_job: Callable[..., Job]) -> None:
    """Those who were drawn without them are drawn again, and the next in the same order take their places."""
    job, everybody = make_job("rounds.clients=3"), clients(6)
    before = [client.id for client in draw_cohort(job, everybody, 4)]
    after = [client.id for client in draw_cohort(job, everybody, 4, {before[0]: 9})]
    assert len(after) == 3
    assert set(before[1:]) < set(after)
    assert before[0] not in after


def test_too_few_are_said_to_be_too_few_and_why(make_job: Callable[..., Job]) -> None:
    """Half of 4 must answer, and 3 sit out."""
    job, out = make_job("rounds.quorum=0.5"), {"c0": 7, "c1": 7, "c2": 8}
    require_enough(job, clients(4), {"c0": 7, "c1": 7}, 5)
    reason = r"round 5: 1 of 4 clients may take part, wanted 2 \(rounds.quorum\); c0 sits out until round 7; .*gate.sits_out=0"
    with pytest.raises(RoundFailed, match=reason):
        require_enough(job, clients(4), out, 5)
