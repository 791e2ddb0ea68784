"""What a client says of itself: few lines for who looks on, and the state for `fedtune status`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedtune.daemon import Said, State

Say = Callable[[str], None]
HELLO = "hello"
UNSAID = ("evaluate",)  # kinds of asks that are said only when they fail
GONE = "the server has gone (its run has ended?); waiting for the next"
FIRM = 2.0  # seconds that a trouble lasts before it is said: while a connection is made there are short ones


class Told(Said):
    """The state, and `tell` with a line for who looks on."""

    def __init__(self, folder: Path, state: State, tell: Say) -> None:
        super().__init__(folder, state)
        self.tell = tell

    def answered(self, told: Mapping[str, Any]) -> None:
        """One line of the relay's."""
        kind, run, round_ = told.get("kind"), told.get("run"), told.get("round")
        if failed := told.get("failed"):
            self.tell(f"run {run}{'' if round_ is None else f', round {round_}'}: {kind} not answered: {failed}")
        elif kind == HELLO:
            self.tell(f"run {run} of the coordinator begun")
        elif kind not in UNSAID:
            self.tell(f"round {round_}: {kind} answered in {float(told.get('seconds', 0)):.1f} s")
        self.say(run={"name": run, "round": round_ or 0})

    def guards(self) -> None:
        """As the trainer has written them."""
        try:
            found = json.loads((self._folder / "guards.json").read_text(encoding="utf-8"))
            self.say(guards={guard["name"]: "on" if guard["on"] else guard["why"] for guard in found})
        except (OSError, ValueError, TypeError, KeyError):
            return  # not yet


class Line:
    """The connection as people hear of it: connected, lost and why, connected again. What is short is not said."""

    def __init__(self, told: Told, clock: Callable[[], float] = time.monotonic) -> None:
        self._to, self._clock = told, clock
        self._connected = self._ever = False  # as it was said
        self._why, self._since, self._told = "", clock(), ""

    def now(self, why: str | None, server: str, gone: bool = False) -> None:
        """`why` it is not connected; None where it is. `gone`: nothing listens there any more."""
        if why and gone and self._ever and self._to.state.run:  # asks were answered: no trouble, as far as one can tell
            why = GONE
        self._to.say(phase="waiting" if why else "running", why=why or "", address=server)
        if why is None:
            self._well(server)
        else:
            self._ill(why)

    def _well(self, server: str) -> None:
        if not self._connected:
            self._to.tell(f"connected{' again' if self._ever else ''} to {server}")
        self._connected = self._ever = True
        self._why = self._told = ""

    def _ill(self, why: str) -> None:
        if why != self._why:
            self._why, self._since = why, self._clock()
        if why != self._told and self._clock() - self._since >= FIRM:
            lost = "connection lost" if self._connected else "not connected"
            self._to.tell(why if why == GONE else f"{lost}: {why}")
            self._connected, self._told = False, why
