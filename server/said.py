"""What a long-lived command says of itself while it lives, and how its end is told: writes `state.json` whenever it changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedtune.daemon import State


class Said:
    def __init__(self, folder: Path, state: State) -> None:
        self._folder, self.state = folder, state
        state.write(folder)

    def say(self, **changes: Any) -> None:
        state = self.state.but(**changes)
        if state != self.state:
            self.state = state
            state.write(self._folder)

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """Around everything that is started: the last phase is said when all of it has ended."""
        try:
            yield
        except KeyboardInterrupt as stop:
            self._over(phase="stopped", why=str(stop) or "Ctrl-C")
            raise
        except BaseException as error:
            self._over(phase="failed", why=" ".join(str(error).split()) or type(error).__name__)
            raise
        self._over(phase="finished")

    def _over(self, **changes: Any) -> None:
        nothing = {name: {**process, "pid": None} for name, process in self.state.processes.items()}
        self.say(processes=nothing, **changes)
