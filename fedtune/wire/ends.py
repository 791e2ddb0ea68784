"""The two ends of the wire: what a round of the coordinator calls, and what a client's trainer calls.

A message without tensors, and all messages of the codec `fp32`, travel as fedtune/wire/raw.py says. All others are one row of
bytes (fedtune/wire/packed.py); a header says which codec made it, and nothing but the job's codec is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fedtune.envelope import WIRE_VERSION, Envelope, WireTensor
from fedtune.errors import MalformedMessage
from fedtune.memory import Memory
from fedtune.payload import Payload
from fedtune.seeds import seed_of
from fedtune.strategy import Answer, Ask
from fedtune.wire.codec import Codec
from fedtune.wire.feedback import Feedback
from fedtune.wire.packed import NOTHING, pack, unpack
from fedtune.wire.presets import Wire
from fedtune.wire.raw import answer_with, pack_answer, pack_ask, require_version, unpack_answer, unpack_ask
from fedtune.wire.versions import Held, Sent, Versions, kept, received, sent_to

PACKED = "fedtune.packed"
RESEND = "resend"  # in the header of a failure: the client wants everything


class ServerEnd:
    """What each client has, over a whole run. `start` is the adapter that the job starts from, which both sides know."""

    def __init__(self, wire: Wire, start: Payload) -> None:
        self._wire, self._versions = wire, Versions(start, wire.versions)
        self._known: dict[str, Payload] = {}  # what each client knows while it answers the ask that it was sent last
        self._coming: dict[str, Held] = {}
        self._sent: dict[tuple[int, str], Sent] = {}  # of the open ask: by the identity of a payload, and who has what

    def ask(self, ask: Ask, client: str, header: Mapping[str, Any]) -> Envelope:
        """The message for one client. Clients that have the same and are sent the same share its bytes."""
        payload = ask.payload_for(client)
        if self._wire.down.change.plain:
            self._known[client] = payload
            return pack_ask(ask, client, header)
        held = self._versions.of(client)
        if not payload.tensors:
            self._known[client] = held.payload
            return pack_ask(ask, client, {**header, "since": held.version})
        shared = id(payload), held.version
        if shared not in self._sent:
            self._sent[shared] = sent_to(held, payload, self._wire.down, self._wire.seed, str(header["ask"]))
        sent = self._sent[shared]
        self._coming[client], self._known[client] = sent.held, sent.held.payload
        about = {**header, "kind": ask.kind, "version": WIRE_VERSION, "since": sent.since}
        return _packed(sent.packed.data, about, self._wire.down.change)

    def arrived(self, client: str, envelope: Envelope | None) -> bool:
        """What a client's reply tells of what it has; whether it wants everything."""
        coming = self._coming.pop(client, None)
        if envelope is None or "failed" in envelope.header:
            self._versions.forget(client)
        elif coming is not None:
            self._versions.arrived(client, coming)
        return envelope is not None and envelope.header.get(RESEND) is True

    def settle(self) -> None:
        """All answers to an ask have come; those that did not come are of clients of whom nothing is known."""
        for client in self._coming:
            self._versions.forget(client)
        self._coming, self._sent = {}, {}
        self._versions.settle()

    def answer(self, envelope: Envelope, client: str, most: int) -> Answer:
        """Of at most so many numbers. Raises ClientFailed with the client's reason, or MalformedMessage."""
        codec, header = self._wire.up.change, envelope.header
        if "failed" in header or not envelope.tensors or codec.plain:
            _require_count(envelope, most)
            return unpack_answer(envelope)
        require_version(header)
        key = seed_of(self._wire.seed, str(header.get("ask")), "up", client)
        data = _data(envelope, codec)
        return answer_with(unpack(data, self._wire.up, key, self._known.get(client, NOTHING), most), header)


class ClientEnd:
    """One client's, over its memory."""

    def __init__(self, wire: Wire, memory: Memory, client: str, start: Callable[[], Payload], most: int) -> None:
        self._wire, self._memory, self._client, self._start, self._most = wire, memory, client, start, most
        self._known = NOTHING

    def ask(self, envelope: Envelope) -> Ask:
        """Raises ClientFailed or MalformedMessage."""
        codec, header = self._wire.down.change, envelope.header
        if codec.plain:
            _require_count(envelope, self._most)
            ask = unpack_ask(envelope)
            self._known = ask.payload
            return ask
        require_version(header)
        since, start = str(header.get("since")), self._start()
        if not envelope.tensors:
            self._known = kept(self._memory, since, start)
            return unpack_ask(envelope)
        wire, ask_id = self._wire, str(header.get("ask"))
        came = received(_data(envelope, codec), since, wire.down, wire.seed, ask_id, self._memory, start, self._most)
        payload, self._known = came
        return Ask(str(header.get("kind")), payload)

    def answer(self, answer: Answer, ask: Ask, header: Mapping[str, Any]) -> Envelope:
        """The answer to the ask that came last; `header` repeats its id and its round."""
        codec = self._wire.up.change
        if not answer.payload.tensors or codec.plain:
            return pack_answer(answer, header)
        key = seed_of(self._wire.seed, str(header["ask"]), "up", self._client)
        errors = Feedback(self._memory, ask.kind, int(header["round"]), self._wire.decay) if self._wire.feedback else None
        packed = pack(answer.payload, self._wire.up, key, self._known, errors=errors)
        about = {**header, "version": WIRE_VERSION, "weight": answer.weight, "metrics": dict(answer.metrics)}
        return _packed(packed.data, about, codec)


def outdated(failure: Envelope) -> Envelope:
    """A failure that asks for everything."""
    return replace(failure, header={**failure.header, RESEND: True})


def _packed(data: bytes, header: Mapping[str, Any], codec: Codec) -> Envelope:
    return Envelope({**header, "codec": codec.text}, (WireTensor(PACKED, "uint8", (len(data),), PACKED, data),))


def _data(envelope: Envelope, codec: Codec) -> bytes:
    """Raises MalformedMessage unless it is of the job's codec."""
    given = [tensor.stype for tensor in envelope.tensors]
    if given != [PACKED]:
        raise MalformedMessage(f"tensors came as {', '.join(sorted(set(given)))[:80]}, wanted {PACKED} alone (wire)")
    if envelope.header.get("codec") != codec.text:
        raise MalformedMessage(
            f"tensors came by codec {str(envelope.header.get('codec'))[:80]!r}, this job's is '{codec.text}' (wire)"
        )
    return envelope.tensors[0].data


def _require_count(envelope: Envelope, most: int) -> None:
    total = sum(len(tensor.data) for tensor in envelope.tensors)
    if total > 8 * most:
        raise MalformedMessage(f"a message of {total} bytes came, wanted at most {8 * most}")
