"""Answers that the coordinator alone can read: HPKE (RFC 9180) with X25519, HKDF-SHA256 and ChaCha20-Poly1305.

Each is sealed for one run, serial and client: taken out of its place it cannot be opened.
"""

from __future__ import annotations

import io
import json

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from fedtune.envelope import WIRE_VERSION, Envelope, WireTensor
from fedtune.errors import MalformedMessage, Refused
from fedtune.security.signing import Stamp

SEALED = "fedtune.sealed"
UNANSWERED = "unanswered"
SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


def sealed(envelope: Envelope, stamp: Stamp, key: X25519PublicKey) -> Envelope:
    """Nothing but who answers which message can be seen of it, how long it is, and whether it is a failure: that is for the log
    of the relay, and counts for nothing."""
    data = SUITE.encrypt(b"".join(envelope.pieces()), key, _place(stamp))
    header = {"version": WIRE_VERSION, "run": stamp.run, "serial": stamp.serial, "client": stamp.client}
    failed = {UNANSWERED: True} if "failed" in envelope.header else {}
    return Envelope(header | failed, (WireTensor(SEALED, "uint8", (len(data),), SEALED, data),))


def is_sealed(envelope: Envelope) -> bool:
    return [tensor.stype for tensor in envelope.tensors] == [SEALED]


def opened(envelope: Envelope, stamp: Stamp, key: X25519PrivateKey) -> Envelope:
    """Raises Refused unless it was sealed with our key for this place."""
    try:
        return Envelope.read(io.BytesIO(SUITE.decrypt(envelope.tensors[0].data, key, _place(stamp))))
    except (InvalidTag, ValueError, MalformedMessage) as error:
        raise Refused(
            "it cannot be opened: it was changed on its way, answers something else, or was sealed with another key; if the "
            "coordinator's keys were rotated, give the client its new bundle"
        ) from error


def _place(stamp: Stamp) -> bytes:
    return json.dumps(["fedtune sealed 1", stamp.run, stamp.serial, stamp.client]).encode()
