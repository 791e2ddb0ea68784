"""Envelopes as Flower records, and records that are none of ours."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedtune.envelope import LONGEST, Envelope
from fedtune.errors import MalformedMessage
from fedtune.messages import HEADER, TENSORS, from_record, to_record
from fedtune.wire import decoded, encoded


def test_there_and_back() -> None:
    tensors = (
        encoded("b", torch.tensor([[1.0, -0.0, float("nan")]], dtype=torch.bfloat16)),
        encoded("a", torch.zeros(0, 3)),
        encoded("scalar", torch.tensor(3)),
    )
    envelope = Envelope({"ask": "1.0", "round": 3, "weight": 0.1, "nested": {"x": [1, None]}}, tensors)
    assert from_record(to_record(envelope)) == envelope
    assert decoded(from_record(to_record(envelope)).tensors[1]).shape == (0, 3)


def test_the_order_of_tensors_stays() -> None:
    envelope = Envelope({}, tuple(encoded(name, torch.ones(1)) for name in "zebra"))
    assert [tensor.name for tensor in from_record(to_record(envelope)).tensors] == list("zebra")


def record(text: str) -> RecordDict:
    return RecordDict({HEADER: ConfigRecord({"json": text}), TENSORS: ArrayRecord({})})


FOREIGN = {
    "an empty record": RecordDict({}),
    "Flower's own weights": RecordDict({"arrays": ArrayRecord({}), "config": ConfigRecord({"lr": 0.1})}),
    "a header beyond all bounds": record("{" + " " * LONGEST + "}"),
    "a header of another kind": RecordDict({HEADER: MetricRecord({"json": 1.0}), TENSORS: ArrayRecord({})}),
    "a header without our key": RecordDict({HEADER: ConfigRecord({"xml": ""}), TENSORS: ArrayRecord({})}),
    "no tensors": RecordDict({HEADER: ConfigRecord({"json": "{}"})}),
    "no JSON": record("{"),
    "a list": record("[]"),
    "a number": record("3"),
    "brackets without end": record("[" * 100_000),
    "an endless number": record("1" * 10_000),
}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_a_record_that_is_none_of_ours_is_refused(foreign: RecordDict) -> None:
    with pytest.raises(MalformedMessage, match="header"):
        from_record(foreign)
