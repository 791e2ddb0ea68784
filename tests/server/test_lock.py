"""One coordinator for each run folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedtune.errors import RunFolderError
from server import lock


def test_where_the_lock_cannot_be_opened_it_is_the_user_s_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, flags: int, mode: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(RunFolderError, match=r"lock cannot be opened \(Permission denied\)"), lock.held(tmp_path):
        pass
