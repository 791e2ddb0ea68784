"""Both fuzzers, each for half of the time: `python -m tests.fuzz --seconds 600`. Messages alone, so many: `--count 1000000`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

SHORT = 60  # seconds; below, the same messages each time, of one method and by one process: what CI has time for


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--seconds", type=int)
    how.add_argument("--count", type=int)
    given = parser.parse_args()
    if given.count is not None:
        return started("fuzz_messages", "--count", given.count)
    half = max(given.seconds // 2, 1)
    short = ("--methods", "fedavg", "--workers", 1)
    how_long = ("--seconds", half, *(short if given.seconds < SHORT else ("--seed", int(time.time()))))
    return max(started("fuzz_wire", "--seconds", half), started("fuzz_messages", *how_long), key=abs)


def started(fuzzer: str, *options: object) -> int:
    return subprocess.run([sys.executable, "-m", f"tests.fuzz.{fuzzer}", *map(str, options)]).returncode


if __name__ == "__main__":
    sys.exit(main())
