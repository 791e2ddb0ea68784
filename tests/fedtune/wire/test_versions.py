"""The broadcast as a difference: whatever happens to messages and memories, a client has what the server believes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import MalformedMessage
from fedtune.memory import Memory, Part
from fedtune.payload import Payload, Role
from fedtune.wire.packed import Codecs
from fedtune.wire.schema import Line, Mode, Schema
from fedtune.wire.versions import ABOUT, KEPT, START, Outdated, Versions, kept, received, sent_to
from tests.fedtune.wire.payloads import CODECS, codecs, near, same_payload, small

quick = settings(max_examples=60, deadline=None, derandomize=True)
INT8 = codecs("int8 | entropy")
CLIENTS = ("ann", "bob", "cy")
EVENTS = (
    "answers",
    "answers",
    "is not asked",
    "is not reached",
    "answers in vain",
    "fails",
    "forgets",
    "goes back",
    "is damaged",
)
MOST = 10_000


class Side:
    """A client: its memory, and what it was at its last answer, to which a crash can lead back."""

    def __init__(self) -> None:
        self.memory, self.saved = Memory(), Memory()

    def take(self, data: bytes, since: str, ask: str, both: Codecs, start: Payload) -> Payload:
        return received(data, since, both, 0, ask, self.memory, start, MOST)


@quick
@given(
    st.lists(st.tuples(*[st.sampled_from(EVENTS)] * len(CLIENTS)), max_size=6),
    st.sampled_from(["lossless", "balanced", "tiny", "int8"]),
    st.integers(1, 3),
    st.data(),
)
def test_both_sides_stay_in_step(history: list[tuple[str, ...]], name: str, most: int, data: st.DataObject) -> None:
    both, start = CODECS[name], small()
    server, sides, state = Versions(start, most), {client: Side() for client in CLIENTS}, start
    for number, events in enumerate(history):
        state = data.draw(st.sampled_from([state, near(state, number), _smaller(state), small(number)]))
        for client, event in zip(CLIENTS, events, strict=True):
            if event != "is not asked":
                _play(server, client, sides[client], event, state, both, start, f"{number}")
        server.settle()
        for client in CLIENTS:
            held = server.of(client)
            if held.version == START:
                continue
            assert same_payload(kept(sides[client].memory, held.version, start), held.payload)


def _play(
    server: Versions, client: str, side: Side, event: str, state: Payload, both: Codecs, start: Payload, ask: str
) -> None:
    if event == "forgets":
        side.memory = Memory()
    if event == "goes back":
        side.memory = Memory(dict(side.saved))
    if event == "is damaged" and ABOUT in side.memory:
        side.memory[ABOUT] = side.memory[ABOUT][:-1]
    sent = sent_to(server.of(client), state, both, 0, ask)
    if event == "is not reached":
        return server.forget(client)
    try:
        came = side.take(sent.packed.data, sent.since, ask, both, start)
    except Outdated:
        server.forget(client)
        sent = sent_to(server.of(client), state, both, 0, ask)
        came = side.take(sent.packed.data, sent.since, ask, both, start)  # from the start on it can always be read
    assert same_payload(came, sent.packed.received)
    if event in ("fails", "answers in vain"):
        return server.forget(client)
    side.saved = Memory(dict(side.memory))
    return server.arrived(client, sent.held)


def _smaller(payload: Payload) -> Payload:
    """A tensor is gone, one has another shape, and another came."""
    tensors = {name: tensor for name, tensor in payload.tensors.items() if name != "k.lora_A"}
    tensors |= {"q.lora_A": torch.ones(2, 16), "head": torch.ones(3, dtype=torch.bfloat16)}
    return Payload(tensors, {**{name: role for name, role in payload.roles.items() if name in tensors}, "head": Role.DENSE}, {})


def test_what_is_sent_twice_costs_nothing_the_second_time() -> None:
    """As when what was published is evaluated, and then trained on."""
    start = small()
    first = sent_to(Versions(start, 1).of("ann"), near(start), INT8, 0, "1")
    again = sent_to(first.held, near(start), INT8, 0, "2")
    assert len(again.packed.data) == 3 < 0.01 * len(first.packed.data)


def test_the_start_itself_costs_nothing_and_arrives_bit_for_bit() -> None:
    start, memory = small(), Memory()
    sent = sent_to(Versions(start, 1).of("ann"), start, INT8, 0, "1")
    came = received(sent.packed.data, START, INT8, 0, "1", memory, start, MOST)
    assert len(sent.packed.data) == 3
    assert same_payload(came, start)


def test_what_was_rounded_is_not_sent_again_but_what_changed_is() -> None:
    start = small()
    state = near(start)
    first = sent_to(Versions(start, 1).of("ann"), state, INT8, 0, "1")
    only = Payload({**state.tensors, "q.lora_B": state.tensors["q.lora_B"] + 1}, state.roles, state.scalars)
    second = sent_to(first.held, only, INT8, 0, "2").packed.received
    moved = [name for name in state.tensors if not torch.equal(second.tensors[name], first.packed.received.tensors[name])]
    assert moved == ["q.lora_B"]


def test_the_oldest_versions_are_forgotten_first() -> None:
    start = small()
    versions = Versions(start, 2)
    for round, client in enumerate(CLIENTS):
        versions.arrived(client, sent_to(versions.of(client), near(start, round), INT8, 0, f"{round}").held)
        versions.settle()
    assert [versions.of(client).version == START for client in CLIENTS] == [True, False, False]


def test_clients_of_one_version_count_once() -> None:
    start = small()
    versions = Versions(start, 1)
    sent = sent_to(versions.of("ann"), near(start), INT8, 0, "1")
    for client in CLIENTS:
        versions.arrived(client, sent.held)
    versions.settle()
    assert {versions.of(client).version for client in CLIENTS} == {sent.held.version}


# a client's memory that is damaged, or of another run


def learnt() -> tuple[Payload, Memory, Payload, str]:
    """The start, a memory after one message, what it has, and its version."""
    start, memory = small(), Memory()
    sent = sent_to(Versions(start, 1).of("ann"), near(start), INT8, 0, "1")
    received(sent.packed.data, START, INT8, 0, "1", memory, start, MOST)
    return start, memory, sent.held.payload, sent.held.version


def test_a_memory_survives_its_files() -> None:
    start, memory, has, version = learnt()
    alike, own = (Part.read(part.name, part.data()) for part in memory.parts())
    assert same_payload(kept(Memory.of(alike, own), version, start), has)


def noted(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def under(version: bool, text: bytes) -> torch.Tensor:
    """Bytes where the schema should be, behind the right version or another."""
    return noted((learnt()[3] if version else "0123456789abcdef").encode() + text)


def schema(*lines: Line) -> bytes:
    return Schema(lines, {}).as_bytes()


DAMAGED: dict[str, dict[str, torch.Tensor | None]] = {
    "nothing noted": {ABOUT: None},
    "a tensor is gone": {f"{KEPT}q.lora_A": None},
    "a tensor of another shape": {f"{KEPT}q.lora_A": torch.ones(3)},
    "a tensor of another type": {f"{KEPT}q.lora_A": torch.ones(4, 16, dtype=torch.float16)},
    "no text": {ABOUT: torch.full((9,), 255, dtype=torch.uint8)},
    "empty": {ABOUT: torch.ones(0)},
    "numbers": {ABOUT: torch.tensor(3.0)},
    "bfloat16, which numpy does not know": {ABOUT: torch.ones(3, dtype=torch.bfloat16)},
    "another version": {ABOUT: under(False, schema())},
    "no schema": {ABOUT: under(True, b"")},
    "no schema, but bytes": {ABOUT: under(True, b"[]" * 20)},
    "a schema that is cut": {ABOUT: under(True, schema()[:-1])},
    "a tensor that is not there": {ABOUT: under(True, schema(Line("x", Role.A, "float32", (2, 2), Mode.SAME)))},
}


@pytest.mark.parametrize("what", DAMAGED)
def test_who_has_a_damaged_memory_wants_everything_and_is_well_again(what: str) -> None:
    start, memory, _, version = learnt()
    for name, tensor in DAMAGED[what].items():
        if tensor is None:
            del memory[name]
        else:
            memory[name] = tensor
    with pytest.raises(Outdated):
        kept(memory, version, start)
    sent = sent_to(Versions(start, 1).of("ann"), near(start, 5), INT8, 0, "9")
    assert same_payload(received(sent.packed.data, START, INT8, 0, "9", memory, start, MOST), sent.packed.received)
    assert same_payload(kept(memory, sent.held.version, start), sent.held.payload)


def test_a_message_that_is_refused_leaves_the_memory_as_it_was() -> None:
    start, memory, has, version = learnt()
    with pytest.raises(MalformedMessage):
        received(b"\x01\x00\x05hello", version, INT8, 0, "2", memory, start, MOST)
    assert same_payload(kept(memory, version, start), has)


def test_who_fails_while_it_keeps_what_came_wants_everything() -> None:
    class Full(Memory):
        def keep(self, name: str, tensor: torch.Tensor) -> None:
            raise OSError("no space left")

    start, learnt_memory, _, version = learnt()
    memory = Full(dict(learnt_memory))
    sent = sent_to(Versions(start, 1).of("ann"), near(start), INT8, 0, "1")
    with pytest.raises(OSError, match="no space"):
        received(sent.packed.data, START, INT8, 0, "1", memory, start, MOST)
    with pytest.raises(Outdated):
        kept(memory, version, start)


def test_what_a_client_does_with_what_came_does_not_change_what_it_has() -> None:
    start, memory, has, version = learnt()
    sent = sent_to(Versions(start, 1).of("ann"), near(start), INT8, 0, "1")
    for tensor in received(sent.packed.data, START, INT8, 0, "1", memory, start, MOST).tensors.values():
        tensor.zero_()
    assert same_payload(kept(memory, version, start), has)
    assert same_payload(start, small())


def test_nothing_of_an_earlier_run_stays() -> None:
    _, memory, _, _ = learnt()
    only = Payload({"head": torch.ones(3)}, {"head": Role.DENSE})
    sent = sent_to(Versions(only, 1).of("ann"), only, INT8, 0, "1")
    received(sent.packed.data, START, INT8, 0, "1", memory, only, MOST)
    assert [name for name in memory if name.startswith(KEPT)] == [f"{KEPT}head"]
