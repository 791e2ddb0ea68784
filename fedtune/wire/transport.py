"""What the network carries beside a message's own bytes: an estimate, by a formula, for a node over TLS.

Flower 1.41 takes a message apart into objects: the message, its record, our header, the list of arrays, each array and each
of its chunks. A node fetches or sends one object in one HTTP/1.1 call, whose head holds the node's key and a signature,
about 850 bytes. So a message of a hundred tensors takes two hundred calls and more, and one that is packed takes eight.

Counted are both ways of every call that moves the message: HTTP heads, protobuf with its hashes of objects, what TLS 1.3
adds to each record. Not counted are what a node does without a message (polling, heartbeats), handshakes, TCP and IP (about
4 % more), what is lost and sent again, and what Flower leaves out because two objects are alike. What the ServerApp and
the SuperLink say to each other crosses no network where they share a machine.
"""

from __future__ import annotations

import json

from fedtune.envelope import Envelope, WireTensor

CHUNK = 5 * 2**20  # bytes of an array in one object
ID = 64  # a hash, in hexadecimal
REQUEST, RESPONSE = 845, 135  # heads, of a node that proves who it is
RECORD, FULL = 22, 2**14  # what TLS adds to a record, and the most that one holds
CALL = REQUEST + RESPONSE + 4 * RECORD  # heads and bodies are records of their own
FIELDS = 112  # in the body of a call that moves an object: its hash, the run, the node, on the way up a session
TREE = ID + 6  # of an object in the list of all that comes before them
NAMED = 2 * ID + 7  # of an array in the list of arrays, beside its name: its hash, twice
ENDS = 2  # calls that announce a message and confirm it
FIXED = 810  # the message's metadata, twice, and its records without arrays


def transport_size(envelope: Envelope) -> int:
    """Estimated bytes beside `envelope.size()`."""
    objects, own = 4, FIXED
    for tensor in envelope.tensors:
        chunks = -(-len(tensor.data) // CHUNK)
        objects, own = objects + 1 + chunks, own + _array_size(tensor, chunks)
    full = sum(len(tensor.data) // FULL for tensor in envelope.tensors)
    return own + objects * (FIELDS + TREE) + (objects + ENDS) * CALL + full * RECORD


def _array_size(tensor: WireTensor, chunks: int) -> int:
    """Its name in the list, what it says of itself, and the heads of its chunks."""
    about = len(tensor.dtype) + len(tensor.stype) + len(str(tensor.shape)) + 75
    return len(json.dumps(tensor.name)) + NAMED + about + chunks * (ID + 22)
