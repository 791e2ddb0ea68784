"""The relay and the trainer's server: what goes in at the node comes out at the trainer, and every trouble is an answer."""

from __future__ import annotations

import logging
import os
import socket as sockets
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flwr.app import Context, Message, Metadata, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from client import transport
from client.app import SOCKET, app
from client.resident import Resident
from client.service import INNER, serve
from client.transport import POLL, REPEATS, SAY, await_listener, carry, failure, from_proto, to_proto
from fedtune.envelope import Envelope, WireTensor
from fedtune.errors import ClientFailed, JobError, MalformedMessage, UserError
from fedtune.messages import from_record, to_record
from fedtune.paths import app_root
from fedtune.wire import pack_failure, unpack_answer

ASK = Envelope({"kind": "train", "ask": "r1-0", "run": "7"}, (WireTensor("w", "bfloat16", (2, 1), "fedtune.raw", b"\0\1\2\3"),))


@pytest.fixture
def socket() -> Iterator[Path]:
    """In a short folder: pytest's own can be longer than a socket's path may be."""
    with tempfile.TemporaryDirectory(prefix="ft") as folder:
        yield Path(folder) / "t.sock"


@contextmanager
def served(answer: Callable[[Envelope], Envelope], socket: Path) -> Iterator[None]:
    server = serve(answer, socket)
    try:
        yield
    finally:
        server.stop(grace=None).wait()


def through_flower(record: RecordDict, node_config: dict[str, str]) -> Envelope:
    """One message as the SuperNode hands it to the ClientApp, and the answer that goes back."""
    metadata = Metadata(1, "m1", 0, 5, "", "", 0.0, 60.0, "query")
    context = Context(run_id=1, node_id=5, node_config=node_config, state=RecordDict(), run_config={})
    return from_record(app(Message(metadata=metadata, content=record), context).content)


names = st.text(max_size=5)
tensors = st.builds(
    WireTensor, names, names, st.lists(st.integers(0, 2**40), max_size=4).map(tuple), names, st.binary(max_size=20)
)
headers = st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text(max_size=5), max_size=4)


@given(st.builds(Envelope, headers, st.lists(tensors, max_size=3).map(tuple)))
def test_an_envelope_survives_the_socket_s_format(envelope: Envelope) -> None:
    assert from_proto(to_proto(envelope)) == envelope


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_header_that_is_no_object_is_malformed(text: str) -> None:
    message = to_proto(Envelope({}))
    message.header_json = text
    with pytest.raises(MalformedMessage, match="header"):
        from_proto(message)


def test_what_the_trainer_gets_and_gives_is_what_was_sent(socket: Path) -> None:
    seen = []

    def answer(ask: Envelope) -> Envelope:
        seen.append(ask)
        return Envelope({"client": "a"}, ask.tensors)

    with served(answer, socket):
        got = through_flower(to_record(ASK), {SOCKET: str(socket)})
    assert seen == [ASK]
    assert got == Envelope({"client": "a"}, ASK.tensors)


def test_messages_larger_than_grpc_s_usual_4_mb_pass(socket: Path) -> None:
    large = Envelope({}, (WireTensor("w", "uint8", (5 << 20,), "fedtune.raw", bytes(5 << 20)),))
    with served(lambda ask: ask, socket):
        assert carry(large, socket) == large


def test_an_ask_loses_no_time_on_the_way(socket: Path) -> None:
    """gRPC's own question whether a channel is ready takes 0.2 s; the quickest of some, for the machine may be at work."""
    seconds = []
    with served(lambda ask: ask, socket):
        for _ in range(10):
            began = time.monotonic()
            carry(ASK, socket)
            seconds.append(time.monotonic() - began)
    assert min(seconds) < 0.1


def test_only_the_owner_can_reach_the_trainer(socket: Path) -> None:
    with served(lambda ask: ask, socket):
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600


def test_two_asks_at_once_are_answered_one_after_the_other(socket: Path) -> None:
    busy, overlapped = threading.Lock(), []

    def answer(ask: Envelope) -> Envelope:
        overlapped.append(not busy.acquire(blocking=False))
        threading.Event().wait(0.05)
        busy.release()
        return ask

    with served(answer, socket):
        both = [threading.Thread(target=carry, args=(ASK, socket)) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
    assert overlapped == [False, False]


def test_a_second_trainer_on_the_same_socket_is_refused_and_the_first_works_on(socket: Path) -> None:
    with served(lambda ask: ask, socket):
        with pytest.raises(UserError, match="already listens"):
            serve(lambda ask: ask, socket)
        assert carry(ASK, socket) == ASK


def test_a_socket_that_a_killed_trainer_left_is_replaced(socket: Path) -> None:
    code = "import os, sys; from client.service import serve; serve(None, sys.argv[1]); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, socket], cwd=app_root(), check=False).returncode == 9
    assert socket.exists()
    with served(lambda ask: ask, socket):
        assert carry(ASK, socket) == ASK


def test_folders_that_killed_trainers_left_go_when_the_next_starts_and_others_stay(
    socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(socket.parent))
    folders = {name: socket.parent / f"fedtune-{name}" for name in ("killed", "listens", "young", "empty")}
    for folder in folders.values():
        folder.mkdir()
    ends = [sockets.socket(sockets.AF_UNIX) for _ in range(3)]
    for end, name in zip(ends, folders, strict=False):
        end.bind(str(folders[name] / INNER))
    ends[1].listen()
    for name in ("killed", "listens"):
        os.utime(folders[name] / INNER, times=(0, 0))
    for end in (ends[0], ends[2]):
        end.close()
    with served(lambda ask: ask, socket):
        assert {name for name, folder in folders.items() if folder.exists()} == {"listens", "young", "empty"}
    ends[1].close()


def test_a_folder_that_is_not_there_is_a_user_s_mistake(socket: Path) -> None:
    with pytest.raises(UserError, match="cannot listen"):
        serve(lambda ask: ask, socket.parent / "no" / "t.sock")


def test_a_path_too_long_for_the_kernel_is_said_before_it_is_tried(socket: Path) -> None:
    with pytest.raises(UserError, match="at most 107"):
        serve(lambda ask: ask, socket.parent / ("x" * 110))


def test_without_a_trainer_the_answer_says_which_socket_and_what_to_start(
    socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "PATIENCE", 0.05)
    got = through_flower(to_record(ASK), {SOCKET: str(socket)})
    with pytest.raises(ClientFailed, match=rf"{socket}.*python -m client.trainer_main"):
        unpack_answer(got)
    assert got.header["ask"] == "r1-0"


def test_a_node_without_a_socket_in_its_config_says_so() -> None:
    with pytest.raises(ClientFailed, match="--node-config"):
        unpack_answer(through_flower(to_record(ASK), {}))


def test_a_message_that_is_not_ours_is_answered_with_the_reason() -> None:
    with pytest.raises(ClientFailed, match="without a fedtune header"):
        unpack_answer(through_flower(RecordDict(), {SOCKET: "/nowhere"}))


def test_a_trainer_that_raises_answers_with_the_reason_and_stays(socket: Path) -> None:
    def answer(ask: Envelope) -> Envelope:
        if ask.header["ask"] == "bad":
            raise KeyError("no such layer")
        return ask

    with served(answer, socket):
        with pytest.raises(ClientFailed, match="KeyError: 'no such layer'"):
            unpack_answer(carry(Envelope({"ask": "bad"}), socket))
        assert carry(ASK, socket) == ASK


DIES = """
import os, sys
from pathlib import Path
from client.service import serve
def answer(ask):
    died = Path(sys.argv[1]).with_name("died")
    times = len(died.read_text()) if died.exists() else 0
    if times < int(sys.argv[2]):
        died.write_text("x" * (times + 1))
        os._exit(9)
    return ask
serve(answer, sys.argv[1]).wait_for_termination()
"""


@contextmanager
def kept_alive(socket: Path, deaths: int) -> Iterator[None]:
    """A trainer that dies over its first asks, started again each time as its supervisor does."""
    over = threading.Event()

    def keep() -> None:
        while not over.is_set():
            command = [sys.executable, "-c", DIES, str(socket), str(deaths)]
            with subprocess.Popen(command, cwd=app_root(), stderr=subprocess.DEVNULL) as process:
                while process.poll() is None and not over.wait(0.01):
                    pass
                process.kill()

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()


def test_an_ask_over_which_a_trainer_died_is_brought_again_when_one_listens(
    socket: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with kept_alive(socket, deaths=REPEATS), caplog.at_level(logging.WARNING, "fedtune.relay"):
        assert carry(ASK, socket, patience=60) == ASK
    assert caplog.text.count("lost while it worked") == REPEATS


def test_an_ask_over_which_trainers_die_is_given_up(socket: Path) -> None:
    with kept_alive(socket, deaths=99), pytest.raises(ClientFailed, match="lost while it worked"):
        carry(ASK, socket, patience=60)
    assert len(socket.with_name("died").read_text()) == 1 + REPEATS


def test_while_no_trainer_listens_the_log_says_so_now_and_then_and_at_last_it_is_enough(
    socket: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with caplog.at_level(logging.WARNING, "fedtune.relay"), pytest.raises(ClientFailed, match="no trainer answers"):
        await_listener(socket, 35.0, sleep, lambda: now[0])
    assert now[0] == pytest.approx(35.0, abs=2 * POLL)
    assert len(caplog.records) == 35 // SAY


def test_a_failure_made_without_torch_has_the_header_of_one_made_with_it() -> None:
    ours, theirs = failure("no data", ASK.header), pack_failure("no data", ASK.header)
    assert ours == theirs


def test_a_failure_does_not_send_the_job_and_the_payload_s_roles_back() -> None:
    got = failure("why", {"ask": "1", "job": {"seed": 1}, "roles": {"w": "dense"}, "scalars": {"s": 1.0}})
    assert got.header == {"ask": "1", "failed": "why", "version": 1, "roles": {}, "scalars": {}}


def test_the_relay_imports_neither_torch_nor_transformers() -> None:
    """Flower starts it anew for every message: torch alone would cost more than a small round."""
    code = "import sys, client.app; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=app_root(), check=True, capture_output=True, text=True)
    assert "flwr" in loaded.stdout.split()
    assert not {"torch", "transformers", "peft", "datasets"} & set(loaded.stdout.split())


class Fake:
    """A trainer that says which job it was made for."""

    def __init__(self, job: dict[str, int]) -> None:
        if job["seed"] < 0:
            raise JobError("a negative seed")
        self.seed, self.asked = job["seed"], 0

    def answer(self, ask: Envelope) -> Envelope:
        self.asked += 1
        return Envelope({"seed": self.seed, "asked": self.asked})


def hello(seed: int) -> Envelope:
    return Envelope({"kind": "hello", "run": "7", "job": {"seed": seed}})


def test_an_ask_before_any_hello_is_refused_with_words() -> None:
    with pytest.raises(ClientFailed, match="has no job"):
        unpack_answer(Resident(Fake).answer(ASK))


def test_the_trainer_stays_between_asks_and_hellos_of_the_same_job() -> None:
    resident = Resident(Fake)
    asked = [resident.answer(ask).header["asked"] for ask in (hello(3), ASK, hello(3), ASK)]
    assert asked == [1, 2, 3, 4]


def test_another_job_brings_another_trainer() -> None:
    resident = Resident(Fake)
    resident.answer(hello(3))
    resident.answer(hello(4))
    assert resident.answer(ASK).header["seed"] == 4


def test_a_job_that_cannot_be_prepared_is_refused_and_the_old_trainer_does_not_answer_for_it() -> None:
    resident = Resident(Fake)
    resident.answer(hello(3))
    with pytest.raises(ClientFailed, match="a negative seed"):
        unpack_answer(resident.answer(hello(-1)))
    with pytest.raises(ClientFailed, match="has no job"):
        unpack_answer(resident.answer(ASK))
    assert resident.answer(hello(3)).header["seed"] == 3


def test_a_hello_without_a_job_is_refused() -> None:
    with pytest.raises(ClientFailed, match="without a job"):
        unpack_answer(Resident(Fake).answer(Envelope({"kind": "hello"})))
