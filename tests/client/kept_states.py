"""States of a client's folder, and a commit that is killed at each of its steps.

    python -m tests.client.kept_states FOLDER shared|own BEFORE AFTER      such as 1,2 1,2,3

It needs no torch: a process that has it takes long to fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client.kept import MANIFEST, Kept, answer_file, part_file, sweep
from client.manifest import Entry, Manifest
from fedtune.envelope import Envelope, WireTensor

STEPS = ("replace", "fsync", "link", "unlink", "mkdir")  # calls of `os` by which a commit changes a disk
Numbers = tuple[int, ...]


def answer(number: int) -> Envelope:
    return Envelope({"number": number}, (WireTensor("w", "uint8", (3,), "raw", bytes([number] * 3)),))


def state(*numbers: int) -> tuple[Manifest, dict[str, Callable[[], Any]]]:
    """After asks of these numbers: each with an answer, and a memory after it. Before any, there is nothing."""
    if not numbers:
        return Manifest(), {}
    files = [part_file(f"{number:064x}") for number in (0, *numbers)]
    answers = {answer_file(answer(number).pieces()): answer(number).pieces for number in numbers}
    made = zip(numbers, files, answers, strict=False)
    entries = tuple(Entry(f"key {number}", str(number), 1, ("", before), file) for number, before, file in made)
    makers = {file: lambda file=file: [file.encode()] for file in files} | answers
    return Manifest("run", "schema", ("", files[-1]), entries, dict.fromkeys(makers, 3)), makers


def commit(kept: Kept, before: Numbers, after: Numbers) -> None:
    kept.commit(state(*before)[0], *state(*after))


def is_whole(kept: Kept, manifest: Manifest) -> bool:
    """All that it names is there."""
    parts = [file for file in manifest.files() if file.endswith(".safetensors")]
    return all(kept.data(file) == file.encode() for file in parts) and all(
        kept.answer(entry.answer) == answer(int(entry.ask)) for entry in manifest.entries
    )


@contextmanager
def interrupted(at: int, act: Callable[[], None]) -> Iterator[list[str]]:
    """Act before the step of this number; the steps that were taken are in the list."""
    taken, calls = list[str](), {step: getattr(os, step) for step in STEPS}

    def stepping(step: str) -> Callable[..., Any]:
        def stepped(*given: Any, **named: Any) -> Any:
            taken.append(step)
            if len(taken) == at:
                act()
            return calls[step](*given, **named)

        return stepped

    for step in STEPS:
        setattr(os, step, stepping(step))
    try:
        yield taken
    finally:
        for step, call in calls.items():
            setattr(os, step, call)


def killed_at(at: int, kept: Kept, before: Numbers, after: Numbers) -> bool:
    """A process that kills itself there, with SIGKILL; whether there was such a step."""
    if (child := os.fork()) == 0:
        with interrupted(at, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            commit(kept, before, after)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, -signal.SIGKILL)
    return ended != 0


def killed_everywhere(folder: Path, shared: bool, before: Numbers, after: Numbers) -> list[bool]:
    """Of each step, whether the new state was there after it; the old one was otherwise."""
    old, new, outcomes = state(*before)[0], state(*after)[0], list[bool]()
    while True:
        kept = Kept(folder / str(len(outcomes)), "ann", shared=shared)
        if before:
            commit(kept, (), before)
        was_killed, found = killed_at(len(outcomes) + 1, kept, before, after), kept.read()
        assert found in (old, new)
        assert is_whole(kept, found)
        outcomes.append(found == new)
        commit(kept, before if found == old else after, after)  # the next process goes on
        sweep(kept.folder.parent.parent)
        assert kept.read() == new
        assert is_whole(kept, new)
        assert {path.name for path in kept.folder.iterdir()} == {MANIFEST, *new.files()}
        if not was_killed:
            return outcomes


def _numbers(text: str) -> Numbers:
    return tuple(int(number) for number in text.split(",") if number)


if __name__ == "__main__":
    outcomes = killed_everywhere(Path(sys.argv[1]), sys.argv[2] == "shared", _numbers(sys.argv[3]), _numbers(sys.argv[4]))
    sys.stdout.write(json.dumps(outcomes))
