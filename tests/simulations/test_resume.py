"""A simulation that is killed at any step of its journal and taken up again ends as if nothing had happened."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.local import Local
from client.trainer import Trainer
from fedtune.envelope import Envelope
from fedtune.errors import RoundFailed, RunFolderError
from fedtune.job import Job
from fedtune.wire import pack_failure
from fedtune.wire.ends import outdated
from fedtune.wire.versions import START
from server import lock
from server.coordinator import RunResult
from server.journal import Entry, Journal, line_of, read
from server.watchers import Quiet
from simulations.engine import simulate

MakeJob = Callable[..., Job]
SMALL = ("rounds.count=2", "train.steps=1", "clients.names=['ann', 'bob']")
# What the error of a codec, a client's variates, or the versions of the broadcast would show.
BALANCED, SCAFFOLD = (
    ("wire.preset=balanced",),
    ("strategy.name=scaffold", "train.optimizer=sgd", "train.clip=0", "wire.preset=lossless"),
)


def played(job: Job, folder: Path) -> RunResult:
    return simulate(job, folder, Quiet(), resume=True)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def lines(folder: Path) -> list[Entry]:
    return read(folder / "journal.jsonl")[0]


def losses(folder: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(record["round"], record["loss"]) for record in records]


def killed(work: Callable[[], object], step: int) -> bool:
    """In a process of its own, by SIGKILL, right after the journal's line of that number; whether it came so far."""
    child = os.fork()
    if child == 0:
        write, written = Journal.write, [0]

        def and_die(self: Journal, what: str, **about: object) -> None:
            write(self, what, **about)
            written[0] += 1
            if written[0] > step:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.write = and_die  # type: ignore[method-assign,assignment]
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Who answered what ask, in the order in which they did."""
    answer, asked = Trainer.answer, list[tuple[str, str]]()

    def seen(self: Trainer, envelope: Envelope, client: str | None = None) -> Envelope:
        asked.append((str(client), str(envelope.header["ask"])))
        return answer(self, envelope, client)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "answer", seen)
        yield asked


def test_killed_after_every_line_of_the_journal_it_ends_with_the_same_bits(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(*SMALL, *BALANCED)
    whole = played(job, tmp_path / "whole")
    steps = len(lines(tmp_path / "whole"))
    assert steps > 20
    for step in range(0, steps, 1 if os.environ.get("FEDTUNE_SLOW") else 6):
        folder = tmp_path / str(step)
        assert killed(lambda folder=folder: played(job, folder), step)  # type: ignore[misc]
        result = played(job, folder)
        assert digest(folder) == digest(whole.folder), step
        assert dict(losses(folder)) == dict(losses(whole.folder)), step
        assert [record.round for record in result.records] == [0, 1, 2]
        assert not (folder / "spool").exists()
        shutil.rmtree(folder)


def test_killed_again_and_again_one_run_comes_to_its_end_all_the_same(make_job: MakeJob, tmp_path: Path) -> None:
    """Each life writes six lines; up to four of them say that it was taken up, and what it does again."""
    job = make_job(*SMALL, *SCAFFOLD)
    whole = played(job, tmp_path / "whole")
    lives = 1
    while killed(lambda: played(job, tmp_path / "run"), 5):
        lives += 1
    assert 5 < lives < 30
    assert digest(tmp_path / "run") == digest(whole.folder)


def test_what_was_spooled_is_not_asked_for_again(make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after ann's answer to 1.0: bob alone is asked for it."""
    job, folder = make_job(*SMALL), tmp_path / "run"
    whole = played(job, tmp_path / "whole")
    told = [(entry.what, entry.about.get("ask")) for entry in lines(whole.folder)]
    assert killed(lambda: played(job, folder), told.index(("answered", "1.0")))
    with counted(monkeypatch) as asked:
        played(job, folder)
    assert asked[0] == ("bob", "1.0")
    assert ("ann", "1.0") not in asked
    assert digest(folder) == digest(whole.folder)


@pytest.mark.parametrize("what", ["spool", "tensors.safetensors", "checkpoint.json", "journal", "no journal"])
def test_damaged_files_cost_time_and_nothing_else(what: str, make_job: MakeJob, tmp_path: Path) -> None:
    """Killed in round 2, when both have answered; then a file is damaged."""
    job, folder = make_job(*SMALL, *BALANCED), tmp_path / "run"
    whole = played(job, tmp_path / "whole")
    told = [(entry.what, entry.about.get("ask")) for entry in lines(whole.folder)]
    assert killed(lambda: played(job, folder), told.index(("closed", "2.0")))
    if what == "spool":
        for path in folder.rglob("*.answer"):
            path.write_bytes(path.read_bytes()[:-7])
    elif what == "journal":
        data = (folder / "journal.jsonl").read_bytes()
        (folder / "journal.jsonl").write_bytes(data[: len(data) // 2])
    elif what == "no journal":
        (folder / "journal.jsonl").unlink()
    else:
        path = folder / "state" / "0001" / what
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    played(job, folder)
    assert digest(folder) == digest(whole.folder)


def test_a_run_that_has_come_far_is_not_begun_anew_in_silence(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(*SMALL)
    told = [(entry.what, entry.about.get("ask")) for entry in lines(played(job, tmp_path / "whole").folder)]
    folder = tmp_path / "run"
    assert killed(lambda: played(job, folder), told.index(("closed", "2.0")))
    (folder / "state").rename(folder / "elsewhere")
    with pytest.raises(RunFolderError, match=r"had come to round 1, and no checkpoint of it can be read \(none is there\)"):
        played(job, folder)
    (folder / "elsewhere").rename(folder / "state")
    played(job, folder)
    assert digest(folder) == digest(tmp_path / "whole")


def test_a_client_that_was_sent_everything_is_known_to_have_it_after_a_crash(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ann says once, of 2.0, that her version is another: she is sent all of it, and of 2.evaluate a difference again. Killed
    when she has answered that."""
    job, answer = make_job(*SMALL, *BALANCED, "rounds.count=3"), Trainer.answer

    def once(self: Trainer, envelope: Envelope, client: str | None = None) -> Envelope:
        header = envelope.header
        if (client, header["ask"]) == ("ann", "2.0") and header["since"] != START:
            return outdated(pack_failure("outdated", {key: header[key] for key in ("ask", "run", "round")}))
        return answer(self, envelope, client)

    monkeypatch.setattr(Trainer, "answer", once)
    whole = played(job, tmp_path / "whole")
    told = lines(whole.folder)
    assert [entry["ask"] for entry in told if entry.about.get("whole")] == ["2.0"]
    at = [(entry.what, entry.about.get("ask"), entry.about.get("client")) for entry in told]
    assert killed(lambda: played(job, tmp_path / "run"), at.index(("answered", "2.evaluate", "ann")))
    played(job, tmp_path / "run")
    assert digest(tmp_path / "run") == digest(whole.folder)


def test_a_run_that_is_over_is_left_alone(make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(*SMALL)
    first = played(job, tmp_path)
    before = (tmp_path / "journal.jsonl").read_bytes()
    with counted(monkeypatch) as asked:
        again = played(job, tmp_path)
    assert asked == []
    assert (tmp_path / "journal.jsonl").read_bytes() == before
    assert again.records == first.records


def test_a_run_that_is_over_can_have_more_rounds(make_job: MakeJob, tmp_path: Path) -> None:
    """Clients remember their control variates."""
    whole = played(make_job(*SMALL, *SCAFFOLD), tmp_path / "whole")
    played(make_job(*SMALL, *SCAFFOLD, "rounds.count=1"), tmp_path / "run")
    played(make_job(*SMALL, *SCAFFOLD), tmp_path / "run")
    assert digest(tmp_path / "run") == digest(whole.folder)


def test_where_the_rate_depends_on_the_number_of_rounds_that_stays(make_job: MakeJob, tmp_path: Path) -> None:
    played(make_job(*SMALL, "rounds.count=1", "train.round_schedule=cosine"), tmp_path)
    with pytest.raises(RunFolderError, match=r"rounds.count = 1, now 2"):
        played(make_job(*SMALL, "train.round_schedule=cosine"), tmp_path)


def test_another_job_is_refused_by_the_keys_that_differ(make_job: MakeJob, tmp_path: Path) -> None:
    played(make_job(*SMALL), tmp_path)
    with pytest.raises(RunFolderError, match=r"the run of another job \(train.lr = 0.01, now 0.5\)"):
        played(make_job(*SMALL, "train.lr=0.5"), tmp_path)


def test_a_whole_journal_whose_cohort_is_of_another_run_ends_in_one_line(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(*SMALL)
    assert killed(lambda: played(job, tmp_path), 5)
    file = tmp_path / "journal.jsonl"
    entries, _ = read(file)
    forged = [Entry("round", {**e.about, "cohort": ["zoe"]}) if e.what == "round" else e for e in entries]
    file.write_bytes(b"".join(line_of(entry, 0.0) for entry in forged))
    with pytest.raises(RunFolderError, match=r"has clients in round 0 that are not of this run: 'zoe'; bring back the journal"):
        played(job, tmp_path)


def test_a_second_coordinator_is_refused_while_the_first_has_the_folder(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(*SMALL)
    assert killed(lambda: played(job, tmp_path), 5)
    with lock.held(tmp_path), pytest.raises(RunFolderError, match=rf"another process \(pid {os.getpid()}\) works on the run"):
        played(job, tmp_path)
    played(job, tmp_path)


def test_who_failed_is_asked_again_after_a_run_that_stopped_for_want_of_answers(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(*SMALL, "rounds.quorum=1")
    whole, answer = played(job, tmp_path / "whole"), Trainer.answer

    def bob_is_ill(self: Trainer, envelope: Envelope, client: str | None = None) -> Envelope:
        ill = client == "bob" and envelope.header["ask"] == "2.0"
        return pack_failure("ill", envelope.header) if ill else answer(self, envelope, client)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "answer", bob_is_ill)
        with pytest.raises(RoundFailed, match=r"1 of 2 clients answered.*bob: ill"):
            played(job, tmp_path / "run")
    with counted(monkeypatch) as asked:
        played(job, tmp_path / "run")
    assert asked[0] == ("bob", "2.0")
    assert digest(tmp_path / "run") == digest(whole.folder)


def test_a_round_that_does_harm_is_rolled_back_for_server_and_clients(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In round 1 all train at a rate that ruins the model. Round 2 starts from what round 1 started from."""
    job = make_job(*SMALL, *BALANCED, "rounds.max_rise=0.01")
    peak = Local.peak_lr
    monkeypatch.setattr(Local, "peak_lr", lambda self: 1e3 if self._round == 1 else peak(self))
    result = played(job, tmp_path / "run")
    first, second = result.records[1], result.records[2]
    assert any("rolled back: the held-out loss rose by" in note for note in first.notes)
    assert not (tmp_path / "run" / "rounds" / "0001").exists()
    assert second.loss is not None
    assert result.records[0].loss is not None
    assert second.loss < result.records[0].loss + 0.05
    assert [entry["round"] for entry in lines(tmp_path / "run") if entry.what == "rolled_back"] == [1]


def worse_in(monkeypatch: pytest.MonkeyPatch, *rounds: int) -> None:
    """All clients find what these rounds published worse by 5 nats."""
    evaluate = Local.evaluate

    def found(self: Local) -> dict[str, float]:
        figures = dict(evaluate(self))
        return {**figures, "loss": figures["loss"] + 5.0 * (self._round in rounds)}

    monkeypatch.setattr(Local, "evaluate", found)


def test_of_the_last_round_alone_the_adapter_is_kept_until_the_next_one_counts(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse_in(monkeypatch, 2)
    played(make_job(*SMALL, "rounds.keep=1"), tmp_path)
    assert [path.name for path in (tmp_path / "rounds").iterdir()] == ["0001"]
    assert (tmp_path / "adapter").resolve() == tmp_path / "rounds" / "0001" / "adapter"


def test_a_run_of_which_every_round_did_harm_has_failed(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse_in(monkeypatch, 1, 2)
    for _ in range(2):  # also when it is taken up again
        with pytest.raises(RoundFailed, match="all rounds were rolled back, so nothing was published"):
            played(make_job(*SMALL), tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_a_full_disk_at_any_line_of_the_journal_ends_in_one_line(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, append = make_job(*SMALL, "rounds.count=1"), Journal._append
    for line in range(14):
        written, folder = [0], tmp_path / str(line)

        def full(self: Journal, data: bytes, soon: bool, written: list[int] = written, last: int = line) -> None:
            written[0] += 1
            if written[0] > last:
                raise OSError(errno.ENOSPC, "No space left on device")
            append(self, data, soon)

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "_append", full)
            with pytest.raises(RunFolderError, match=r"no space left on the disk .* make room, then go on with --resume"):
                played(job, folder)
    played(job, folder)
