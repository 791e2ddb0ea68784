"""The events of a run, read back with TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.job import Job
from server.records import ClientRecord, Comparison, RoundRecord
from server.tensorboard import TensorBoard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "events")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_each_round_is_on_disk_when_it_has_ended(tmp_path: Path) -> None:
    first = RoundRecord(0, 4.0, {"perplexity": 54.5}, 1.5, {"a": ClientRecord(bytes_down=7, loss=3.5)})
    second = RoundRecord(
        1, None, {}, 2.5, {"a": ClientRecord(10, 3, plain_down=50, plain_up=15), "b": ClientRecord(20, failed="gone")}
    )
    with TensorBoard(tmp_path) as events:
        events.started(Job(), {"a": 3})
        events.doing("training", 0, 1)
        events.round_ended(first)
        events.round_ended(second)
        written = scalars(tmp_path)  # before the writer is closed: a killed run keeps its rounds
        events.compared(Comparison(4.0, {}, 3.0, 2.0))
    assert written["round/loss"] == [(0, 4.0)]  # a round that was not evaluated has no loss
    assert written["round/seconds"] == [(0, 1.5), (1, 2.5)]
    assert written["round/answered"] == [(0, 1.0), (1, 1.0)]
    assert written["bytes/down"] == [(0, 7.0), (1, 30.0)]
    assert written["bytes/up"] == [(0, 0.0), (1, 3.0)]
    assert written["bytes/ratio_to_plain"] == [(1, pytest.approx(65 / 33))]  # the first round did not count it
    assert written["client_loss/a"] == [(0, 3.5)]
    assert written["metrics/perplexity"] == [(0, pytest.approx(54.5))]


def test_the_newest_of_many_rounds_is_on_disk_at_once(tmp_path: Path) -> None:
    clients = {str(number): ClientRecord(loss=1.0) for number in range(300)}
    with TensorBoard(tmp_path) as events:
        events.round_ended(RoundRecord(1, clients=clients))  # more than the writer's queue lets through in passing
        size = sum(path.stat().st_size for path in (tmp_path / "events").iterdir())
    assert size == sum(path.stat().st_size for path in (tmp_path / "events").iterdir())


def test_a_client_of_any_name_is_written(tmp_path: Path) -> None:
    clients = {"<b> é/x": ClientRecord(loss=1.0), "": ClientRecord(loss=2.0)}
    with TensorBoard(tmp_path) as events:
        events.round_ended(RoundRecord(1, clients=clients))
    losses = [values for tag, values in scalars(tmp_path).items() if tag.startswith("client_loss/")]
    assert sorted(losses) == [[(1, 1.0)], [(1, 2.0)]]
