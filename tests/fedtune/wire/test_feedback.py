"""Error feedback in a client's memory: when an error is kept, when it fades, when it is dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedtune.memory import Memory, Part
from fedtune.wire.feedback import ERROR, LAST, Feedback


def header(round: int, step: str = "0", run: str = "tiny") -> dict[str, Any]:
    return {"round": round, "ask": f"{round}.{step}", "run": run, "client": "ann"}


def after(memory: Memory, next: dict[str, Any], kind: str = "train", decay: float = 0.5) -> dict[str, float]:
    """The errors that an answer with this header finds."""
    return {name: error.item() for name, error in Feedback(memory, kind, next, decay).items()}


@pytest.fixture
def memory() -> Memory:
    """After the answer of round 3, which left an error of 8."""
    memory = Memory()
    Feedback(memory, "train", header(3), 0.5)["x"] = torch.tensor(8.0)
    return memory


def test_in_the_next_round_it_is_whole(memory: Memory) -> None:
    assert after(memory, header(4)) == {"x": 8.0}


def test_each_round_that_is_missed_lets_it_fade(memory: Memory) -> None:
    assert after(memory, header(6)) == {"x": 8.0 * 0.5**2}  # rounds 4 and 5
    assert after(memory, header(7)) == {"x": 8.0 * 0.5**2}  # and no further


def test_without_decay_it_stays_and_with_all_of_it_it_goes(memory: Memory) -> None:
    assert after(memory, header(9), decay=1.0) == {"x": 8.0}
    assert after(memory, header(20), decay=0.0) == {"x": 0.0}


def test_another_step_of_the_same_round_finds_it(memory: Memory) -> None:
    assert after(memory, header(3, step="1")) == {"x": 8.0}


@pytest.mark.parametrize(
    "another",
    [header(2), header(1), header(4, run="another"), header(3)],
    ids=["rounds go back", "from the first", "another name", "the same ask again"],
)
def test_another_run_begins_with_none(memory: Memory, another: dict[str, Any]) -> None:
    assert after(memory, another) == {}
    assert not [name for name in memory if name.startswith(ERROR)]


def test_each_kind_of_ask_has_its_own(memory: Memory) -> None:
    assert after(memory, header(4), kind="probe") == {}
    assert after(memory, header(4), kind="tra") == {}
    assert after(memory, header(4)) == {"x": 8.0}


def test_a_kind_whose_name_begins_alike_is_another() -> None:
    memory = Memory()
    Feedback(memory, "train.x", header(1), 1.0)["y"] = torch.ones(())
    assert len(Feedback(memory, "train", header(1), 1.0)) == 0


@pytest.mark.parametrize(
    "damaged",
    [
        torch.ones(3),
        torch.tensor(3),
        torch.ones(0),
        torch.tensor(list(b"{}"), dtype=torch.uint8),
        torch.ones(2, dtype=torch.bfloat16),
    ],
    ids=["numbers", "a number", "nothing", "no round", "bfloat16"],
)
def test_where_the_last_answer_is_damaged_no_error_is_believed(memory: Memory, damaged: torch.Tensor) -> None:
    memory[f"{LAST}train"] = damaged
    assert after(memory, header(4)) == {}
    Feedback(memory, "train", header(5), 0.5)["x"] = torch.tensor(2.0)
    assert after(memory, header(6)) == {"x": 2.0}


def test_it_survives_its_files(memory: Memory) -> None:
    alike, own = (Part.read(part.name, part.data()) if part.name else part for part in memory.parts())
    assert after(Memory.of(alike, own), header(4)) == {"x": 8.0}


def test_it_is_a_mapping_like_any_other(memory: Memory) -> None:
    errors = Feedback(memory, "train", header(4), 0.5)
    assert list(errors) == ["x"]
    assert errors.pop("x").item() == 8.0
    assert (errors.pop("x", None), len(errors)) == (None, 0)
