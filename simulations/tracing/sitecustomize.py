"""When some functions of a deployment are called, for simulations/bench_deploy.py: a line of JSON for each call.

Python imports this before anything else where PYTHONPATH begins with this folder. Nothing of fedtune knows of it.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = "FEDTUNE_TRACE"  # variable that names the folder for the lines
TIMED = {
    "server.coordinator": ("play",),
    "flwr.superlink.grid.http_grid": ("HttpGrid.push_messages", "HttpGrid.pull_messages"),
    "flwr.supernode.start_client_internal": ("_pull_and_store_message", "_push_messages"),
    "client.runtime": ("Runtime.acquire", "Task.pull", "Task.reply"),
    "client.service": ("Service.Answer",),
    "client.fit": ("fit",),
}
LOOKS = ("pull_messages", "_pull_and_store_message", "acquire")


class Timing(MetaPathFinder):
    """Finds the modules above as Python does, and wraps their functions when they are loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in TIMED else None
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(load, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def load(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    execute(module)
    for name in TIMED[module.__name__]:
        *within, last = name.split(".")
        owner = functools.reduce(getattr, within, module)
        setattr(owner, last, timed(last, getattr(owner, last)))


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        began = time.monotonic()
        result = function(*given, **named)
        if name in LOOKS and not result:
            return result  # nothing had come
        write({"what": name, "began": began, "ended": time.monotonic(), "node": os.environ.get("FLWR_HOME", "")})
        return result

    return call


def write(line: dict[str, Any]) -> None:
    with (Path(os.environ[FOLDER]) / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if os.environ.get(FOLDER):
    sys.meta_path.insert(0, Timing())
