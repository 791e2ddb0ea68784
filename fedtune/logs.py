"""Logs of long-lived processes: text for people, or with FEDTUNE_LOG=json one JSON object in each line.

    {"time":"2026-01-02T03:04:05.678Z","level":"INFO","process":"trainer","message":"…","client":"ann","run":"…","round":3}

A traceback is in its line too, as `traceback`. `about` adds run, round or client to all that is said within it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType, TracebackType
from typing import Any, TextIO

from fedtune.processes import CONTROL

VARIABLE, TEXT, JSON = "FEDTUNE_LOG", "text", "json"
FORMAT = "%(asctime)s %(levelname)s %(message)s"
LONGEST = 4000  # characters of a traceback: its end tells most

Fields = Mapping[str, object]
_about: ContextVar[Fields] = ContextVar("about", default=MappingProxyType({}))
_always: dict[str, object] = {}  # of this process
log = logging.getLogger("fedtune")


def configure(process: str, stream: TextIO | None = None, format: str | None = FORMAT, **fields: object) -> None:
    """Once, when the process starts; `fields` are in each of its lines of JSON. As text its lines are of this `format`; None
    leaves them, and what is worth a line, to whoever set them up."""
    always(process=process, **fields)
    wanted = os.environ.get(VARIABLE) or TEXT
    if wanted == JSON:
        _write_json(stream or sys.stderr, logging.WARNING if format is None else logging.INFO)
    elif format is not None:
        logging.basicConfig(level=logging.INFO, format=format, stream=stream)
    if wanted not in (TEXT, JSON):
        log.warning("%s=%s was given, wanted %s or %s: the log is text", VARIABLE, wanted, TEXT, JSON)


def always(**fields: object) -> None:
    """What only becomes known later, such as the client's name."""
    _always.update(_known(fields))


@contextmanager
def about(**fields: object) -> Iterator[None]:
    """Around an answer, or a round."""
    token = _about.set({**_about.get(), **_known(fields)})
    try:
        yield
    finally:
        _about.reset(token)


class JsonLines(logging.Formatter):
    """A record as one line of JSON, in ASCII: whatever it holds, it breaks no line and moves no cursor."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": at, "level": record.levelname, **_always, "message": record.getMessage(), **_about.get()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)[-LONGEST:]
        return json.dumps(line, default=str)


def as_text(line: str) -> str:
    """A line of JSON as the text log would have it, with its traceback in further lines; any other line as it is. Free of what
    a terminal would obey."""
    said = _object(line)
    if said is None:
        return CONTROL.sub("", line)
    words = f"{_local(str(said.get('time')))} {said['level']} {said['message']}"
    return CONTROL.sub("", words + (f"\n{said['traceback']}" if said.get("traceback") else ""))


def _object(line: str) -> dict[str, Any] | None:
    try:
        said = json.loads(line) if line.startswith("{") else None
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) and {"level", "message"} <= said.keys() else None


def _local(at: str) -> str:
    try:
        return datetime.fromisoformat(at).astimezone().strftime("%Y-%m-%d %H:%M:%S,%f")[:-3]
    except (ValueError, OverflowError, OSError):
        return at


def _write_json(stream: TextIO, level: int) -> None:
    ours = logging.StreamHandler(stream)
    ours.setFormatter(JsonLines())
    ours.setLevel(level)
    logging.basicConfig(level=level, handlers=[ours])
    logging.captureWarnings(True)
    _take_over(ours)
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread


def _take_over(ours: logging.Handler) -> None:
    """What a library's own handler would write to the console is written once, by ours: Flower and uvicorn set up theirs when
    they please, also after us. Their levels and filters hold; handlers that write elsewhere hear of it as before."""

    def call(logger: logging.Logger, record: logging.LogRecord) -> None:
        wanted = [one for one in _handlers(logger) if record.levelno >= one.level]
        if any(_writes_here(one) and one.filter(record) for one in wanted):
            ours.handle(record)
        for one in wanted:
            if not _writes_here(one):
                one.handle(record)

    logging.Logger.callHandlers = call  # type: ignore[method-assign,assignment]


def _handlers(logger: logging.Logger | None) -> Iterator[logging.Handler]:
    while logger:
        yield from logger.handlers
        logger = logger.parent if logger.propagate else None


def _writes_here(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))


def _uncaught_in_thread(given: threading.ExceptHookArgs) -> None:
    if given.exc_value is not None:
        _uncaught(given.exc_type, given.exc_value, given.exc_traceback)


def _known(fields: Fields) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value not in (None, "")}
