"""Payloads as bytes and back: what the receiver gets is what the sender says that it gets, and nothing else passes."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import MalformedMessage
from fedtune.payload import Payload, Role
from fedtune.wire.packed import NOTHING, USUAL, Codecs, overhead, pack, unpack
from fedtune.wire.raw import DTYPES
from fedtune.wire.reader import as_bytes
from fedtune.wire.schema import TENSORS, Line, Mode, Schema
from tests.fedtune.wire.payloads import CODECS, codecs, known_to, near, numbers, payloads, same_bits, same_payload, small

quick = settings(max_examples=150, deadline=None, derandomize=True)
EXACT = [name for name, both in CODECS.items() if both.change.exact and both.first.exact]
INT8 = codecs("int8 | entropy")


@st.composite
def messages(draw: st.DrawFn) -> tuple[Payload, Payload, Codecs]:
    """A payload, what its receiver knows, and the codecs."""
    payload = draw(payloads())
    return payload, draw(known_to(payload)), CODECS[draw(st.sampled_from(sorted(CODECS)))]


@quick
@given(messages(), st.booleans(), st.data())
def test_the_receiver_gets_what_the_sender_says(
    message: tuple[Payload, Payload, Codecs], fresh: bool, data: st.DataObject
) -> None:
    payload, known, both = message
    same = data.draw(st.sets(st.sampled_from(sorted(known.tensors)))) if known.tensors else set()
    packed = pack(payload, both, 7, known, fresh=fresh, same=same)
    total = sum(tensor.numel() for tensor in payload.tensors.values())
    assert same_payload(unpack(packed.data, both, 7, known, total), packed.received)
    forms = {name: (tensor.dtype, tensor.shape) for name, tensor in payload.tensors.items()}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in packed.received.tensors.items()} == forms


@quick
@given(messages())
def test_a_codec_that_is_exact_is(message: tuple[Payload, Payload, Codecs]) -> None:
    payload, known, _ = message
    for name in EXACT:
        assert same_payload(pack(payload, CODECS[name], 7, known).received, payload)


def test_exact_codecs_are_among_them() -> None:
    assert {"plain", "lossless"} <= set(EXACT)


@pytest.mark.parametrize("name", EXACT)
def test_signs_of_zero_and_the_smallest_numbers_survive(name: str) -> None:
    words = torch.tensor([-(2**31), 1, -(2**31) + 1, 0x7F7FFFFF, 0], dtype=torch.int32)  # -0, the least of both signs, ...
    payload = Payload({"x": words.view(torch.float32)}, {"x": Role.DENSE})
    known = Payload({"x": torch.ones(5)}, {"x": Role.DENSE})
    for base in (NOTHING, known):
        came = unpack(pack(payload, CODECS[name], 0, base).data, CODECS[name], 0, base)
        assert came.tensors["x"].view(torch.int32).tolist() == words.tolist()


def test_what_is_not_finite_travels_as_it_is() -> None:
    payload = Payload({"x": torch.tensor([1.0, torch.nan, torch.inf])}, {"x": Role.DENSE})
    came = unpack(pack(payload, INT8, 0).data, INT8, 0)
    assert same_bits(came.tensors["x"], payload.tensors["x"])


def test_what_would_be_infinite_when_it_is_decoded_travels_as_it_is() -> None:
    """65,504 is the largest float16; the scale of its block is rounded up, so int8 would make an infinite number of it."""
    payload = Payload({"x": torch.full((8,), 65504.0, dtype=torch.float16)}, {"x": Role.DENSE})
    first = codecs("int8", "int8")
    assert unpack(pack(payload, first, 0).data, first, 0).tensors["x"].tolist() == [65504.0] * 8


# what is small


def test_what_both_sides_have_costs_three_bytes() -> None:
    known = small()
    packed = pack(known, INT8, 0, known, same=list(known.tensors))
    assert len(packed.data) == 3  # version, layout, no schema
    assert same_payload(unpack(packed.data, INT8, 0, known), known)


@pytest.mark.parametrize("layout", USUAL)
def test_a_usual_message_carries_no_schema(layout: int) -> None:
    known, mode = small(), USUAL[layout]
    same = list(known.tensors) if mode is Mode.SAME else []
    packed = pack(near(known), INT8, 0, known, fresh=mode not in (Mode.SAME, Mode.CHANGE), same=same)
    assert (overhead(packed.data), packed.data[1]) == (3, layout)


def test_an_unusual_one_does() -> None:
    known = small()
    packed = pack(near(known), INT8, 0, known, same=["q.lora_A"])
    assert 3 < overhead(packed.data) < len(packed.data)


def test_scalars_that_look_alike_are_not_left_out() -> None:
    known, payload = Payload(scalars={"x": 0.0}), Payload(scalars={"x": -0.0})
    assert repr(unpack(pack(payload, INT8, 0, known).data, INT8, 0, known).scalars["x"]) == "-0.0"


def test_what_came_can_be_written_to_and_what_is_known_stays() -> None:
    known = small()
    came = unpack(pack(known, INT8, 0, known, same=list(known.tensors)).data, INT8, 0, known)
    for tensor in came.tensors.values():
        tensor.zero_()
    assert same_payload(known, small())


def test_what_was_sent_can_be_written_to_and_what_is_believed_to_be_there_stays() -> None:
    payload = small()
    for both in (codecs("fp32 | entropy"), INT8):
        believed = pack(payload, both, 0, small(1)).received
        before = {name: tensor.clone() for name, tensor in believed.tensors.items()}
        for tensor in payload.tensors.values():
            tensor += 1
        assert all(torch.equal(tensor, before[name]) for name, tensor in believed.tensors.items())


# what is damaged


@pytest.mark.parametrize("name", CODECS)
def test_a_message_that_is_cut_short_is_refused(name: str) -> None:
    known = small()
    for base in (known, NOTHING):
        data = pack(near(known), CODECS[name], 0, base).data
        for length in {*range(min(len(data), 40)), *range(40, len(data), 1 + len(data) // 40)}:
            with pytest.raises(MalformedMessage):
                unpack(data[:length], CODECS[name], 0, base, 1000)
        with pytest.raises(MalformedMessage, match="came behind the end"):
            unpack(data + b"\0", CODECS[name], 0, base, 1000)


@quick
@given(st.sampled_from(sorted(CODECS)), st.booleans(), st.data())
def test_a_flipped_bit_is_refused_or_gives_tensors_of_the_declared_form(name: str, known: bool, data: st.DataObject) -> None:
    base = small() if known else NOTHING
    whole = pack(near(small()), CODECS[name], 0, base).data
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    try:
        came = unpack(bytes(flipped), CODECS[name], 0, base, 1000)
    except MalformedMessage:
        return
    if bit // 8 >= overhead(whole):
        assert {name: tensor.shape for name, tensor in came.tensors.items()} == {n: t.shape for n, t in small().tensors.items()}
    assert sum(tensor.numel() for tensor in came.tensors.values()) <= 1000
    assert all(tensor.dtype in DTYPES.values() for tensor in came.tensors.values())


@quick
@given(st.sampled_from(sorted(CODECS)), st.binary(max_size=60), st.binary(max_size=20))
def test_bytes_from_anywhere_are_refused_or_a_payload(name: str, body: bytes, about: bytes) -> None:
    for data in (body, bytes([1, len(body) % 4]) + body, b"\x01\x00" + as_bytes(len(about)) + about + body):
        try:
            unpack(data, CODECS[name], 0, small(), 1000)
        except MalformedMessage:
            continue


# what is hostile: messages made by hand


def message(*lines: Line, body: bytes = b"", **scalars: float) -> bytes:
    about = Schema(lines, scalars).as_bytes()
    return b"\x01\x00" + as_bytes(len(about)) + about + body


def line(
    shape: tuple[int, ...] = (4,), mode: Mode = Mode.FIRST, name: str = "x", dtype: str = "float32", role: Role = Role.DENSE
) -> Line:
    return Line(name, role, dtype, shape, mode)


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing at all": (lambda: b"", "ends 2 bytes too early"),
    "another version": (lambda: b"\x02\x00\x00", "packed in version 2 came, wanted 1"),
    "an unknown layout": (lambda: b"\x01\x09\x00", "layout 9"),
    "a schema where none belongs": (lambda: b"\x01\x01\x01x", "layout 1 with a schema of 1 bytes"),
    "a schema of 2^50 bytes": (lambda: b"\x01\x00" + as_bytes(2**50), "too early"),
    "a number without an end": (lambda: b"\x01\x00" + b"\xff" * 20, "more than 8 bytes"),
    "2^60 numbers": (lambda: message(line((2**30, 2**30), Mode.RAW)), "schema cannot be read"),
    "2^40 numbers": (lambda: message(line((2**20, 2**20))), "1099511627776 numbers came, wanted at most 1000"),
    "2^40 numbers as they are": (lambda: message(line((2**40,), Mode.RAW, dtype="float64")), "wanted at most 1000"),
    "too many in all": (lambda: message(line((600,)), line((600,), name="y")), "1200 numbers came"),
    "as they are, and not there": (lambda: message(line((999,), Mode.RAW)), "too early"),
    "sizes that overflow beside a 0": (lambda: message(line((0, 2**39, 2**39), Mode.RAW)), "schema cannot be read"),
    "a name twice": (lambda: message(line(), line((3,))), "names a tensor twice"),
    "a difference to nothing": (lambda: message(line(mode=Mode.CHANGE)), "'x' came as a difference to what is not known"),
    "what is there, and is not": (lambda: message(line(mode=Mode.SAME)), "'x' came as a difference to what is not known"),
    "a difference of another shape": (lambda: message(line((5, 5), Mode.CHANGE, "q.lora_A", role=Role.A)), "not known"),
    "a difference of another role": (lambda: message(line((4, 16), Mode.CHANGE, "q.lora_A", role=Role.B)), "not known"),
    "the same in another role": (lambda: message(line((4, 16), Mode.SAME, "q.lora_A", role=Role.B)), "not known"),
    "the same in another type": (lambda: message(line((4, 16), Mode.SAME, "q.lora_A", "float16", Role.A)), "not known"),
    "a difference of whole numbers": (lambda: message(line((5,), Mode.CHANGE, "norms", "int64", Role.VECTOR)), "not known"),
    "whole numbers by a codec": (lambda: message(line(dtype="int64")), "came through a codec"),
    "a vector by a codec": (lambda: message(line(role=Role.VECTOR)), "came through a codec"),
    "nothing by a codec": (lambda: message(line((0, 3))), "came through a codec"),
    "no streams": (lambda: message(line()), "too early"),
    "a stream of 2^50 bytes": (lambda: message(line(), body=as_bytes(2**50)), "too early"),
    "too many tensors": (lambda: message(*(line((), Mode.RAW, f"{i}") for i in range(5 * TENSORS))), "schema cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_messages_are_refused_before_they_cost_anything(what: str) -> None:
    make, reason = HOSTILE[what]
    data, known = make(), small()
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(MalformedMessage, match=reason) as refusal:
        unpack(data, INT8, 0, known, 1000)
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1
    assert peak < 2 * 2**20  # a schema's own text can have 512 bytes for each of a few thousand tensors
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("name", CODECS)
def test_shapes_from_hell_cost_nothing_with_any_codec(name: str) -> None:
    for shape in ((2**39,), (2**20, 2**20), (2,) * 15, (2**36, *(1,) * 14), (1, 2**40)):
        began = time.process_time()
        with pytest.raises(MalformedMessage):
            unpack(message(line(shape), body=bytes(50)), CODECS[name], 0, most=30000)
        assert time.process_time() - began < 1


@pytest.mark.parametrize("name", ["lossless", "balanced", "int8", "fp16 | entropy"])
def test_decoding_takes_memory_for_what_is_declared_and_no_more_than_twice_that_beside(name: str) -> None:
    """Of one tensor of n numbers: its symbols, its numbers, and its numbers with what is known added. numpy's memory is traced,
    torch's tensors are made of it."""
    n, both = 2**20, CODECS[name]
    known = Payload({"x": numbers((n,), torch.float32, 0, "normal")}, {"x": Role.DENSE})
    data = pack(near(known), both, 0, known).data
    unpack(data, both, 0, known)  # tables that are made once
    tracemalloc.start()
    unpack(data, both, 0, known, n)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 3 * 4 * n + len(data) + 2**20


# error feedback


def test_what_was_sent_and_what_waits_is_what_was_to_be_sent() -> None:
    """sum of (received - known) + e_T = sum of updates, for each number up to the float32 rounding of T sums."""
    for name in ("balanced", "tiny", "int2 | entropy", "ternary | entropy", "uniform(1.0, true) | entropy"):
        errors: dict[str, torch.Tensor] = {}
        known = Payload({"x": torch.zeros(40, 8)}, {"x": Role.B})
        sent, meant = torch.zeros(40, 8, dtype=torch.float64), torch.zeros(40, 8, dtype=torch.float64)
        for round in range(20):
            update = near(known, seed=round)
            received = pack(update, CODECS[name], round, known, errors=errors).received
            sent += received.tensors["x"].double() - known.tensors["x"].double()
            meant += update.tensors["x"].double() - known.tensors["x"].double()
            known = received
        assert torch.allclose(sent + errors["x"], meant, rtol=0, atol=20 * 2.0**-24)
        assert not torch.allclose(sent, meant, rtol=0, atol=1e-4)  # without the errors it is not


def test_the_error_counts_what_the_tensors_own_type_rounds_away() -> None:
    """bfloat16 keeps 8 bits: at 1 + 1/3 it rounds by up to 2^-8, far above what int8 loses of a difference of 1/3."""
    known = Payload({"x": torch.ones(64, dtype=torch.bfloat16)}, {"x": Role.B})
    update = Payload({"x": torch.full((64,), 1.34, dtype=torch.bfloat16)}, {"x": Role.B})
    errors = {"x": torch.full((64,), 0.001)}
    received = pack(update, INT8, 0, known, errors=errors).received
    lost = update.tensors["x"].float() + 0.001 - received.tensors["x"].float()
    assert torch.allclose(errors["x"], lost, atol=2.0**-24)


@pytest.mark.parametrize(
    "error",
    [torch.ones(3), torch.ones(5, dtype=torch.int32), torch.full((5,), torch.nan), torch.full((5,), torch.inf)],
    ids=["another shape", "whole numbers", "no numbers", "infinite"],
)
def test_an_error_that_does_not_fit_is_dropped(error: torch.Tensor) -> None:
    known, payload = (
        {name: Payload({"x": x}, {"x": Role.B}) for name, x in (("k", torch.zeros(5)), ("p", torch.ones(5)))}
    ).values()
    errors = {"x": error}
    packed = pack(payload, codecs("int8(8, nearest)"), 0, known, errors=errors)
    assert torch.allclose(packed.received.tensors["x"], torch.ones(5), atol=0.01)
    assert errors["x"].abs().max() < 0.01


def test_an_error_is_not_added_twice_where_a_tensor_travels_whole_in_between() -> None:
    payload = Payload({"x": torch.ones(5)}, {"x": Role.B})
    errors = {"x": torch.full((5,), 0.5)}
    received = pack(payload, codecs("int8", "int8"), 0, NOTHING, errors=errors).received
    assert errors == {}
    assert torch.allclose(received.tensors["x"], torch.ones(5), atol=0.01)


def test_a_codec_that_is_exact_leaves_no_error() -> None:
    errors: dict[str, torch.Tensor] = {}
    pack(near(small()), codecs("fp32 | entropy"), 0, small(), errors=errors)
    assert errors == {}


def test_the_same_input_gives_the_same_bytes() -> None:
    for both in CODECS.values():
        assert pack(near(small()), both, 3, small()).data == pack(near(small()), both, 3, small()).data


def test_lengths_take_as_few_bytes_as_they_need() -> None:
    assert [len(as_bytes(n)) for n in (0, 127, 128, 2**14 - 1, 2**14, 2**32, 2**56 - 1)] == [1, 1, 2, 2, 3, 5, 8]


def test_many_small_tensors_decode_within_a_second() -> None:
    """As many as a receiver who knows nothing takes."""
    payload = Payload({f"{i}": torch.ones(1) for i in range(TENSORS)}, {f"{i}": Role.DENSE for i in range(TENSORS)})
    data = pack(payload, INT8, 0).data
    began = time.process_time()
    assert len(unpack(data, INT8, 0).tensors) == TENSORS
    assert time.process_time() - began < 1
