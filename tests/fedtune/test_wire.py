"""The codec: bit-exact there and back, and bytes that are no message of ours are refused before a tensor is made."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.envelope import Envelope, WireTensor
from fedtune.errors import ClientFailed, MalformedMessage
from fedtune.payload import Payload, Role
from fedtune.strategy import Answer, Ask
from fedtune.wire import DTYPES, RAW, decoded, encoded, pack_answer, pack_ask, pack_failure, unpack_answer, unpack_ask

quick = settings(max_examples=50, deadline=None, derandomize=True)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any dtype and shape, of any bits: NaN with payloads, infinities, subnormals."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * DTYPES[dtype].itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    return torch.frombuffer(bytearray(data or bytes(8)), dtype=DTYPES[dtype])[: math.prod(shape)].reshape(shape)


def same_bits(one: Tensor, other: Tensor) -> bool:
    def data(tensor: Tensor) -> bytes:
        return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return (one.dtype, one.shape, data(one)) == (other.dtype, other.shape, data(other))


@quick
@given(tensors())
def test_every_bit_of_every_dtype_survives(tensor: Tensor) -> None:
    assert same_bits(decoded(encoded("x", tensor)), tensor)


def test_bfloat16_goes_as_two_bytes() -> None:
    wire = encoded("x", torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    assert wire == WireTensor("x", "bfloat16", (2,), RAW, bytes.fromhex("803f00c0"))  # 0x3f80, 0xc000, little endian


def test_views_are_sent_as_they_look() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    assert torch.equal(decoded(encoded("x", tensor)), tensor)
    assert torch.equal(decoded(encoded("x", tensor[1:, :1].requires_grad_())), tensor[1:, :1])


def test_what_arrives_can_be_written_to() -> None:
    decoded(encoded("x", torch.zeros(2))).add_(1.0)


GOOD = encoded("x", torch.ones(2, 3))
WRONG = {
    "a byte too few": replace(GOOD, data=GOOD.data[:-1]),
    "a byte too many": replace(GOOD, data=GOOD.data + b"\0"),
    "another shape": replace(GOOD, shape=(3, 3)),
    "another dtype of other size": replace(GOOD, dtype="float64"),
    "unknown dtype": replace(GOOD, dtype="complex64"),
    "dtype that is no text": replace(GOOD, dtype=["float32"]),  # type: ignore[arg-type]
    "unknown codec": replace(GOOD, stype="numpy.ndarray"),
    "negative sizes": replace(GOOD, shape=(-2, -3)),
    "sizes that overflow": replace(GOOD, shape=(2**70, 0), data=b""),
    "a product that overflows": replace(GOOD, shape=(0, 2**62, 8), data=b""),
    "sizes that are no integers": replace(GOOD, shape=(2.0, 3.0)),  # type: ignore[arg-type]
    "sizes that are no numbers": replace(GOOD, shape=("2", "3")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("wire", WRONG.values(), ids=WRONG)
def test_a_tensor_that_is_not_what_it_says_is_refused(wire: WireTensor) -> None:
    with pytest.raises(MalformedMessage, match="'x'"):
        decoded(wire)


def test_the_refusal_says_what_came_and_what_was_wanted() -> None:
    with pytest.raises(MalformedMessage, match=r"'x' of shape \(3, 3\) needs 36 bytes, 24 came"):
        decoded(WRONG["another shape"])
    with pytest.raises(MalformedMessage, match=r"fedtune.raw/complex64, wanted fedtune.raw of float32, .*bfloat16"):
        decoded(WRONG["unknown dtype"])


# asks and answers

floats = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(max_size=5)
payloads = st.dictionaries(names, st.tuples(tensors(), st.sampled_from(Role)), max_size=3).flatmap(
    lambda parts: st.builds(
        Payload,
        st.just({name: tensor for name, (tensor, _) in parts.items()}),
        st.just({name: role for name, (_, role) in parts.items()}),
        st.dictionaries(names, floats, max_size=3),
    )
)


def carried(envelope: Envelope) -> Envelope:
    return Envelope(json.loads(envelope.header_json()), envelope.tensors)


def same_payload(one: Payload, other: Payload) -> bool:
    bits = all(same_bits(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    return bits and list(one.tensors) == list(other.tensors) and one.roles == other.roles and one.scalars == other.scalars


@quick
@given(payloads, floats, st.dictionaries(names, floats, max_size=3))
def test_answers_there_and_back(payload: Payload, weight: float, metrics: dict[str, float]) -> None:
    answer = unpack_answer(carried(pack_answer(Answer(payload, weight, metrics), {"ask": "1.0"})))
    assert same_payload(answer.payload, payload)
    assert (answer.weight, answer.metrics) == (weight, metrics)


@quick
@given(payloads, payloads, names)
def test_asks_there_and_back_each_client_its_own(common: Payload, own: Payload, kind: str) -> None:
    ask = Ask(kind, common, per_client={"ann": own})
    for client, wanted in (("ann", own), ("bob", common)):
        got = unpack_ask(carried(pack_ask(ask, client, {"round": 3})))
        assert got.kind == kind
        assert same_payload(got.payload, wanted)


def test_the_header_of_the_caller_is_kept() -> None:
    header = pack_ask(Ask("train"), "ann", {"run": "r", "round": 3, "base": "b"}).header
    assert {"run": "r", "round": 3, "base": "b", "kind": "train", "version": 1}.items() <= header.items()


def test_a_failure_brings_its_reason() -> None:
    with pytest.raises(ClientFailed, match=r"^out of memory$"):
        unpack_answer(carried(pack_failure("out of memory", {"client": "ann"})))


HEADER: dict[str, Any] = dict(pack_answer(Answer(), {}).header)
FOREIGN: dict[str, dict[str, Any]] = {
    "another version": {**HEADER, "version": 2},
    "no version": {key: value for key, value in HEADER.items() if key != "version"},
    **{f"no {key}": {k: v for k, v in HEADER.items() if k != key} for key in ("roles", "scalars", "weight", "metrics")},
    "an unknown role": {**HEADER, "roles": {"x": "gradient"}},
    "a role for a tensor that did not come": {**HEADER, "roles": {"y": "dense"}},
    "roles that are a list": {**HEADER, "roles": []},
    "a scalar that is no number": {**HEADER, "scalars": {"loss": None}},
    "a scalar too large for a float": {**HEADER, "scalars": {"loss": 10**400}},
    "a weight that is no number": {**HEADER, "weight": "heavy"},
    "a weight too large for a float": {**HEADER, "weight": 10**400},
    "metrics too large for a float": {**HEADER, "metrics": {"loss": 10**400}},
    "metrics that are a number": {**HEADER, "metrics": 3},
}


@pytest.mark.parametrize("header", FOREIGN.values(), ids=FOREIGN)
def test_a_header_that_is_not_ours_is_refused(header: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage):
        unpack_answer(Envelope(header))


def test_another_version_says_what_to_do() -> None:
    with pytest.raises(MalformedMessage, match="wire version 2 came, wanted 1: install the same fedtune on both sides"):
        unpack_ask(Envelope(FOREIGN["another version"]))


def test_a_tensor_without_a_role_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="a role for each tensor"):
        unpack_answer(Envelope(HEADER, (GOOD,)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@quick
@given(st.fixed_dictionaries(dict.fromkeys(("roles", "scalars", "weight", "metrics"), json_values)))
def test_whatever_the_header_says_the_error_is_ours(header: dict[str, Any]) -> None:
    try:
        unpack_answer(Envelope({**header, "version": 1}))
    except MalformedMessage as error:
        assert "came" in str(error)  # noqa: PT017
