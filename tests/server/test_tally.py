"""The sums of one round."""

from __future__ import annotations

import pytest

from fedtune.envelope import Envelope, WireTensor
from fedtune.strategy import Answer
from server.tally import Tally


def envelope(size: int, **header: object) -> Envelope:
    return Envelope(header, (WireTensor("w", "uint8", (size,), "fedtune.raw", bytes(size)),))


def test_bytes_and_seconds_of_a_client_add_up_over_its_asks() -> None:
    tally = Tally(["bob", "ann"])
    for size in (10, 20):
        tally.sent("ann", envelope(size))
        tally.came("ann", envelope(3 * size, seconds=0.5))
    record = tally.clients["ann"]
    header = len('{"seconds":0.5}')
    assert (record.bytes_down, record.bytes_up, record.seconds) == (30 + 2 * 2, 90 + 2 * header, 1.0)  # '{}' is 2 bytes
    assert tally.clients["bob"].bytes_down == 0
    assert list(tally.clients) == ["ann", "bob"]


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


def test_without_any_held_out_example_there_are_no_figures() -> None:
    tally = Tally(["ann"])
    tally.held_out("ann", Answer())
    assert tally.figures() == {}


def test_a_failure_keeps_what_was_counted_before() -> None:
    tally = Tally(["ann"])
    tally.sent("ann", envelope(5))
    tally.failed("ann", "no answer")
    assert (tally.clients["ann"].bytes_down, tally.clients["ann"].failed) == (7, "no answer")
