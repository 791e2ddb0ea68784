"""Asks go out signed; what comes back counts only from the client whose node it is, sealed, to the ask that is open."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from client.signed import Signed
from fedtune.envelope import Envelope, WireTensor
from fedtune.errors import ClientFailed, Refused
from fedtune.security.sealing import sealed
from fedtune.security.signing import ANSWER, ASK, SIGNATURE, STAMP, Stamp, digest, signed, verified
from server.meeting import wants_hello
from server.post import LONGEST_REASON, SignedPost

SIGNING, SEALING = Ed25519PrivateKey.generate(), X25519PrivateKey.generate()
CLIENTS = {name: Ed25519PrivateKey.generate() for name in ("north", "south")}
NORTH, SOUTH = 11, 22  # nodes of the grid


def make_post(end_to_end: bool = True, clock: Callable[[], int] = lambda: 100) -> SignedPost:
    keys = {name: key.public_key() for name, key in CLIENTS.items()}
    revoked = {"west": "2026-01-02"}
    return SignedPost(SIGNING, SEALING, keys, "run.1", end_to_end=end_to_end, revoked=revoked, clock=clock)


@pytest.fixture
def post() -> SignedPost:
    """Both clients have introduced themselves."""
    post = make_post()
    for node, name in ((NORTH, "north"), (SOUTH, "south")):
        post.back(node, answer(asked(post, node, "hello"), name))
    return post


def asked(post: SignedPost, node: int, id: str = "1.0", again: bool = False) -> Stamp:
    _, stamp = verified(post.out(node, Envelope({"ask": id}), again), SIGNING.public_key(), ASK)
    return stamp


def plain(client: str, **header: object) -> Envelope:
    return Envelope({"client": client, "ask": "1.0", **header}, (WireTensor("w", "uint8", (1,), "raw", b"u"),))


def answer(stamp: Stamp, client: str, key: str | None = None, says: str | None = None) -> Envelope:
    """Of an honest trainer, unless the test says otherwise."""
    own = Stamp(stamp.run, stamp.serial, client, stamp.seal)
    message = signed(plain(says or client), own, CLIENTS[key or client], ANSWER)
    return sealed(message, own, SEALING.public_key()) if stamp.seal else message


def test_serials_grow_though_the_clock_stands_still_and_follow_it() -> None:
    times = iter([100, 100, 50, 900])
    post = make_post(clock=lambda: next(times))
    assert [asked(post, NORTH).serial for _ in range(4)] == [100, 101, 102, 900]


def test_a_coordinator_that_comes_back_with_its_clock_behind_is_heard(tmp_path: Path) -> None:
    """Its client takes no ask that is not newer than the last one."""
    keys = SimpleNamespace(name="north", verify=SIGNING.public_key(), seal=SEALING.public_key(), signing=CLIENTS["north"])
    inner = SimpleNamespace(answer=lambda ask: Envelope({"client": "north", "kind": ask.header["kind"]}))
    trainer, known = Signed(inner, keys, tmp_path), {"north": CLIENTS["north"].public_key()}
    for behind, kind in ((0, "hello"), (300 * 10**9, "train")):
        clock = lambda behind=behind: time.time_ns() - behind  # noqa: E731
        post = SignedPost(SIGNING, SEALING, known, "run.1", end_to_end=True, clock=clock, serials=tmp_path / "serial")
        answer = post.back(NORTH, trainer.answer(post.out(NORTH, Envelope({"kind": kind, "ask": kind}))))
        assert answer.header == {"client": "north", "kind": kind}


def test_a_trainer_that_heard_another_run_says_so_under_its_signature(tmp_path: Path) -> None:
    """Nobody else can make the coordinator say hello; after it the client is in the run again."""
    keys = SimpleNamespace(name="north", verify=SIGNING.public_key(), seal=SEALING.public_key(), signing=CLIENTS["north"])
    trainer = Signed(SimpleNamespace(answer=lambda ask: plain("north")), keys, tmp_path)
    known, again = {"north": CLIENTS["north"].public_key()}, tmp_path / "serial"
    posts = {run: SignedPost(SIGNING, SEALING, known, run, end_to_end=True, serials=again) for run in ("a", "b")}

    def told(run: str, kind: str) -> Envelope:
        return posts[run].back(NORTH, trainer.answer(posts[run].out(NORTH, Envelope({"kind": kind, "ask": kind}))))

    said = [wants_hello(told(*ask)) for ask in (("a", "hello"), ("b", "hello"))]
    posts["a"] = SignedPost(SIGNING, SEALING, known, "a", end_to_end=True, serials=again)  # the run goes on
    assert [*said, *(wants_hello(told("a", kind)) for kind in ("train", "hello", "train"))] == [
        False,
        False,
        True,
        False,
        False,
    ]


def test_an_ask_names_its_client_once_it_is_known(post: SignedPost) -> None:
    assert asked(make_post(), NORTH).client == ""
    assert (asked(post, NORTH).client, asked(post, SOUTH).client) == ("north", "south")


def test_an_answer_comes_back_as_the_trainer_made_it(post: SignedPost) -> None:
    assert post.back(NORTH, answer(asked(post, NORTH), "north")) == plain("north")


def test_without_end_to_end_it_must_be_signed_all_the_same() -> None:
    post = make_post(end_to_end=False)
    stamp = asked(post, NORTH)
    assert post.back(NORTH, answer(stamp, "north")) == plain("north")
    with pytest.raises(Refused, match="not signed"):
        post.back(NORTH, plain("north"))


def test_an_answer_from_another_node_s_id_is_refused(post: SignedPost) -> None:
    stamp = asked(post, SOUTH)
    with pytest.raises(Refused, match="comes from the node of 'south' and says that it is of 'north'"):
        post.back(SOUTH, answer(stamp, "north"))  # even with north's own key


def test_a_node_answers_for_the_client_whose_node_key_it_has() -> None:
    """From the first word on: who has south's node and north's signing key is neither."""
    keys = {name: key.public_key() for name, key in CLIENTS.items()}
    owners = {NORTH: "north", SOUTH: "south"}
    post = SignedPost(SIGNING, SEALING, keys, "run.1", end_to_end=True, owner=owners.get, clock=lambda: 100)
    hello = asked(post, SOUTH, "hello")
    assert hello.client == "south"
    with pytest.raises(Refused, match="comes from the node of 'south' and says that it is of 'north'"):
        post.back(SOUTH, answer(hello, "north"))


def test_nobody_answers_in_the_name_of_another(post: SignedPost) -> None:
    stamp = asked(post, NORTH)
    with pytest.raises(Refused, match="another key made it"):
        post.back(NORTH, answer(stamp, "north", key="south"))
    with pytest.raises(Refused, match="'north' signed it, and it says that it is of 'south'"):
        post.back(NORTH, answer(stamp, "north", says="south"))


def test_the_answer_of_another_does_not_open_as_one_s_own(post: SignedPost) -> None:
    """Who copies what another client sealed can neither read it nor pass it off."""
    of_north = answer(asked(post, NORTH), "north")
    asked(post, SOUTH)
    stolen = Envelope({**of_north.header, "client": "south"}, of_north.tensors)
    with pytest.raises(Refused, match="cannot be opened"):
        post.back(SOUTH, stolen)


def test_an_old_answer_is_refused_as_the_answer_to_a_new_ask(post: SignedPost) -> None:
    old = answer(asked(post, NORTH), "north")
    asked(post, NORTH)
    with pytest.raises(Refused, match="cannot be opened"):
        post.back(NORTH, old)
    open_post = make_post(end_to_end=False)
    old = answer(asked(open_post, NORTH), "north")
    asked(open_post, NORTH)
    with pytest.raises(Refused, match="an old one was sent again"):
        open_post.back(NORTH, old)


@pytest.mark.parametrize("end_to_end", [True, False])
def test_an_answer_to_any_sending_of_the_open_ask_is_taken_and_of_the_ask_before_it_none(end_to_end: bool) -> None:
    post = make_post(end_to_end=end_to_end)
    before = answer(asked(post, NORTH, "1.0"), "north")
    stamps = [asked(post, NORTH, "1.1"), asked(post, NORTH, "1.1", again=True), asked(post, NORTH, "1.1", again=True)]
    assert len({stamp.serial for stamp in stamps}) == 3
    for stamp in stamps:
        assert post.back(NORTH, answer(stamp, "north")) == plain("north")
    with pytest.raises(Refused):
        post.back(NORTH, before)
    asked(post, NORTH, "1.2")
    for stamp in stamps:
        with pytest.raises(Refused):
            post.back(NORTH, answer(stamp, "north"))


def test_what_is_sealed_for_one_sending_does_not_pass_as_sealed_for_another(post: SignedPost) -> None:
    first, second = asked(post, NORTH), asked(post, NORTH, again=True)
    moved = answer(first, "north")
    with pytest.raises(Refused, match="cannot be opened"):
        post.back(NORTH, Envelope({**moved.header, "serial": second.serial}, moved.tensors))


def test_what_is_not_sealed_is_refused_where_the_job_wants_it(post: SignedPost) -> None:
    stamp = asked(post, NORTH)
    readable = signed(plain("north"), Stamp(stamp.run, stamp.serial, "north", True), CLIENTS["north"], ANSWER)
    with pytest.raises(Refused, match="end_to_end"):
        post.back(NORTH, readable)


def test_a_tampered_answer_is_refused(post: SignedPost) -> None:
    stamp = asked(post, NORTH)
    good = answer(stamp, "north")
    touched = bytes([good.tensors[0].data[0] ^ 1]) + good.tensors[0].data[1:]
    [tensor] = good.tensors
    with pytest.raises(Refused, match="changed on its way"):
        post.back(NORTH, Envelope(good.header, (WireTensor(tensor.name, tensor.dtype, tensor.shape, tensor.stype, touched),)))


def test_unknown_and_revoked_clients_hear_what_to_do() -> None:
    post = make_post()
    stamp = asked(post, NORTH)
    of = lambda name: Envelope({**answer(stamp, "north").header, "client": name}, answer(stamp, "north").tensors)  # noqa: E731
    with pytest.raises(Refused, match="no client 'east' is registered; on the coordinator: fedtune keys client"):
        post.back(NORTH, of("east"))
    with pytest.raises(Refused, match="'west' was revoked on 2026-01-02; give it new keys: fedtune keys rotate client west"):
        post.back(NORTH, of("west"))


def test_an_unsigned_failure_is_a_reason_and_no_more(post: SignedPost) -> None:
    """A relay whose trainer is away, or a trainer that does not trust this coordinator: the words help, and prove nothing."""
    asked(post, NORTH)
    with pytest.raises(ClientFailed, match=r"no trainer answers \(said by its relay, unsigned\)"):
        post.back(NORTH, Envelope({"failed": "no trainer answers", "client": "south", "resend": True}))
    with pytest.raises(ClientFailed) as failed:
        post.back(NORTH, Envelope({"failed": "x" * 10**6}))
    assert len(str(failed.value)) < LONGEST_REASON + 50


@pytest.mark.parametrize(
    "header", [{}, {STAMP: 3}, {STAMP: {}}, {STAMP: {"client": "north"}, SIGNATURE: 5}, {"client": ["north"]}]
)
def test_headers_from_anywhere_are_refused(post: SignedPost, header: dict[str, object]) -> None:
    asked(post, NORTH)
    with pytest.raises(Refused):
        post.back(NORTH, Envelope(header))
    with pytest.raises(Refused):
        post.back(NORTH, Envelope(header, (WireTensor("s", "uint8", (1,), "fedtune.sealed", b"u"),)))


def sealed_row(row: bytes) -> Callable[[Stamp], Envelope]:
    """Who has any bundle has the coordinator's public key, and can seal what he likes."""

    def make(stamp: Stamp) -> Envelope:
        place = Stamp(stamp.run, stamp.serial, "north", True)
        return sealed(Row(row), place, SEALING.public_key())

    return make


class Row(Envelope):
    """Bytes in place of an envelope's."""

    def __init__(self, row: bytes) -> None:
        super().__init__({})
        object.__setattr__(self, "row", row)

    def pieces(self) -> Iterator[bytes]:
        yield self.row


def tensor_of(size: object) -> bytes:
    tensor = {"name": "a", "dtype": "f", "shape": [1], "stype": "x", "size": size}
    return json.dumps({"header": {}, "tensors": [tensor]}).encode() + b"\n"


@pytest.mark.parametrize(
    "row",
    [
        *(tensor_of(size) for size in (10**30, -1, 1.5, "1", None, 2**62)),
        b'{"header":{"x":' + b"[" * 990 + b"]" * 990 + b'},"tensors":[]}\n',
        b'{"header":[],"tensors":[]}\n',
        b'{"header":{},"tensors":[[]]}\n',
        b'{"header":{},"tensors":7}\n',
        b"\xff\n",
        b"",
    ],
)
def test_what_strangers_seal_is_refused_and_ends_nothing(row: bytes) -> None:
    post = make_post()
    stamp = asked(post, NORTH)
    with pytest.raises(Refused):
        post.back(NORTH, sealed_row(row)(stamp))


@pytest.mark.parametrize("serial", [float("inf"), float("nan"), 10**400, [], {}, None])
def test_a_stamp_that_a_client_signed_is_not_believed_unseen(serial: object) -> None:
    post = make_post(end_to_end=False)
    stamp = asked(post, NORTH)
    header = {
        "client": "north",
        STAMP: {**vars(Stamp(stamp.run, 0, "north")), "serial": serial, "digest": digest(Envelope({}))},
    }
    signature = CLIENTS["north"].sign(ANSWER + Envelope(header).header_json().encode())
    with pytest.raises(Refused):
        post.back(NORTH, Envelope({**header, SIGNATURE: base64.b64encode(signature).decode()}))
