"""What the fuzzer calls: bytes as the network could bring them, to both ends of the wire and to the parts inside that a
checksum or a compressor would hide from it.

    byte 0    which of MODES
    byte 1    which codec
    the rest  the message, or its part

Whatever they are, they are accepted or refused with an error of fedtune's own, within a second.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import zstandard

from fedtune.adapter import Adapter, Factors
from fedtune.envelope import WIRE_VERSION, Envelope, WireTensor
from fedtune.errors import ClientFailed, MalformedMessage
from fedtune.memory import Memory
from fedtune.payload import Payload, Role, payload_of
from fedtune.strategy import Answer, Ask, ClientInfo
from fedtune.wire.ends import PACKED, ClientEnd, ServerEnd
from fedtune.wire.packed import overhead, pack, unpack
from fedtune.wire.presets import Wire
from fedtune.wire.reader import Reader, as_bytes
from fedtune.wire.schema import Schema
from fedtune.wire.stage import Form, Kind
from fedtune.wire.streams import read
from fedtune.wire.versions import ABOUT, LENGTH
from strategies.fedavg import FedAvg
from tests.fedtune.wire.payloads import CODECS, near, small

CORPUS = Path(__file__).parent / "corpus"
NAMES = sorted(CODECS)
START = payload_of(Adapter({"q": Factors(torch.ones(4, 16), torch.zeros(24, 4), 1.5)}))
SENT = near(START)  # what is to be sent after the start
ANN = ClientInfo("ann", examples=2, rank=4)
MOST = 20_000  # numbers
SECONDS = 1.0
FORMS = (
    Form((500,), Kind.SYMBOLS, -7, 7),
    Form((500,), Kind.SYMBOLS, -1, 1),
    Form((500,), Kind.GAPS, 0, 10_000),
    Form((500,), Kind.WORDS, 0, 2**16 - 1),
    Form((500,), Kind.WORDS, 0, 2**32 - 1),
    Form((3,), Kind.SYMBOLS, -(2**31), 2**31 - 1),
    Form((0,), Kind.GAPS, 0, 5),
    Form((9,), Kind.WORDS, 4, 4),
)


def header(number: int = 1) -> dict[str, object]:
    return {"ask": f"{number}.0", "run": "tiny", "round": number, "base": "b"}


def envelope(data: bytes, codec: str, **more: object) -> Envelope:
    about = {**header(), "version": WIRE_VERSION, "kind": "train", "weight": 1.0, "metrics": {}, "codec": codec, **more}
    return Envelope(about, (WireTensor(PACKED, "uint8", (len(data),), PACKED, data),))


class Ends:
    """Both ends of one codec, after the first ask has come."""

    def __init__(self, name: str) -> None:
        self.both = CODECS[name]
        self.wire = Wire(self.both, self.both, feedback=False, decay=0.9, versions=4, seed=3)
        self.server, self.memory = ServerEnd(self.wire, FedAvg(), START), Memory()
        self.ask = self.server.ask(Ask("train", SENT), "ann", header())
        self.came = self.client(self.memory).ask(self.ask)
        self.answer = self.client(self.memory).answer(Answer(near(SENT, 1), 1.0), self.came, ANN, header())
        self.version = ""
        if not self.both.change.plain:
            self.server.arrived("ann", self.answer)
            self.again = self.server.ask(Ask("train", near(SENT, 2)), "ann", header())
            self.version = str(self.again.header["since"])

    def client(self, memory: Memory) -> ClientEnd:
        return ClientEnd(self.wire, FedAvg(), memory, "ann", lambda: START, MOST)


ENDS = {name: Ends(name) for name in NAMES}


def answer(data: bytes, name: str) -> None:
    ends = ENDS[name]
    ends.server.answer(envelope(data, ends.both.change.text), ANN, MOST)


def first_ask(data: bytes, name: str) -> None:
    ends = ENDS[name]
    ends.client(Memory()).ask(envelope(data, ends.both.change.text, since="start"))


def later_ask(data: bytes, name: str) -> None:
    ends = ENDS[name]
    ends.client(Memory(dict(ends.memory))).ask(envelope(data, ends.both.change.text, since=ends.version))


def unknown(data: bytes, name: str) -> None:
    """Of one who knows nothing."""
    unpack(data, CODECS[name], 3, most=MOST)


def written_schema(data: bytes, name: str) -> None:
    """Its text as it is, and streams: a line break stands between."""
    text, _, body = data.partition(b"\n")
    about = zstandard.ZstdCompressor(write_content_size=True).compress(text)
    unpack(b"\x01\x00" + as_bytes(len(about)) + about + body, CODECS[name], 3, small(), MOST)


def schema(data: bytes, name: str) -> None:
    Schema.from_bytes(data, 10)


def stream(data: bytes, name: str) -> None:
    """Which form: by the codec's place."""
    place = NAMES.index(name)
    read(data, FORMS[place % len(FORMS)], coded=place < 2 * len(FORMS))


def any_header(data: bytes, name: str) -> None:
    """A header as JSON, and a message: a line break stands between."""
    text, _, body = data.partition(b"\n")
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(given, dict):
        ends = ENDS[name]
        message = envelope(body, ends.both.change.text)
        _either(lambda: ends.server.answer(Envelope({**message.header, **given}, message.tensors), ANN, MOST))
        ends.client(Memory(dict(ends.memory))).ask(Envelope({**message.header, **given}, message.tensors))


def kept_memory(data: bytes, name: str) -> None:
    """What a client's file holds beside its tensors, behind the right version."""
    ends = ENDS[name]
    memory = Memory(dict(ends.memory))
    if ABOUT in memory:
        memory[ABOUT] = torch.frombuffer(bytearray(ends.version.encode() + data), dtype=torch.uint8)
    ends.client(memory).ask(getattr(ends, "again", ends.ask))


MODES: tuple[Callable[[bytes, str], None], ...] = (
    answer, first_ask, later_ask, unknown, written_schema, schema, stream, any_header, kept_memory,
)  # fmt: skip


def tried(data: bytes) -> bool:
    """Whether it was accepted. Raises where it was neither accepted nor refused, or took too long."""
    if len(data) < 2:
        return False
    mode, name = MODES[data[0] % len(MODES)], NAMES[data[1] % len(NAMES)]
    began = time.process_time()
    accepted = _either(lambda: mode(data[2:], name))
    seconds = time.process_time() - began
    assert seconds < SECONDS, f"{mode.__name__} took {seconds:.1f} s with {name}"
    return accepted


def _either(decode: Callable[[], object]) -> bool:
    try:
        decode()
    except (MalformedMessage, ClientFailed):
        return False
    return True


def corpus() -> Iterator[tuple[str, bytes]]:
    """Messages that are accepted, one of each kind and codec, each with a name."""
    for place, name in enumerate(NAMES):
        own, ends = name.split("|")[0].partition("(")[0].strip(), ENDS[name]
        if ends.both.change.plain:
            continue
        yield f"answer-{place}-{own}", bytes([MODES.index(answer), place]) + ends.answer.tensors[0].data
        yield f"first-{place}-{own}", bytes([MODES.index(first_ask), place]) + ends.ask.tensors[0].data
        yield f"later-{place}-{own}", bytes([MODES.index(later_ask), place]) + ends.again.tensors[0].data
    yield from _parts(NAMES.index("balanced"))


def _parts(place: int) -> Iterator[tuple[str, bytes]]:
    ends = ENDS[NAMES[place]]
    about = Schema.from_bytes(_unusual(place))
    yield "unknown", bytes([MODES.index(unknown), place]) + _nothing_known(place)
    yield "schema", bytes([MODES.index(schema), place]) + _unusual(place)
    rest = Reader(_nothing_known(place))
    rest.take(overhead(_nothing_known(place)))
    yield "text", bytes([MODES.index(written_schema), place]) + about.as_text().encode() + b"\n" + bytes(rest.take(rest.left))
    yield "header", bytes([MODES.index(any_header), place]) + b'{"since":"start"}\n' + ends.ask.tensors[0].data
    yield "memory", bytes([MODES.index(kept_memory), place]) + ends.memory[ABOUT].numpy().tobytes()[LENGTH:]


def _nothing_known(place: int) -> bytes:
    only = Payload({"x": torch.linspace(-1, 1, 40).reshape(8, 5)}, {"x": Role.A}, {"y": 0.5})
    return pack(only, CODECS[NAMES[place]], 3).data


def _unusual(place: int) -> bytes:
    """A schema alone."""
    rest = Reader(_nothing_known(place))
    rest.take(2)
    return bytes(rest.take(rest.number()))
