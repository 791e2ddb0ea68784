"""Streams of several tensors as one: each part keeps its own range."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.errors import MalformedMessage
from fedtune.payload import Role
from fedtune.wire.joined import Joined, joined
from fedtune.wire.schema import Line, Mode
from fedtune.wire.stage import Form, Kind
from tests.fedtune.wire.payloads import codecs

ROW = Joined("gaps", True, [("small", Form((3,), Kind.GAPS, 0, 9)), ("large", Form((2,), Kind.GAPS, 0, 1000))])


def test_each_part_comes_back_in_its_smallest_type() -> None:
    data = ROW.written({"small": {"gaps": np.array([9, 0, 4])}, "large": {"gaps": np.array([1000, 1])}})
    came = dict(ROW.read(data))
    assert {name: (values.tolist(), values.dtype) for name, values in came.items()} == {
        "small": ([9, 0, 4], np.uint8),
        "large": ([1000, 1], np.uint16),
    }


def test_a_number_in_the_range_of_another_tensor_is_refused() -> None:
    """300 lies in the range of the joined stream, and would be 44 in the small tensor's own type."""
    with pytest.raises(MalformedMessage, match="not from 0 to 9"):
        dict(ROW.read(ROW.written({"small": {"gaps": np.array([9, 300, 4])}, "large": {"gaps": np.array([1000, 1])}})))


def test_which_streams_there_are_follows_from_the_schema() -> None:
    """topk(0.25) of 8 and 12 numbers keeps 2 and 3; one bfloat16 scale for each block of 256."""
    lines = [Line(name, Role.A, "float32", shape, Mode.CHANGE) for name, shape in (("a", (2, 4)), ("b", (12,)))]
    lines += [Line("c", Role.A, "float32", (300,), Mode.FIRST), Line("d", Role.A, "float32", (5,), Mode.RAW)]
    rows = joined(lines, codecs("topk(0.25) | int8 | entropy", "int8"))
    assert [(row.name, row.entropy, [(name, form.count) for name, form in row.parts]) for row in rows] == [
        ("0.gaps", True, [("a", 2), ("b", 3)]),
        ("1.scales", True, [("a", 1), ("b", 1)]),
        ("carrier", True, [("a", 2), ("b", 3)]),
        ("0.scales", False, [("c", 2)]),
        ("carrier", False, [("c", 300)]),
    ]
