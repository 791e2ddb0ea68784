"""Fuzz the decoders of the wire with atheris (libFuzzer). From the root of the repository:

python -m tests.fuzz.fuzz_wire --seconds 600     # try inputs for so long, from the corpus on
python -m tests.fuzz.fuzz_wire --try FILE.hex    # one input alone: what a crash left behind
python -m tests.fuzz.fuzz_wire --write-corpus    # after a change to the format: corpus/*.hex anew

An input is kept as hexadecimal digits, so that it can be read and mended. What was found once goes to corpus/found-NAME.hex.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = ("-rss_limit_mb=1536", "-timeout=20", "-max_len=4096", "-len_control=20", "-print_final_stats=1")


def main() -> int:
    if sys.argv[1:2] == ["--inside"]:
        return inside()
    parser = argparse.ArgumentParser(description="fuzz the decoders of the wire")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seconds", type=int, help="try inputs for so long")
    what.add_argument("--try", type=Path, dest="one", metavar="FILE", help="try the input in this file of hexadecimal digits")
    what.add_argument("--write-corpus", action="store_true", help="write corpus/*.hex anew, except found-*.hex")
    given = parser.parse_args()
    if given.write_corpus:
        return write_corpus()
    return fuzz(given.seconds) if given.one is None else try_one(given.one)


def fuzz(seconds: int) -> int:
    """In a process of its own, which libFuzzer ends as it likes."""
    try:
        importlib.import_module("atheris")
    except ImportError as error:
        say(f"no fuzzing without atheris, which runs on Linux (pip install atheris): {error}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        seeds, crashes, log = Path(folder, "seeds"), Path(folder, "crashes"), Path(folder, "log")
        expand(seeds)
        crashes.mkdir()
        limits = [*FLAGS, f"-max_total_time={seconds}", f"-artifact_prefix={crashes}/"]
        with log.open("wb") as file:
            command = [sys.executable, "-m", "tests.fuzz.fuzz_wire", "--inside", str(seeds), *limits]
            code = subprocess.run(command, stdout=file, stderr=file).returncode
        return report(code, log.read_text(errors="replace"), crashes)


def report(code: int, log: str, crashes: Path) -> int:
    done = [line for line in log.splitlines() if line.startswith(("Done", "stat::number_of_executed_units"))]
    say(f"fuzzed the wire: {next(iter(done), 'no input was tried')}")
    if code:
        say(log[-6000:])
    for crash in sorted(crashes.iterdir()):
        say(f"{crash.name}; keep it as tests/fuzz/corpus/found-NAME.hex:\n{crash.read_bytes().hex()}")
    return code


def inside() -> int:
    """Under libFuzzer, with the rest of the command line as its own."""
    import atheris

    with atheris.instrument_imports(include=["fedtune.wire"]):
        from tests.fuzz.target import tried

    import torch

    torch.set_num_threads(1)
    atheris.Setup([sys.argv[0], *sys.argv[2:]], lambda data: tried(data) and None)
    atheris.Fuzz()
    return 0


def try_one(path: Path) -> int:
    from tests.fuzz.target import tried

    say("accepted" if tried(bytes.fromhex(path.read_text())) else "refused")
    return 0


def write_corpus() -> int:
    from tests.fuzz.target import CORPUS, corpus

    CORPUS.mkdir(exist_ok=True)
    for path in CORPUS.glob("*.hex"):
        if not path.name.startswith("found-"):
            path.unlink()
    for name, data in corpus():
        (CORPUS / f"{name}.hex").write_text(data.hex() + "\n")
    return 0


def expand(seeds: Path) -> None:
    """The corpus as bytes, as libFuzzer wants it."""
    seeds.mkdir()
    for path in (Path(__file__).parent / "corpus").glob("*.hex"):
        (seeds / path.stem).write_bytes(bytes.fromhex(path.read_text()))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
