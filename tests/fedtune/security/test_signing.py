"""A signature holds for one message word for word, and a sealed one opens in its place alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedtune.envelope import Envelope, WireTensor
from fedtune.errors import Refused
from fedtune.security.sealing import is_sealed, opened, sealed
from fedtune.security.signing import ANSWER, ASK, SIGNATURE, STAMP, Stamp, signed, verified

KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
SEAL, OTHER_SEAL = X25519PrivateKey.generate(), X25519PrivateKey.generate()
STAMP_OF = Stamp("run.1", 7, "north", True)
ASKED = Envelope({"kind": "train", "ask": "1.0", "lr": 0.1}, (WireTensor("w", "uint8", (2,), "raw", b"ab"),))

words = st.text(max_size=6)
values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words
tensors = st.builds(WireTensor, words, words, st.lists(st.integers(0, 9), max_size=3).map(tuple), words, st.binary(max_size=9))
envelopes = st.builds(
    Envelope,
    st.dictionaries(
        words.filter(lambda name: name not in (STAMP, SIGNATURE)), values | st.lists(values, max_size=2), max_size=4
    ),
    st.lists(tensors, max_size=3).map(tuple),
)
stamps = st.builds(Stamp, words, st.integers(0, 2**63), words, st.booleans())


@given(envelopes, stamps)
def test_what_was_signed_comes_back_as_it_was(envelope: Envelope, stamp: Stamp) -> None:
    assert verified(signed(envelope, stamp, KEY, ASK), KEY.public_key(), ASK) == (envelope, stamp)


@given(envelopes, stamps)
def test_what_was_sealed_comes_back_as_it_was_and_shows_nothing(envelope: Envelope, stamp: Stamp) -> None:
    carried = sealed(envelope, stamp, SEAL.public_key())
    assert is_sealed(carried)
    failed = {"unanswered"} if "failed" in envelope.header else set()
    assert carried.header.keys() == {"version", "run", "serial", "client"} | failed
    assert opened(carried, stamp, SEAL) == envelope


def test_sealing_adds_48_bytes() -> None:
    """32 of a fresh X25519 key and 16 of Poly1305's tag."""
    [tensor] = sealed(ASKED, STAMP_OF, SEAL.public_key()).tensors
    assert len(tensor.data) == sum(map(len, ASKED.pieces())) + 32 + 16


def changed(header: dict[str, object] | None = None, stamp: dict[str, object] | None = None, **tensor: object) -> Envelope:
    """A signed ask that somebody touched on its way."""
    message = signed(ASKED, STAMP_OF, KEY, ASK)
    touched = {**message.header, **(header or {}), STAMP: {**message.header[STAMP], **(stamp or {})}}
    return Envelope(touched, (replace(message.tensors[0], **tensor),))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (changed(), None),
        (changed({"lr": 0.2}), "signature is wrong"),
        (changed({"ask": "2.0"}), "signature is wrong"),
        (changed({"more": 1}), "signature is wrong"),
        (changed(stamp={"run": "run.2"}), "signature is wrong"),
        (changed(stamp={"serial": 8}), "signature is wrong"),
        (changed(stamp={"client": "south"}), "signature is wrong"),
        (changed(stamp={"seal": False}), "signature is wrong"),
        (changed({SIGNATURE: "AAAA"}), "signature is wrong"),
        (changed({SIGNATURE: "no base64"}), "signature is wrong"),
        (changed(data=b"ac"), "tensors are not those"),
        (changed(name="v"), "tensors are not those"),
        (changed(shape=(1, 2)), "tensors are not those"),
        (changed(stype="other"), "tensors are not those"),
        (Envelope(changed().header, ()), "tensors are not those"),
        (ASKED, "not signed"),
        (Envelope({**ASKED.header, STAMP: 3, SIGNATURE: "x"}), "not signed"),
        (signed(ASKED, STAMP_OF, OTHER, ASK), "another key made it"),
        (signed(ASKED, STAMP_OF, KEY, ANSWER), "signature is wrong"),  # an answer is no ask
    ],
)
def test_a_message_that_was_touched_is_refused(message: Envelope, reason: str | None) -> None:
    if reason is None:
        assert verified(message, KEY.public_key(), ASK) == (ASKED, STAMP_OF)
    else:
        with pytest.raises(Refused, match=reason):
            verified(message, KEY.public_key(), ASK)


def test_two_tensors_cannot_be_taken_for_one() -> None:
    """The bytes in a row are the same; the digest knows where one ends."""
    one = Envelope({}, (WireTensor("a", "u", (), "s", b"12"), WireTensor("b", "u", (), "s", b"3")))
    other = Envelope({}, (WireTensor("a", "u", (), "s", b"1"), WireTensor("b", "u", (), "s", b"23")))
    message = signed(one, STAMP_OF, KEY, ASK)
    with pytest.raises(Refused, match="tensors"):
        verified(Envelope(message.header, other.tensors), KEY.public_key(), ASK)


def cut(data: bytes) -> bytes:
    return data[:-1]


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize("touch", [cut, flipped, lambda data: b"", lambda data: data + b"x"])
def test_sealed_bytes_that_were_touched_do_not_open(touch: Callable[[bytes], bytes]) -> None:
    carried = sealed(ASKED, STAMP_OF, SEAL.public_key())
    touched = Envelope(carried.header, (replace(carried.tensors[0], data=touch(carried.tensors[0].data)),))
    with pytest.raises(Refused, match="cannot be opened"):
        opened(touched, STAMP_OF, SEAL)


@pytest.mark.parametrize(
    "place",
    [replace(STAMP_OF, run="run.2"), replace(STAMP_OF, serial=8), replace(STAMP_OF, client="south")],
)
def test_sealed_for_one_place_does_not_open_in_another(place: Stamp) -> None:
    carried = sealed(ASKED, STAMP_OF, SEAL.public_key())
    with pytest.raises(Refused, match="cannot be opened"):
        opened(carried, place, SEAL)
    with pytest.raises(Refused, match="cannot be opened"):
        opened(carried, STAMP_OF, OTHER_SEAL)
