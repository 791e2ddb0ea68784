"""A coordinator's clock that jumps, for simulations/faults.py: it is wrong by as many seconds as a file says.

Python imports this before anything else where PYTHONPATH begins with this folder. It changes the ServerApp's process alone, and
nothing of fedtune knows of it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

FILE = "FEDTUNE_FAULTS_CLOCK"  # variable that names it


def wrong_by(file: Path) -> float:
    try:
        return float(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it is just being written
        return 0.0


def let_jump(file: Path) -> None:
    """`time.time` and `time.time_ns`, which is what signed asks and the journal go by."""
    seconds: Callable[[], float] = time.time
    nanoseconds: Callable[[], int] = time.time_ns
    time.time = lambda: seconds() + wrong_by(file)
    time.time_ns = lambda: nanoseconds() + int(wrong_by(file) * 10**9)


if FILE in os.environ and "server.serverapp" in sys.orig_argv:
    let_jump(Path(os.environ[FILE]))
