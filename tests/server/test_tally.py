"""The sums of one round."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import pytest
import torch

from fedtune.envelope import Envelope, WireTensor
from fedtune.payload import Payload, Role
from fedtune.strategy import Answer
from fedtune.wire.codec import codec_from
from fedtune.wire.ends import PACKED
from fedtune.wire.ledger import Cost, cost_of
from fedtune.wire.packed import Codecs, overhead, pack
from fedtune.wire.transport import transport_size
from server.records import ClientRecord, RoundRecord
from server.report_folder import read_run
from server.tally import Tally

NOTHING = Payload()


def envelope(size: int, **header: object) -> Envelope:
    return Envelope(header, (WireTensor("w", "uint8", (size,), "fedtune.raw", bytes(size)),))


def packed(payload: Payload, known: Payload = NOTHING, **header: object) -> Envelope:
    """By int8, without an entropy coder."""
    codec = codec_from("int8")
    data = pack(payload, Codecs(codec, codec), 1, known).data
    return Envelope({**header, "codec": "int8"}, (WireTensor(PACKED, "uint8", (len(data),), PACKED, data),))


def test_bytes_and_seconds_of_a_client_add_up_over_its_asks() -> None:
    tally = Tally(["bob", "ann"])
    for size in (10, 20):
        tally.sent("ann", envelope(size), NOTHING)
        tally.came("ann", envelope(3 * size, seconds=0.5))
    record = tally.clients["ann"]
    header = len('{"seconds":0.5}')
    assert (record.bytes_down, record.bytes_up, record.seconds) == (30 + 2 * 2, 90 + 2 * header, 1.0)  # '{}' is 2 bytes
    assert (record.header_down, record.header_up) == (2 * 2, 2 * header)
    assert (record.plain_down, record.plain_up) == (record.bytes_down, record.bytes_up)
    assert record.transport_down == transport_size(envelope(10)) + transport_size(envelope(20))
    assert tally.clients["bob"] == ClientRecord()
    assert list(tally.clients) == ["ann", "bob"]


def test_a_packed_message_is_counted_beside_what_it_were_plain() -> None:
    """1000 numbers of which the other side has nothing like: 4 bytes each plain, and about 1 in int8, with a scale or so for
    each block of numbers. Of header there are the JSON and what stands before the first stream, the schema above all."""
    payload = Payload({"w": torch.randn(10, 100)}, {"w": Role.DENSE})
    message, tally = packed(payload, ask="1.0"), Tally(["ann"])
    tally.sent("ann", message, payload)
    record = tally.clients["ann"]
    assert record.plain_down == 4000 + len('{"ask":"1.0","roles":{"w":"dense"},"scalars":{},"version":1}')
    schema = record.header_down - len('{"ask":"1.0","codec":"int8"}')
    assert schema == overhead(message.tensors[0].data)
    assert 20 < schema < 100
    assert 1000 < record.bytes_down - record.header_down < 1000 + 100
    assert record.bytes_down == message.size()


def test_an_answer_counts_as_it_is_until_it_is_read() -> None:
    """One that is refused is never read."""
    payload = Payload({"w": torch.randn(10, 100)}, {"w": Role.DENSE})
    message, tally = packed(payload, weight=2.0), Tally(["ann"])
    tally.came("ann", message)
    assert tally.clients["ann"].plain_up == tally.clients["ann"].bytes_up == message.size()
    tally.read("ann", message, payload)
    plain = 4000 + len('{"roles":{"w":"dense"},"scalars":{},"version":1,"weight":2.0}')
    assert (tally.clients["ann"].plain_up, tally.clients["ann"].bytes_up) == (plain, message.size())


def test_a_broadcast_that_is_sent_twice_counts_twice() -> None:
    """The second time the client has it, and little travels; plain it would have been as large again."""
    payload = Payload({"w": torch.randn(10, 100)}, {"w": Role.DENSE})
    codec = codec_from("int8")
    again = pack(payload, Codecs(codec, codec), 1, payload, same=["w"]).data
    tally = Tally(["ann"])
    second = Envelope({"codec": "int8"}, (WireTensor(PACKED, "uint8", (len(again),), PACKED, again),))
    for message in (packed(payload), second):
        tally.sent("ann", message, payload)
    record = tally.clients["ann"]
    assert record.plain_down == 2 * (4000 + len('{"roles":{"w":"dense"},"scalars":{},"version":1}'))
    assert len(again) < 10  # the layout says it all
    assert record.bytes_down == packed(payload).size() + second.size()


def test_costs_add_up() -> None:
    assert Cost(1, 2, 3, 4) + Cost(10, 20, 30, 40) == Cost(11, 22, 33, 44)
    assert cost_of(envelope(5)) == Cost(7, 2, transport_size(envelope(5)), 7)


def test_the_records_of_older_runs_are_read(tmp_path: Path) -> None:
    old = {"bytes_down": 10, "bytes_up": 5, "seconds": 1.0, "examples": 2.0, "train_loss": 3.0, "loss": 4.0, "failed": None}
    record = RoundRecord(1, 4.0).as_json() | {"clients": {"ann": old}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    read = RoundRecord.from_json(record)
    assert read_run(tmp_path).rounds == [read]
    assert (read.bytes_down, read.clients["ann"].plain_down, read.ratio) == (10, 0, None)


def test_the_ratio_is_of_both_directions() -> None:
    """(300 + 700) / (40 + 60) = 10."""
    clients = {"a": ClientRecord(40, 10, plain_down=300, plain_up=500), "b": ClientRecord(0, 50, plain_up=200)}
    assert RoundRecord(1, clients=clients).ratio == 10.0
    assert RoundRecord(1).ratio is None


@pytest.mark.parametrize("seconds", [None, "soon", [1], float("nan"), -1.0])
def test_a_time_that_is_none_counts_as_nothing(seconds: object) -> None:
    tally = Tally(["ann"])
    tally.came("ann", envelope(1, seconds=seconds))
    assert tally.clients["ann"].seconds == 0.0


def test_examples_add_up_and_the_last_loss_counts() -> None:
    tally = Tally(["ann"])
    tally.trained("ann", {"loss": 3.0, "examples": 8})
    tally.trained("ann", {"loss": 2.0, "examples": 8})
    tally.trained("ann", {})  # an ask without training, such as for norms
    assert (tally.clients["ann"].examples, tally.clients["ann"].train_loss) == (16, 2.0)


def test_figures_are_means_over_predictions() -> None:
    """(30 * 1 + 10 * 5) / 40 = 2; perplexity is no mean, so it is made from the loss."""
    tally = Tally(["ann", "bob", "cy"])
    tally.held_out("ann", Answer(metrics={"loss": 1.0, "token_accuracy": 0.5, "tokens": 30, "perplexity": 2.7}))
    tally.held_out("bob", Answer(metrics={"loss": 5.0, "token_accuracy": 0.1, "tokens": 10, "perplexity": 148.0}))
    tally.held_out("cy", Answer())  # it has nothing held out
    assert tally.figures() == pytest.approx({"loss": 2.0, "token_accuracy": 0.4})
    assert [client.loss for client in tally.clients.values()] == [1.0, 5.0, None]


def test_figures_do_not_depend_on_the_order_in_which_answers_come() -> None:
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1, in its last bit."""
    losses = {"ann": 0.1, "bob": 0.2, "cy": 0.3}
    assert (0.1 + 0.2) + 0.3 != (0.3 + 0.2) + 0.1
    figures = []
    for names in permutations(losses):
        tally = Tally(losses)
        for name in names:
            tally.held_out(name, Answer(metrics={"loss": losses[name], "tokens": 1.0}))
        figures.append(tally.figures())
    assert all(one == figures[0] for one in figures)


def test_without_any_held_out_example_there_are_no_figures() -> None:
    tally = Tally(["ann"])
    tally.held_out("ann", Answer())
    assert tally.figures() == {}


def test_a_failure_keeps_what_was_counted_before() -> None:
    tally = Tally(["ann"])
    tally.sent("ann", envelope(5), NOTHING)
    tally.failed("ann", "no answer")
    assert (tally.clients["ann"].bytes_down, tally.clients["ann"].failed) == (7, "no answer")


@pytest.mark.parametrize("reason", ["", " ", "\n"])
def test_who_gives_no_reason_has_failed_all_the_same(reason: str) -> None:
    tally = Tally(["ann", "bob"])
    tally.failed("ann", reason)
    assert tally.able(["ann", "bob"]) == ["bob"]
    assert tally.reasons == {"ann": "it gave no reason"}
