"""A run's folder, as a bad disk, a clumsy hand or another version may leave it: journal, checkpoints, spool, figures, job.

Whoever takes the run up again reads what is sound, or ends with an error of fedtune's own. Where bytes were damaged, which
checksums tell, the run ends with the bits of one that nobody disturbed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from unittest.mock import patch

from flwr.app import RecordDict

from fedtune.envelope import Envelope
from fedtune.errors import Damaged, FedtuneError, RunFolderError
from fedtune.messages import to_record
from server import attempts, coordinator, exchange, journal, past
from server.checkpoint import TENSORS, TEXT, Checkpoint
from server.journal import CHECK, Entry, entry_of
from server.run_folder import JOURNAL, RunFolder
from server.spool import Spool
from server.watchers import Quiet
from tests.fuzz.at_server import bits
from tests.fuzz.mutations import damaged, rewritten
from tests.fuzz.postbox import NAMES, Clock, Postbox
from tests.fuzz.recorded import CUT, ROUNDS, Recorded, Tree, plant
from tests.fuzz.watch import Broken

TEXTS = (
    "[" * 5000,
    '{"what":' + "[" * 5000 + "]" * 5000 + "}",
    '{"what":"state","round":1' + "0" * 5000 + "}",
    "{}",
    "[]",
    "1",
)


class AtFolder:
    """`lines` is a journal alone, `files` one file of the others; `resumed` takes the run up, and plays it to its end."""

    def __init__(self, runs: Sequence[Recorded], folder: Path) -> None:
        self._runs, self._folder, self._grid = runs, folder, Postbox()
        folder.mkdir(parents=True)

    def lines(self, draw: Random) -> str:
        run, folder = draw.choice(self._runs), self._folder / "lines"
        data = _journal(draw, run, self._runs)
        plant(folder, {JOURNAL: data})
        entries, sound = journal.read(folder / JOURNAL)
        _require_sound(data[:sound], entries)
        asks = past.asks_in(entries)
        for number in range(ROUNDS + 1):
            past.cohort_in(entries, number)
        attempts.where(entries, ROUNDS)
        over, started = attempts.is_finished(folder, ROUNDS), past.started_in(entries)
        told = f"{'whole' if sound == len(data) else 'cut'}, {len(asks)} asks, {'over' if over else 'open'}"
        return f"{told}{'' if started else ', never begun'}"

    def files(self, draw: Random) -> str:
        """Checkpoints and spool, each by whoever reads it."""
        run, folder = draw.choice(self._runs), self._folder / "files"
        name, data = _changed_file(draw, run.torn, ("state/", "spool/", "metrics"))
        files = {**run.torn, name: data, **_digests(draw, name, data, run.torn)}
        try:
            made = plant(folder, files)
            made.records()
            return self._spooled(run, made) if name.startswith("spool/") else _checkpoint(made, name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def resumed(self, draw: Random) -> str:
        run, folder = draw.choice(self._runs), self._folder / "resumed"
        files, is_forged = _damaged_folder(draw, run, self._runs)
        plant(folder, files)
        try:
            with self._answering(run):
                result = coordinator.run_job(run.job, self._grid, folder, Quiet(), write_model=False, resume=True)
        except FedtuneError as error:
            _require_one_line(error)
            return f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if bits(result.state) == bits(run.final):
            return "ended, with the same bits"
        if is_forged:
            return "ended, with other bits, as whole lines say otherwise"
        raise Broken("it ended with other bits than the undisturbed run")

    @contextmanager
    def _answering(self, run: Recorded) -> Iterator[None]:
        """Every client gives the answer that it gave."""
        answers = {(message.client, message.id): message.answer for message in run.messages}

        def reply(node: int, ask: Envelope) -> RecordDict:
            absent = Envelope({"failed": "that was never asked", "client": NAMES[node]})
            return to_record(answers.get((NAMES[node], str(ask.header["ask"])), absent))

        self._grid.reply = reply
        plan, drawn = run.federation.plan, lambda size: "f" * 2 * size
        opening = patch.multiple("server.opening", blueprint=lambda job: plan, token_hex=drawn)
        with opening, patch.object(exchange, "time", Clock()):
            yield
        self._grid.forget()

    def _spooled(self, run: Recorded, made: RunFolder) -> str:
        """What is not as it was written is not taken."""
        entries = [entry for entry in journal.read(made.path / JOURNAL)[0] if entry.what == "answered" and entry["ask"] == CUT]
        kinds = []
        for entry in entries:
            try:
                envelope = Spool(made.spool / CUT).get(entry["client"], entry["digest"])
            except Damaged:
                kinds.append("damaged")
                continue
            if envelope != run.message(entry["client"], CUT).answer:
                raise Broken(f"an answer of {entry['client']} is taken that it did not send")
        return f"spool: {', '.join(kinds) or 'as it was'}"


def _checkpoint(made: RunFolder, name: str) -> str:
    damaged = list[str]()
    try:
        last = made.checkpoints.last(damaged.append)
    except RunFolderError as error:  # of another version
        _require_one_line(error)
        return f"RunFolderError: {error}"
    _require_one_line(*damaged)
    told = f"{len(damaged)} damaged, {'none' if last is None else 'one'} is taken"
    if last is not None and not isinstance(last, Checkpoint):
        raise Broken(f"a checkpoint is {last}")
    return f"{name.partition('/')[0]}: {told}"


def _require_one_line(*told: object) -> None:
    if any("\n" in str(one) or not str(one) for one in told):
        raise Broken(f"not one line: {told!r}")


def _require_sound(data: bytes, entries: Sequence[Entry]) -> None:
    lines = data.splitlines(keepends=True) if b"\r" not in data else data.removesuffix(b"\n").split(b"\n")
    if len(lines) != len(entries):
        raise Broken(f"{len(entries)} entries of {len(lines)} lines")
    for line in lines:
        text = line.removesuffix(b"\n")[CHECK:]
        if int(line[:8], 16) != zlib.crc32(text):
            raise Broken("a line is taken whose checksum is wrong")


def _journal(draw: Random, run: Recorded, runs: Sequence[Recorded]) -> bytes:
    """Damaged bytes, or whole lines that say what none should."""
    data = draw.choice((run.torn, run.whole))[JOURNAL]
    if draw.random() < 0.35:
        return damaged(draw, data)
    return _forged(draw, data, draw.choice(runs).torn[JOURNAL])


def _forged(draw: Random, data: bytes, other: bytes) -> bytes:
    """Lines swapped, doubled, left out, of another run, or with other content under a right checksum."""
    lines = data.splitlines(keepends=True)
    for _ in range(draw.choice((1, 1, 2, 3))):
        place, second, what = draw.randrange(len(lines)), draw.randrange(len(lines)), draw.randrange(7)
        if what == 0:
            lines[place], lines[second] = lines[second], lines[place]
        elif what == 1:
            lines.insert(second, lines[place])
        elif what == 2 and len(lines) > 1:
            del lines[place]
        elif what == 3:
            lines.insert(place, draw.choice(other.splitlines(keepends=True)))
        elif what == 4:
            lines.insert(place, _line(draw.choice(TEXTS).encode()))
        elif entry_of(lines[place]):
            lines[place] = _line(json.dumps(rewritten(draw, json.loads(lines[place][CHECK:]))).encode())
    return b"".join(lines)


def _line(text: bytes) -> bytes:
    return b"%08x " % zlib.crc32(text) + text + b"\n"


def _changed_file(draw: Random, files: Tree, begins: tuple[str, ...]) -> tuple[str, bytes]:
    name = draw.choice([name for name in files if name.startswith(begins)])
    data = files[name]
    if name.endswith(TEXT) and draw.random() < 0.5:
        body = json.dumps(rewritten(draw, json.loads(data.partition(b"\n")[2]))).encode()
        return name, hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    if name.startswith("metrics") and draw.random() < 0.5:
        return name, json.dumps(rewritten(draw, json.loads(data.splitlines()[0]))).encode() + b"\n"
    return name, damaged(draw, data)


def _digests(draw: Random, name: str, data: bytes, files: Tree) -> Tree:
    """Now and then the text of a checkpoint says of damaged tensors that they are right."""
    if not name.endswith(TENSORS) or draw.random() < 0.5:
        return {}
    beside = name.removesuffix(TENSORS) + TEXT
    text = json.loads(files[beside].partition(b"\n")[2]) | {"sha256": hashlib.sha256(data).hexdigest()}
    body = json.dumps(text).encode()
    return {beside: hashlib.sha256(body).hexdigest().encode() + b"\n" + body}


def _damaged_folder(draw: Random, run: Recorded, runs: Sequence[Recorded]) -> tuple[Tree, bool]:
    """And whether a checksum cannot tell."""
    files = {name: data for name, data in run.torn.items() if not name.startswith("rounds/")}
    what = draw.random()
    if what < 0.25:
        return {**files, JOURNAL: damaged(draw, files[JOURNAL])}, False
    if what < 0.5:
        return {**files, JOURNAL: _forged(draw, files[JOURNAL], draw.choice(runs).torn[JOURNAL])}, True
    name, data = _changed_file(draw, files, ("state/", "spool/", "metrics", "job.toml"))
    digests = _digests(draw, name, data, files)
    forged = bool(digests) or name == "job.toml" or (name.endswith(TEXT) and _is_whole(data))
    return {**files, name: data, **digests}, forged


def _is_whole(data: bytes) -> bool:
    digest, _, body = data.partition(b"\n")
    return hashlib.sha256(body).hexdigest().encode() == digest
