"""Mutated messages and files against all doors: the coordinator's, the trainer's, the relay's, and the run's folder.

python -m tests.fuzz.fuzz_messages --count 1000000 --seed 8      # so many cases, by two processes
python -m tests.fuzz.fuzz_messages --seconds 600                 # as many as there is time for, and at least some
python -m tests.fuzz.fuzz_messages --only 4711 --seed 8          # one of them again: what a finding names

A case is its number and the seed: they say what is sent, to whom, and when.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from pathlib import Path
from random import Random

SHARES = {  # of a thousand cases
    "server: answers": 300,
    "server: whole rounds": 5,
    "trainer: asks": 150,
    "trainer: as bytes": 170,
    "trainer: trained": 12,
    "trainer: its files": 13,
    "relay: asks": 40,
    "relay: answers": 40,
    "relay: its files": 30,
    "journal": 200,
    "checkpoints and spool": 35,
    "runs taken up again": 5,
}
FEWEST = 200  # cases of a process, however little time there is
SHOWN = 12  # kinds of outcome for each target
METHODS = "fedavg,fedkseed"
MEMORY = Path("/dev/shm")  # where files cost least
Case = Callable[[Random], str]


def main() -> int:
    given = _parser().parse_args()
    if given.inside:
        return inside(given)
    if given.only is not None:
        given.workers, given.count = 1, 1
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(worker)) for worker in range(given.workers)]
        command = [sys.executable, "-m", "tests.fuzz.fuzz_messages", *sys.argv[1:], "--workers", str(given.workers)]
        began = time.monotonic()
        workers = [
            subprocess.Popen([*command, "--inside", str(output), "--worker", str(worker)])
            for worker, output in enumerate(outputs)
        ]
        codes = [worker.wait() for worker in workers]
        return report(given, outputs, codes, time.monotonic() - began)


def inside(given: argparse.Namespace) -> int:
    """One of the processes: each takes every so-manieth case."""
    from tests.fuzz.watch import Watch

    deadline = time.monotonic() + (given.seconds or 10**9)
    numbers: Iterator[int] = iter(range(given.first + given.worker, given.first + given.count, given.workers))
    if given.only is not None:
        numbers = iter([given.only])
    with _quiet(), tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        cases = targets(Path(folder), given.methods.split(","))
        watch = Watch()
        for number in numbers:
            draw = Random(f"{given.seed}/{number}")
            [target] = draw.choices(list(SHARES), list(SHARES.values()))
            watch.try_case(number, target, lambda: cases[target](draw))  # noqa: B023 -- called at once
            late = time.monotonic() > deadline and sum(watch.seen.cases.values()) >= FEWEST
            if late or len(watch.seen.wrong) >= given.most:
                break
    given.inside.write_text(json.dumps(watch.seen.as_json()))
    return 0


def targets(folder: Path, methods: Sequence[str]) -> Mapping[str, Case]:
    from tests.fuzz.at_folder import AtFolder
    from tests.fuzz.at_relay import AtRelay
    from tests.fuzz.at_server import AtServer
    from tests.fuzz.at_trainer import AtTrainer
    from tests.fuzz.recorded import recorded

    runs = recorded(folder, methods)
    server, trainer = AtServer(runs, folder / "server"), AtTrainer(runs, folder / "trainer")
    relay, files = AtRelay(runs, folder / "relay"), AtFolder(runs, folder / "files")
    cases = [server.answers, server.rounds, trainer.asks, trainer.messages, trainer.trained, trainer.files]
    cases += [relay.asks, relay.answers, relay.files, files.lines, files.files, files.resumed]
    return dict(zip(SHARES, cases, strict=True))


def report(given: argparse.Namespace, outputs: list[Path], codes: list[int], seconds: float) -> int:
    from tests.fuzz.watch import Seen

    seen = [Seen.from_json(json.loads(output.read_text())) for output in outputs if output.exists()]
    if not seen or any(codes):
        say(f"a process of the fuzzer ended with {codes}: the last lines above say where")
        return 1
    found = reduce(add, seen)
    say(f"fuzzed the messages: {sum(found.cases.values()):,} cases of seed {given.seed} in {seconds:.0f} s")
    for target in found.cases:
        kinds = {kind.partition("  ")[2]: times for kind, times in found.kinds.items() if kind.startswith(f"{target}  ")}
        say(f"\n{target}: {found.cases[target]:,}, of {len(kinds)} kinds")
        for kind, times in sorted(kinds.items(), key=lambda one: -one[1])[: SHOWN if given.kinds is None else given.kinds]:
            say(f"  {times:>9,}  {kind}")
    slowest, longest = found.slowest, found.longest
    say(f"\nslowest: {slowest[0]:.3f} s of the processor, case {slowest[1]} ({slowest[2]})")
    say(f"longest: {longest[0]:.3f} s by the clock, case {longest[1]} ({longest[2]})")
    say(f"MB of a process: {found.began:.0f} before the first case, {found.most:.0f} at most, {found.ended:.0f} at the end")
    for number, target, text in found.wrong:
        say(f"\nWRONG: case {number} ({target}): {text}")
        say(f"  again: python -m tests.fuzz.fuzz_messages --only {number} --seed {given.seed} --methods {given.methods}")
    say(f"\n{len(found.wrong)} wrong")
    return 1 if found.wrong else 0


@contextmanager
def _quiet() -> Iterator[None]:
    """No log, no progress bars, and nothing waits for a disk: what is synced when is tested elsewhere."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    synced, os.fsync = os.fsync, lambda file: None
    try:
        yield
    finally:
        os.fsync = synced


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="mutated messages against every door")
    parser.add_argument("--count", type=int, default=10**9, help="so many cases")
    parser.add_argument("--first", type=int, default=0, help="the number of the first")
    parser.add_argument("--seconds", type=float, help="or as many as there is time for")
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--methods", default=METHODS, help=f"that were recorded; {METHODS}")
    parser.add_argument("--only", type=int, metavar="N", help="the case of this number alone")
    parser.add_argument("--kinds", type=int, help=f"kinds of outcome that are shown for each target; {SHOWN}")
    parser.add_argument("--most", type=int, default=50, help="findings after which a process stops")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, default=0, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
