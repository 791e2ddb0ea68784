"""The trainer's door: it hears the coordinator of its bundle alone, never an old word, and says whose its answers are.

What is refused is answered with the reason, and logged here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from client.transport import failure, unknown_run
from fedtune import durable
from fedtune.envelope import Envelope
from fedtune.errors import MALFORMED, Refused, UserError
from fedtune.security.sealing import sealed
from fedtune.security.signing import ANSWER, ASK, SIGNATURE, Stamp, signed, verified

log = logging.getLogger("fedtune.trainer")
DAY = 24 * 3600 * 10**9  # nanoseconds
OLDEST = 7 * DAY  # an ask may wait for a client that was away, and no longer
DATE = "%Y-%m-%d %H:%M:%S UTC"


class Answers(Protocol):
    def answer(self, ask: Envelope) -> Envelope: ...


class Keys(Protocol):
    """Of a client's bundle."""

    @property
    def name(self) -> str: ...
    @property
    def verify(self) -> Ed25519PublicKey: ...
    @property
    def seal(self) -> X25519PublicKey: ...
    @property
    def signing(self) -> Ed25519PrivateKey: ...


class Signed:
    """Around the trainer. What it has heard last is kept in `folder`, so that it holds over restarts."""

    def __init__(
        self,
        inner: Answers,
        keys: Keys,
        folder: Path | None,
        clock: Callable[[], int] = time.time_ns,
        *,
        must_seal: bool = False,
    ) -> None:
        """`must_seal`: asks that do not want their answer sealed are refused."""
        self._inner, self._keys, self._clock, self._must_seal = inner, keys, clock, must_seal
        self._heard = Heard(folder / "heard.json" if folder else None)

    def answer(self, ask: Envelope) -> Envelope:
        try:
            opened, stamp = self._accepted(ask)
            other = self._of_another_run(opened, stamp)
            if other is None:
                self._heard.now(stamp, ask)
        except Refused as reason:
            log.warning("refused an ask: %s", reason)
            return failure(f"refused an ask: {reason}", ask.header)
        stamp = Stamp(stamp.run, stamp.serial, self._keys.name, stamp.seal)
        given = other or self._answered(opened)
        named = Envelope({"client": self._keys.name, **given.header}, given.tensors)  # a refusal may not know whose it is
        answer = signed(named, stamp, self._keys.signing, ANSWER)
        return sealed(answer, stamp, self._keys.seal) if stamp.seal else answer

    def _answered(self, ask: Envelope) -> Envelope:
        """What nobody expected is a failure too, sealed as any answer is; its words, which may hold anything, stay here."""
        try:
            return self._inner.answer(ask)
        except Exception as error:
            log.exception("could not answer")
            return failure(f"{type(error).__name__} in the trainer; its log says more", ask.header)

    def _accepted(self, ask: Envelope) -> tuple[Envelope, Stamp]:
        if SIGNATURE not in ask.header:
            raise Refused("it is not signed: the run was not started by `fedtune server` with the keys of this coordinator")
        opened, stamp = verified(ask, self._keys.verify, ASK)
        if not self._heard.is_new(stamp, ask):
            raise Refused(
                f"it is of {_date(stamp.serial)}, and not newer than the last one of {_date(self._heard.serial)}: somebody "
                "sends an old ask again, or the coordinator's clock was set back"
            )
        if stamp.serial > self._clock() + DAY:
            raise Refused(
                f"it is of {_date(stamp.serial)}, more than a day from now: set the clocks, here or on the coordinator"
            )
        if stamp.serial < self._clock() - OLDEST:
            raise Refused(
                f"it is of {_date(stamp.serial)}, more than {OLDEST // DAY} days ago: set the clocks, or it is an old ask"
            )
        if self._must_seal and not stamp.seal:
            raise Refused("policy.end_to_end: given an ask whose answer is not to be sealed; set security.end_to_end = true")
        if stamp.client not in ("", self._keys.name):
            raise Refused(f"it is for client '{stamp.client}', this is '{self._keys.name}'")
        return Envelope({**opened.header, "run": stamp.run}, opened.tensors), stamp

    def _of_another_run(self, ask: Envelope, stamp: Stamp) -> Envelope | None:
        """A failure, which is signed: the coordinator will say hello."""
        if ask.header.get("kind") == "hello" or stamp.run == self._heard.run:
            return None
        reason = f"refused an ask: it is for run {stamp.run}, this trainer takes part in {self._heard.run or 'none'}"
        log.warning("%s", reason)
        return unknown_run(reason, ask.header)


class Heard:
    """The run that a client takes part in, and the last ask that it heard: its serial, and a digest."""

    def __init__(self, file: Path | None) -> None:
        self._file, self.run, self.serial, self._ask = file, "", 0, ""
        if file and file.is_file():
            try:
                stored = json.loads(file.read_text(encoding="utf-8"))
                self.run, self.serial, self._ask = str(stored["run"]), int(stored["serial"]), str(stored["ask"])
            except (OSError, *MALFORMED) as error:
                raise UserError(
                    f"{file} cannot be read ({error}); without it old asks could be played again. Delete it when the "
                    "coordinator has started a new run"
                ) from error

    def is_new(self, stamp: Stamp, ask: Envelope) -> bool:
        """Or the last one again: the relay repeats it when the trainer was killed over it. It is answered as before, or with
        the same work on the same memory; where nothing is kept on disk it would be other work."""
        return stamp.serial > self.serial or (
            self._file is not None and (stamp.serial, _digest(ask)) == (self.serial, self._ask)
        )

    def now(self, stamp: Stamp, ask: Envelope) -> None:
        """On disk before anything is done about it. Raises Refused where it cannot be, and has heard nothing."""
        if (stamp.serial, _digest(ask)) == (self.serial, self._ask):
            return
        heard = {"run": stamp.run, "serial": stamp.serial, "ask": _digest(ask)}
        try:
            if self._file:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                durable.write(self._file, [json.dumps(heard).encode()])
        except OSError as error:
            raise Refused(f"nothing can be written on this client's disk ({error.strerror}): make room there") from error
        self.run, self.serial, self._ask = stamp.run, stamp.serial, _digest(ask)


def _digest(ask: Envelope) -> str:
    """Of the whole signed header, in which a digest of the tensors stands."""
    return hashlib.sha256(ask.header_json().encode()).hexdigest()


def _date(serial: int) -> str:
    """Some serials are no date at all."""
    try:
        return time.strftime(DATE, time.gmtime(serial / 10**9))
    except (OverflowError, OSError, ValueError):
        return f"no date ({str(serial)[:40]})"
