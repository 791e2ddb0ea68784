"""Server and client over a run: asks there, answers back, and what either side refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.adapter import Adapter, Factors
from fedtune.envelope import Envelope, WireTensor
from fedtune.errors import ClientFailed, MalformedMessage
from fedtune.memory import Memory
from fedtune.payload import Payload, payload_of
from fedtune.strategy import Answer, Ask, ClientInfo
from fedtune.wire.ends import PACKED, ClientEnd, ServerEnd, _key, outdated
from fedtune.wire.integers import Int8
from fedtune.wire.presets import Wire
from fedtune.wire.randk import RandK
from fedtune.wire.raw import RAW, pack_answer, pack_ask, pack_failure
from fedtune.wire.rotate import Rotate
from fedtune.wire.stage import Draw
from fedtune.wire.versions import KEPT, Outdated
from strategies.fedavg import FedAvg
from tests.fedtune.wire.payloads import CODECS, near, same_payload

START = payload_of(Adapter({"q": Factors(torch.ones(4, 16), torch.zeros(24, 4), 1.5)}))
CLIENTS = ("ann", "bob")
MOST = 10_000


def wire(up: str = "balanced", down: str = "balanced", feedback: bool = False) -> Wire:
    return Wire(CODECS[up], CODECS[down], feedback, 0.9, 4, seed=3)


class Run:
    """One server and two clients, whose messages go through JSON as in a network."""

    def __init__(self, how: Wire, most: int = MOST) -> None:
        self.server, self.how = ServerEnd(how, FedAvg(), START), how
        self.memories = {client: Memory() for client in CLIENTS}
        self.ends = {client: self.end(client, how, most) for client in CLIENTS}

    def end(self, client: str, how: Wire, most: int = MOST) -> ClientEnd:
        return ClientEnd(how, FedAvg(), self.memories[client], client, lambda: START, most)

    def down(self, ask: Ask, round: int, client: str = "ann") -> tuple[Envelope, Ask]:
        envelope = carried(self.server.ask(ask, client, header(round)))
        return envelope, self.ends[client].ask(envelope)

    def up(self, payload: Payload, came: Ask, round: int, client: str = "ann") -> tuple[Envelope, Answer]:
        envelope = carried(
            self.ends[client].answer(Answer(payload, 2.0, {"loss": 1.0}), came, ClientInfo(client, 2, 4), header(round))
        )
        return envelope, self.read(envelope, client)

    def read(self, envelope: Envelope, client: str = "ann", most: int = MOST) -> Answer:
        return self.server.answer(envelope, ClientInfo(client, examples=2, rank=4), most)


def header(round: int) -> dict[str, Any]:
    return {"ask": f"{round}.0", "run": "tiny", "round": round, "base": "b"}


def carried(envelope: Envelope) -> Envelope:
    return Envelope(json.loads(envelope.header_json()), envelope.tensors)


def far(one: Payload, other: Payload) -> float:
    return max(float((one.tensors[name] - other.tensors[name]).abs().max()) for name in one.tensors)


@pytest.mark.parametrize("up", ["plain", "lossless", "balanced", "tiny"])
@pytest.mark.parametrize("down", ["plain", "lossless", "balanced", "tiny"])
def test_rounds_over_every_pair_of_presets(up: str, down: str) -> None:
    run, state, exact = Run(wire(up, down)), START, ("plain", "lossless")
    for round in range(3):
        for client in CLIENTS:
            _, came = run.down(Ask("train", state), round, client)
            assert far(came.payload, state) == 0 or down not in exact
            trained = near(came.payload, round)
            envelope, answer = run.up(trained, came, round, client)
            assert (answer.weight, answer.metrics) == (2.0, {"loss": 1.0})
            assert answer.payload.scalars == {"q.scale": 1.5}
            if up in exact and down in exact:
                assert far(answer.payload, trained) == 0
            run.server.arrived(client, envelope)
        run.server.settle()
        state = near(state, round)


def test_clients_with_the_same_version_are_sent_the_same_bytes() -> None:
    run = Run(wire())
    ask = Ask("train", near(START))
    first, second = (run.server.ask(ask, client, header(1)) for client in CLIENTS)
    assert first.tensors == second.tensors


def test_to_evaluate_what_was_just_sent_costs_almost_nothing() -> None:
    run = Run(wire())
    trained, _ = run.down(Ask("train", near(START)), 1)
    run.server.arrived("ann", carried(pack_answer(Answer(), header(1))))
    run.server.settle()
    evaluated, came = run.down(Ask("evaluate", near(START)), 1)
    assert len(evaluated.tensors[0].data) == 3 < len(trained.tensors[0].data)
    assert came.kind == "evaluate"


def test_who_lost_its_memory_is_sent_everything() -> None:
    run = Run(wire())
    _, came = run.down(Ask("train", near(START)), 1)
    run.server.arrived("ann", run.up(came.payload, came, 1)[0])
    run.server.settle()
    run.memories["ann"].clear()
    ask = Ask("train", near(START, 2))
    with pytest.raises(Outdated) as error:
        run.down(ask, 2)
    assert run.server.arrived("ann", carried(outdated(pack_failure(str(error.value), header(2)))))
    _, came = run.down(ask, 2)
    assert far(came.payload, ask.payload) < 0.1


def test_only_a_failure_can_ask_for_everything() -> None:
    run = Run(wire())
    _, came = run.down(Ask("train", near(START)), 1)
    envelope, _ = run.up(came.payload, came, 1)
    assert not run.server.arrived("ann", replace(envelope, header={**envelope.header, "resend": True}))
    run.down(Ask("train", near(START)), 2)
    assert not run.server.arrived("ann", None)


def test_payloads_that_are_made_for_each_client_are_not_mixed_up() -> None:
    """Python gives the address of what is gone to what comes next."""
    run = Run(wire("lossless", "lossless"))
    for place, client in enumerate(CLIENTS * 3):

        class Fresh(Ask):
            def payload_for(self, client: str) -> Payload:
                return near(START, CLIENTS.index(client))

        _, came = run.down(Fresh("train"), 1, client)
        assert far(came.payload, near(START, place % 2)) == 0


def test_what_a_strategy_does_with_an_ask_does_not_reach_the_memory() -> None:
    run = Run(wire())
    _, came = run.down(Ask("train", START), 1)
    for tensor in came.payload.tensors.values():
        tensor.fill_(7.0)
    assert all((run.memories["ann"][KEPT + name] != 7).all() for name in START.tensors)
    assert same_payload(START, payload_of(Adapter({"q": Factors(torch.ones(4, 16), torch.zeros(24, 4), 1.5)})))


def test_feedback_waits_in_the_memory_and_is_sent_with_the_next_answer() -> None:
    run, sent = Run(wire("tiny", "lossless", feedback=True)), torch.zeros(24, 4)
    update = torch.linspace(-1, 1, 96).reshape(24, 4)
    for round in range(1, 4):
        _, came = run.down(Ask("train", START), round)
        trained = replace(came.payload, tensors={**came.payload.tensors, "q.lora_B": update})
        envelope, answer = run.up(trained, came, round)
        sent += answer.payload.tensors["q.lora_B"]
        run.server.arrived("ann", envelope)
    (error,) = (tensor for name, tensor in run.memories["ann"].items() if name.endswith("q.lora_B") and "error" in name)
    assert torch.allclose(sent + error, 3 * update, atol=1e-5)


# what is refused


def good(up: str = "balanced") -> tuple[Run, Envelope]:
    """A run, and an answer to its first ask."""
    run = Run(wire(up))
    _, came = run.down(Ask("train", START), 1)
    return run, run.up(near(came.payload), came, 1)[0]


def packed(envelope: Envelope, data: bytes) -> Envelope:
    return replace(envelope, tensors=(replace(envelope.tensors[0], data=data),))


def headed(envelope: Envelope, **changes: object) -> Envelope:
    return replace(envelope, header={**envelope.header, **changes})


RAW_ANSWER = pack_answer(Answer(near(START), 2.0, {"loss": 1.0}), header(1))
ENVELOPES: Mapping[str, tuple[Any, str]] = {
    "another codec": (lambda e: headed(e, codec="int8"), r"tensors came by codec 'int8', this job's is 'uniform\("),
    "no codec": (lambda e: headed(e, codec=None), "tensors came by codec 'None', this job's is"),
    "a codec that is a list": (lambda e: headed(e, codec=["x"] * 10**5), r"tensors came by codec \"\['x',"),
    "tensors as they are": (lambda e: RAW_ANSWER, f"tensors came as {RAW}, wanted {PACKED} alone"),
    "twice": (lambda e: replace(e, tensors=e.tensors * 2), "wanted fedtune.packed alone"),
    "another beside": (lambda e: replace(e, tensors=(*e.tensors, WireTensor("x", "uint8", (1,), RAW, b"1"))), "alone"),
    "garbage": (lambda e: packed(e, b"garbage" * 9), "tensors packed in version 103 came, wanted 1"),
    "nothing": (lambda e: packed(e, b""), "ends 2 bytes too early"),
    "half of it": (lambda e: packed(e, e.tensors[0].data[:-9]), "ends .* bytes too early"),
    "more": (lambda e: packed(e, e.tensors[0].data + b"1"), "1 bytes came behind the end"),
    "another version": (lambda e: headed(e, version=2), "of wire version 2 came, wanted 1"),
    "no weight": (lambda e: headed(e, weight=None), "without weight or metrics"),
    "metrics that are no object": (lambda e: headed(e, metrics=[1]), "without weight or metrics"),
    "an ask that is no text": (lambda e: headed(e, ask="\ud800"), "'ask' is no text"),
}


@pytest.mark.parametrize("what", ENVELOPES)
def test_the_server_refuses_an_answer_and_says_why(what: str) -> None:
    run, envelope = good()
    change, reason = ENVELOPES[what]
    with pytest.raises(MalformedMessage, match=reason) as refusal:
        run.read(change(envelope))
    assert len(str(refusal.value)) < 400
    run.read(envelope)


ASKS = {what: both for what, both in ENVELOPES.items() if what not in ("no weight", "metrics that are no object")}


@pytest.mark.parametrize("what", ASKS)
def test_the_client_refuses_an_ask_and_says_why(what: str) -> None:
    run = Run(wire())
    envelope = carried(run.server.ask(Ask("train", near(START)), "ann", header(1)))
    change, reason = ASKS[what]
    with pytest.raises(MalformedMessage, match=reason):
        run.ends["ann"].ask(change(envelope))
    assert far(run.ends["ann"].ask(envelope).payload, near(START)) < 0.1


@pytest.mark.parametrize("since", [None, 3, "", "\x00", "nothing", ["start"], "x" * 10**6])
def test_an_ask_that_builds_on_what_the_client_does_not_have(since: object) -> None:
    run = Run(wire())
    envelope = carried(run.server.ask(Ask("train", near(START)), "ann", header(1)))
    with pytest.raises(Outdated, match=r"^the ask builds on version .{0,20} of the broadcast, this client has start$"):
        run.ends["ann"].ask(headed(envelope, since=since))


@pytest.mark.parametrize("up", ["plain", "balanced", "tiny", "lossless"])
def test_more_numbers_than_can_have_been_asked_for(up: str) -> None:
    run, envelope = good(up)
    numbers = 4 * 16 + 24 * 4
    assert run.read(envelope, most=numbers).weight == 2.0
    with pytest.raises(MalformedMessage, match="wanted at most"):
        run.read(envelope, most=numbers // 4 - 1)


def test_an_ask_of_more_numbers_than_the_client_takes() -> None:
    for down in ("plain", "balanced"):
        run = Run(wire(down=down), most=10)
        with pytest.raises(MalformedMessage, match="wanted at most"):
            run.down(Ask("train", near(START)), 1)


def test_an_answer_of_a_client_that_was_asked_nothing() -> None:
    """A usual message names no tensors: of a client of whom nothing is known it holds none."""
    _, envelope = good()
    with pytest.raises(MalformedMessage, match="behind the end"):
        Run(wire()).read(envelope)


def test_the_answer_of_one_client_is_not_read_as_anothers() -> None:
    """Both know the same, but each draws its own dither."""
    run, envelope = good()
    run.down(Ask("train", START), 1, "bob")
    assert far(run.read(envelope, "bob").payload, run.read(envelope, "ann").payload) > 0


def test_a_failure_is_told_in_the_clients_words() -> None:
    run, _ = good()
    with pytest.raises(ClientFailed, match="the disk is full"):
        run.read(carried(pack_failure("the disk is full", header(1))))
    with pytest.raises(ClientFailed, match="no trainer answers"):  # the relay repeats the ask's header, codec and all
        run.read(carried(pack_failure("no trainer answers", {**header(1), "codec": "int8", "since": "start"})))


def test_a_plain_job_takes_no_packed_message() -> None:
    run, plain = good("balanced")[1], Run(wire("plain", "plain"))
    plain.down(Ask("train", START), 1)
    with pytest.raises(MalformedMessage, match="this job's is 'fp32'"):
        plain.read(run)
    with pytest.raises(MalformedMessage, match="this job's is 'fp32'"):
        plain.ends["ann"].ask(run)


def test_an_ask_without_tensors_needs_no_codec() -> None:
    run = Run(wire())
    envelope = carried(pack_ask(Ask("probe", Payload(scalars={"x": 1.0})), "ann", header(1)))
    assert run.ends["ann"].ask(envelope).payload.scalars == {"x": 1.0}


def test_all_who_are_asked_draw_the_same_rotation_and_positions_and_dither_of_their_own() -> None:
    """What sums of integers need, and what lets errors of rounding average out."""
    one, other = (Draw.of(_key(3, "1.0", client), "t", 0) for client in ("ann", "bob"))
    later = Draw.of(_key(3, "2.0", "ann"), "t", 0)
    assert one.common(64).tobytes() == other.common(64).tobytes() != later.common(64).tobytes()
    assert one.bytes(64).tobytes() != other.bytes(64).tobytes()
    x = np.arange(32, dtype=np.float32)
    assert np.array_equal(Rotate().encode(x, one)[0], Rotate().encode(x, other)[0])
    assert np.array_equal(RandK(0.25).encode(x, one)[0], RandK(0.25).encode(x, other)[0])
    assert not np.array_equal(Int8().encode(x, one)[0], Int8().encode(x, other)[0])


def test_an_answer_is_read_by_the_ask_that_it_answers_whenever_it_is_read() -> None:
    """Folds are lazy: the next ask of the round may have gone out."""
    run = Run(wire())
    asks = {step: Ask("train", near(START, step)) for step in (0, 1)}
    trained, answers = {}, {}
    for step, ask in asks.items():
        about = {**header(1), "ask": f"1.{step}"}
        came = run.ends["ann"].ask(carried(run.server.ask(ask, "ann", about)))
        trained[step] = near(ask.payload, 5)
        answers[step] = carried(run.ends["ann"].answer(Answer(trained[step]), came, ClientInfo("ann", 2, 4), about))
        run.server.arrived("ann", answers[step])
        run.server.settle()
    for step in (1, 0, 1):
        assert far(run.read(answers[step]).payload, trained[step]) < 0.05


def test_a_client_s_word_for_what_it_lacks_counts_only_where_the_ask_built_on_something() -> None:
    run = Run(wire())
    run.down(Ask("train", near(START)), 1)  # builds on what the job starts from
    assert not run.server.arrived("ann", carried(outdated(pack_failure("no", header(1)))))


def test_the_server_keeps_no_more_than_a_round_s_asks() -> None:
    run = Run(wire())
    for round in (1, 2, 3):
        run.down(Ask("train", near(START, round)), round)
        run.server.settle()
    assert len(run.server._asked) == 1
