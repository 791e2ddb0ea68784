"""The ServerApp's process of a run: what is said of its end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fedtune.errors import RoundFailed
from server.following import Progress
from server.playing import Playing
from server.watchers import Quiet


class Ended:
    """Processes whose ServerApp has failed; its log is `text`."""

    def __init__(self, folder: Path, text: str) -> None:
        self._log = folder / "serverapp.log"
        self._log.write_text(text)

    def ended(self, name: str) -> int:
        return 1

    def log(self, name: str) -> Path:
        return self._log


@pytest.mark.parametrize(("length", "words"), [(3, "xxx"), (1200, "x" * 1200), (3000, "x" * 1499 + "…")])
def test_why_it_failed_is_its_last_line_however_long(tmp_path: Path, length: int, words: str) -> None:
    """Reasons of many clients stand in one line."""
    ended = Ended(tmp_path, "first\n\x1b[2m" + "x" * length + "\n")
    settings = SimpleNamespace(run=tmp_path / "none")
    with pytest.raises(RoundFailed) as failed:
        Playing(settings, ended, None).follow(9, Progress(tmp_path / "none", Quiet()), lambda: None)
    where = tmp_path / "serverapp.log"
    assert str(failed.value) == f"the ServerApp ended with exit code 1; its last words in {where}: {words}"
