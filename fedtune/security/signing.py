"""Messages that bear who wrote them: Ed25519 (RFC 8032) over the whole header and a digest of the tensors.

Of an ask the stamp says which run it belongs to, its serial, for which client it is, and whether the answer is to be sealed.
Of an answer it says which run and serial it answers, and who answers. A serial is the coordinator's clock in nanoseconds, and
never the same nor less than the one before: so an old message stays old, whatever it is called.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedtune.envelope import Envelope
from fedtune.errors import Refused

STAMP, SIGNATURE = "stamp", "signature"  # in the header
ASK, ANSWER = b"fedtune ask 1\n", b"fedtune answer 1\n"  # so that neither can be taken for the other


@dataclass(frozen=True)
class Stamp:
    run: str
    serial: int
    client: str = ""  # who is asked, or who answers; of a hello it is not known yet
    seal: bool = False  # asks: the answer is for the coordinator alone


def signed(envelope: Envelope, stamp: Stamp, key: Ed25519PrivateKey, kind: bytes) -> Envelope:
    header = {**envelope.header, STAMP: {**asdict(stamp), "digest": digest(envelope)}}
    signature = key.sign(kind + Envelope(header).header_json().encode())
    return Envelope({**header, SIGNATURE: base64.b64encode(signature).decode()}, envelope.tensors)


def verified(envelope: Envelope, key: Ed25519PublicKey, kind: bytes) -> tuple[Envelope, Stamp]:
    """The message without its signature, and its stamp. Raises Refused with what is wrong."""
    header = dict(envelope.header)
    signature, stamp = header.pop(SIGNATURE, None), header.get(STAMP)
    if signature is None or not isinstance(stamp, Mapping):
        raise Refused("it is not signed")
    try:
        key.verify(base64.b64decode(str(signature), validate=True), kind + Envelope(header).header_json().encode())
    except (InvalidSignature, ValueError) as error:
        raise Refused("its signature is wrong: another key made it, or it was changed on its way") from error
    if stamp.get("digest") != digest(envelope):
        raise Refused("its tensors are not those that were signed")
    del header[STAMP]
    return Envelope(header, envelope.tensors), _stamp(stamp)


def digest(envelope: Envelope) -> str:
    """SHA-256 of the tensors: of each what it is called and how long it is, then its bytes."""
    running = hashlib.sha256()
    for tensor in envelope.tensors:
        about = [tensor.name, tensor.dtype, list(tensor.shape), tensor.stype, len(tensor.data)]
        running.update(json.dumps(about).encode())
        running.update(tensor.data)
    return running.hexdigest()


def _stamp(given: Mapping[str, Any]) -> Stamp:
    """Signed by the right key, and so made by a fedtune: unless of another version."""
    try:
        return Stamp(str(given["run"]), int(given["serial"]), str(given["client"]), bool(given["seal"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Refused(f"its stamp cannot be read: {error}; install the same fedtune on both sides") from error
