"""A Flower Grid that answers every message at once with what it was given, in the open or signed, sealed, twice, or by somebody
else: what the coordinator's exchange meets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflate_object_from_contents
from flwr.supercore.run import Run

from fedtune.envelope import Envelope
from fedtune.messages import HEADER, TENSORS, from_record, to_record
from fedtune.security.sealing import sealed
from fedtune.security.signing import ANSWER, STAMP, Stamp, signed
from server.fetching import Fetch
from server.post import OPEN, Post, SignedPost
from tests.fuzz.mutations import damaged, mutated
from tests.fuzz.recorded import CLIENTS

NODES = {client: number for number, client in enumerate(sorted(CLIENTS), 1)}
NAMES = {node: client for client, node in NODES.items()}
COORDINATOR, SEALING = Ed25519PrivateKey.from_private_bytes(b"c" * 32), X25519PrivateKey.from_private_bytes(b"s" * 32)
KEYS = {client: Ed25519PrivateKey.from_private_bytes(client.encode().ljust(32, b"k")) for client in CLIENTS}
STRANGER = Ed25519PrivateKey.from_private_bytes(b"x" * 32)
MODES = ("open", "open", "signed", "signed", "sealed", "changed after", "by another")
HEADERS = (
    *("", "[]", "{", "{}", "null", '"x"', "NaN", "[" * 5000, '{"a":' * 5000, '{"ask":1' + "0" * 5000 + "}"),
    *('{"failed":' + "[" * 2000 + "]" * 2000 + "}", '{"kind":"\\ud800"}', '{"a":1,"a":2}', "9" * 5000, "{" + " " * 10**6 + "}"),
)
NO_TEXT: tuple[Any, ...] = (1, 1.5, True, b"{}", [1, 2], ["{}"])
Reply = Callable[[int, Envelope], RecordDict]


class Postbox(Grid):
    """`reply`: node and ask -> what comes back; `twist` says as which messages."""

    def __init__(self) -> None:
        self.reply: Reply = lambda node, ask: RecordDict()
        self.twist: Callable[[Message], list[Message]] = lambda message: [message]
        self._waiting: list[Message] = []
        self._last = 0

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return Run.create_empty(run_id=1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self.message(content, 0, dst_node_id, "")

    def get_node_ids(self) -> list[int]:
        return list(NAMES)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        for message in messages:
            node = message.metadata.dst_node_id
            answer = self.reply(node, from_record(message.content))
            self._waiting += self.twist(self.message(answer, node, 0, message.metadata.message_id))
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        waiting, self._waiting = self._waiting, []
        return waiting

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def message(self, content: RecordDict | Error, src: int, dst: int, reply_to: str) -> Message:
        self._last += 1
        about: dict[str, Any] = {"run_id": 1, "message_id": str(self._last), "src_node_id": src, "dst_node_id": dst}
        about |= {"reply_to_message_id": reply_to, "group_id": "", "created_at": 1.8e9, "ttl": 60.0, "message_type": "query"}
        given = {"error": content} if isinstance(content, Error) else {"content": content}
        return Message(metadata=Metadata(**about), **given)

    def forget(self) -> None:
        self._waiting, self._last, self.twist = [], 0, lambda message: [message]


class Clock(SimpleNamespace):
    """In place of the module `time`: waiting takes none."""

    def __init__(self) -> None:
        super().__init__(now=0.0)

    def monotonic(self) -> float:
        return float(self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def replying(draw: Random, mode: str, answers: Mapping[str, Envelope], hostile: str = "") -> Reply:
    """Each client's as the mode says; who has no answer has failed, and all but the hostile one are honest."""

    def reply(node: int, ask: Envelope) -> RecordDict:
        client = NAMES[node]
        if client not in answers:
            return to_record(Envelope({"failed": "asleep", "client": client}))
        answer = answers[client] if mode == "open" else _signed(draw, mode, client, ask, answers[client])
        if client != hostile:
            return to_record(answer)
        return _record(draw, mutated(draw, answer) if mode == "changed after" else answer)

    return reply


def twisting(draw: Random, grid: Postbox) -> Callable[[Message], list[Message]]:
    """Now and then it comes twice, after one that answers nothing, or not at all."""
    what = draw.random()
    error = Error(
        code=draw.choice([code for code in vars(ErrorCode).values() if isinstance(code, int)]), reason="\x1b[2J" * 200
    )

    def twist(message: Message) -> list[Message]:
        about = message.metadata
        if what < 0.02:
            return [message, message]
        if what < 0.04:
            reply_to = draw.choice(("", "0", "999", "x" * 64))
            return [grid.message(message.content, about.src_node_id, 0, reply_to), message]
        if what < 0.05:
            return [grid.message(error, about.src_node_id, 0, about.reply_to_message_id), message]
        if what < 0.08:
            return [_fetched(draw, grid, message)]
        return [] if what < 0.082 else [message]

    return twist


def _fetched(draw: Random, grid: Postbox, message: Message) -> Message:
    """Of the parts in which Flower brings it, one is damaged."""
    parts = {id: found.deflate() for id, found in get_all_nested_objects(message).items()}
    name = draw.choice(sorted(parts))
    parts[name] = damaged(draw, parts[name])
    about = message.metadata
    try:
        fetch = Fetch(lambda ids: parts, inflate_object_from_contents)
        fetch.pull(list(parts))
        content: RecordDict | Error = fetch.inflate("", {}).content
    except (ObjectPullError, ValueError) as error:  # ValueError: it is a failure of the relay's
        content = Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason=str(error))
    return grid.message(content, about.src_node_id, 0, about.reply_to_message_id)


def post_for(mode: str, run: str) -> Post:
    if mode == "open":
        return OPEN
    keys = {client: key.public_key() for client, key in KEYS.items()}
    return SignedPost(COORDINATOR, SEALING, keys, run, end_to_end=mode == "sealed", owner=NAMES.get, clock=lambda: 10**18)


def _signed(draw: Random, mode: str, client: str, ask: Envelope, answer: Envelope) -> Envelope:
    asked = ask.header[STAMP]
    stamp = Stamp(asked["run"], asked["serial"], client, asked["seal"])
    if mode == "by another":
        stamp = replace(stamp, client=draw.choice([*CLIENTS, "zoe"]), serial=stamp.serial - draw.choice((0, 0, 1)))
    key = draw.choice([*KEYS.values(), STRANGER]) if mode == "by another" else KEYS[client]
    made = signed(answer, stamp, key, ANSWER)
    return sealed(made, stamp, SEALING.public_key()) if stamp.seal else made


def _record(draw: Random, envelope: Envelope) -> RecordDict:
    """As Flower carries it. What its own types refuse cannot come through it."""
    try:
        record = to_record(envelope)
    except (TypeError, ValueError, OverflowError):
        return to_record(Envelope({"failed": "Flower does not carry it"}))
    return RecordDict(odd(draw, record)) if draw.random() < 0.03 else record


def odd(draw: Random, record: RecordDict) -> dict[str, Any]:
    """Of another make."""
    header, arrays = record.config_records[HEADER], record.array_records[TENSORS]
    records: list[dict[str, Any]] = [
        {},
        {HEADER: ConfigRecord({"json": draw.choice(HEADERS)}), TENSORS: arrays},
        {HEADER: ConfigRecord({"json": draw.choice(NO_TEXT)}), TENSORS: arrays},
        {HEADER: ConfigRecord({}), TENSORS: ArrayRecord()},
        {HEADER: header},
        {HEADER: MetricRecord({"json": 1}), TENSORS: ConfigRecord({})},
    ]
    return draw.choice(records)
