"""The two ends of the wire: what a round of the coordinator calls, and what a client's trainer calls.

A message without tensors, and all messages of the codec `fp32`, travel as fedtune/wire/raw.py says. All others are one row of
bytes (fedtune/wire/packed.py); a header says which codec made it, and nothing but the job's codec is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedtune.envelope import WIRE_VERSION, Envelope, WireTensor
from fedtune.errors import MalformedMessage
from fedtune.memory import Memory
from fedtune.payload import Payload, Role
from fedtune.seeds import seed_of
from fedtune.strategy import Answer, Ask, ClientInfo, Ranks, Strategy
from fedtune.wire.codec import Codec
from fedtune.wire.feedback import Feedback
from fedtune.wire.packed import pack, unpack
from fedtune.wire.presets import Wire
from fedtune.wire.raw import answer_with, pack_answer, pack_ask, require_version, unpack_answer, unpack_ask
from fedtune.wire.stage import Key
from fedtune.wire.versions import START, Held, Known, Versions, received, sent_to

PACKED = "fedtune.packed"
NOTHING_ASKED = Ask("")
RESEND = "resend"  # in the header of a failure: the client wants everything


@dataclass(frozen=True)
class _Broadcast:
    """A payload on its way to all who are sent it and have the same."""

    meant: Payload  # kept, as its id is another's when it is gone
    came: Payload  # what they make of it
    envelope: Envelope
    held: Held | None = None  # what they have from then on


@dataclass(frozen=True)
class Pending:
    """Of an ask that is not answered yet."""

    came: Ask  # as the client has it
    since: str = START  # what it builds on
    held: Held | None = None  # what the client has once it has come


class ServerEnd:
    """What each client has, over a whole run. `start` is the adapter that the job starts from, which both sides know.

    A client answers with its difference to what it was sent, which a codec may have made coarser. The difference is added to
    what was to be sent: so what a broadcast loses is missing on the clients for a round, and never in the model (Philippenko
    and Dieuleveut, NeurIPS 2021).
    """

    def __init__(self, wire: Wire, strategy: Strategy, start: Payload) -> None:
        self._wire, self._strategy, self._versions = wire, strategy, Versions(start, wire.versions)
        self._start = start
        self._round: object = None
        self._asked: dict[tuple[str, str], tuple[Ask, Ask]] = {}  # of this round's asks by id and client: as meant, as it came
        self._coming: dict[str, tuple[str, Held]] = {}  # what each client builds on, and what it has then
        self._sent: dict[tuple[int, str], _Broadcast] = {}  # of the open ask: by a payload's id, and who has what

    @property
    def known(self) -> Known:
        """Between rounds, for a checkpoint."""
        return self._versions.known

    @known.setter
    def known(self, known: Known) -> None:
        """Whatever was asked since is as if it had not been."""
        self._versions.known = known
        self._round, self._asked, self._coming, self._sent = None, {}, {}, {}

    def ask(self, ask: Ask, client: str, header: Mapping[str, Any]) -> Envelope:
        """The message for one client. Clients that have the same and are sent the same share its bytes."""
        if header.get("round") != self._round:  # answers to what was asked before are all folded
            self._round, self._asked = header.get("round"), {}
        payload = ask.payload_for(client)
        plain = self._wire.down.change.plain or not payload.tensors
        held = Held() if plain else self._versions.of(client)
        shared = id(payload), held.version
        if shared not in self._sent:
            self._sent[shared] = self._plain(ask, client, header) if plain else self._packed(ask, client, header, held)
        sent = self._sent[shared]
        if sent.held is not None:
            self._coming[client] = held.version, sent.held
        self._asked[str(header["ask"]), client] = Ask(ask.kind, payload, tensors=ask.tensors), Ask(ask.kind, sent.came)
        return sent.envelope

    def _plain(self, ask: Ask, client: str, header: Mapping[str, Any]) -> _Broadcast:
        payload = ask.payload_for(client)
        return _Broadcast(payload, payload, pack_ask(ask, client, header))

    def _packed(self, ask: Ask, client: str, header: Mapping[str, Any], held: Held) -> _Broadcast:
        wire, payload = self._wire, ask.payload_for(client)
        sent = sent_to(held, payload, wire.down, wire.seed, str(header["ask"]), self._start)
        about = {**header, "kind": ask.kind, "version": WIRE_VERSION, "since": sent.since}
        return _Broadcast(payload, sent.packed.received, _packed(sent.packed.data, about, wire.down.change), sent.held)

    def leave(self, ask_id: str, client: str) -> Pending:
        """Of an ask that may be answered after its round: what its answer is read with is kept by who waits for it."""
        _, came = self._asked[ask_id, client]
        return Pending(came, *self._coming.pop(client, (START, None)))

    def forget(self, client: str) -> None:
        """It is sent everything the next time."""
        self._versions.forget(client)

    def arrived(self, client: str, envelope: Envelope | None, pending: Pending | None = None) -> bool:
        """What a client's reply tells of what it has; whether it wants everything."""
        since, held = (pending.since, pending.held) if pending else self._coming.get(client, (START, None))
        if envelope is None or "failed" in envelope.header:  # it may be asked the same again, until the ask is settled
            self._versions.forget(client)
            return envelope is not None and since != START and envelope.header.get(RESEND) is True
        self._coming.pop(client, None)
        if held is not None:
            self._versions.arrived(client, held)
        return False

    def settle(self) -> None:
        """All answers to an ask have come; those that did not come are of clients of whom nothing is known."""
        for client in self._coming:
            self._versions.forget(client)
        self._coming, self._sent = {}, {}
        self._versions.settle()

    def answer(self, envelope: Envelope, client: ClientInfo, most: int, asked: tuple[Ask, Ask] | None = None) -> Answer:
        """Of at most so many numbers. `asked`: as meant, and as it came, of an ask of a round before. Raises ClientFailed with
        the client's reason, or MalformedMessage."""
        codec, header = self._wire.up.change, envelope.header
        meant, came = asked or self._asked.get((str(header.get("ask")), client.id), (NOTHING_ASKED, NOTHING_ASKED))
        if "failed" in header or not envelope.tensors or codec.plain:
            _require_plain(envelope, codec, most)
            answer = unpack_answer(envelope)
        else:
            require_version(header)
            key = _key(self._wire.seed, _word(header, "ask"), client.id)
            began, names = self._strategy.began(came, client), len(meant.tensors.get(client.id, ()))
            payload = unpack(_data(envelope, codec), self._wire.up, key, began, most, names)
            answer = answer_with(payload, header)
        if self._wire.down.exact:
            return answer
        return self.rebased(answer, client, came, meant)

    def rebased(self, answer: Answer, client: ClientInfo, asked: Ask, now: Ask) -> Answer:
        """What was answered to one ask, as an answer to another: what it changes is the same. In the memory of its tensors."""
        both = self._strategy.began(asked, client), self._strategy.began(now, client)
        return replace(answer, payload=_moved(answer.payload, *both))


class ClientEnd:
    """One client's, over its memory."""

    def __init__(
        self,
        wire: Wire,
        strategy: Strategy,
        memory: Memory,
        client: str,
        start: Callable[[], Payload],
        most: int,
        names: int = 0,
    ) -> None:
        """An ask has at most so many numbers, and names about so many tensors at the most."""
        self._wire, self._strategy, self._memory, self._client = wire, strategy, memory, client
        self._start, self._most, self._names = start, most, names

    def ask(self, envelope: Envelope) -> Ask:
        """Raises ClientFailed or MalformedMessage."""
        codec, header = self._wire.down.change, envelope.header
        if codec.plain or not envelope.tensors:
            _require_plain(envelope, codec, self._most)
            return unpack_ask(envelope)
        require_version(header)
        wire, since, ask_id = self._wire, _word(header, "since"), _word(header, "ask")
        own = self._memory, self._start(), self._most, self._names
        payload = received(_data(envelope, codec), since, wire.down, wire.seed, ask_id, *own)
        return Ask(str(header.get("kind")), payload)

    def answer(self, answer: Answer, ask: Ask, local: Ranks, header: Mapping[str, Any]) -> Envelope:
        """The answer to an ask as it came; `header` repeats its id and its round."""
        codec = self._wire.up.change
        if not answer.payload.tensors or codec.plain:
            return pack_answer(answer, header)
        key = _key(self._wire.seed, str(header["ask"]), self._client)
        errors = Feedback(self._memory, ask.kind, header, self._wire.decay) if self._wire.feedback else None
        packed = pack(answer.payload, self._wire.up, key, self._strategy.began(ask, local), errors=errors)
        about = {**header, "version": WIRE_VERSION, "weight": answer.weight, "metrics": dict(answer.metrics)}
        return _packed(packed.data, about, codec)


def _moved(payload: Payload, came: Payload, meant: Payload) -> Payload:
    """What began at `came`, as if it had begun at `meant`; in the memory of its tensors, which nobody else has."""

    def one(name: str, tensor: Tensor) -> Tensor:
        one, other = came.tensors.get(name), meant.tensors.get(name)
        alike = one is not None and other is not None and one.shape == other.shape == tensor.shape
        codable = alike and payload.roles[name] is not Role.VECTOR and tensor.dtype.is_floating_point
        return tensor.add_((other - one).to(tensor.dtype)) if codable and one is not None and other is not None else tensor

    return replace(payload, tensors={name: one(name, tensor) for name, tensor in payload.tensors.items()})


def _key(seed: int, ask_id: str, client: str) -> Key:
    """Each client's own, so that what they round averages out; and the one of all who are asked."""
    return seed_of(seed, ask_id, "up", client), seed_of(seed, ask_id, "up")


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
    _require_codec(envelope, codec)
    return envelope.tensors[0].data


def _word(header: Mapping[str, Any], name: str) -> str:
    """Raises MalformedMessage unless it can be hashed."""
    try:
        str(header.get(name)).encode()
    except UnicodeEncodeError as error:
        raise MalformedMessage(f"a message came whose '{name}' is no text") from error
    return str(header.get(name))


def _require_plain(envelope: Envelope, codec: Codec, most: int) -> None:
    """Tensors as they are: at most so many numbers."""
    total = sum(len(tensor.data) for tensor in envelope.tensors)
    if total > 8 * most:
        raise MalformedMessage(f"a message of {total} bytes came, wanted at most {8 * most}")
    if envelope.tensors and "codec" in envelope.header:  # a failure repeats the header of its ask
        _require_codec(envelope, codec)


def _require_codec(envelope: Envelope, codec: Codec) -> None:
    given = str(envelope.header.get("codec"))
    if given != codec.text:
        raise MalformedMessage(f"tensors came by codec {given[:80]!r}, this job's is '{codec.text}' (wire)")
