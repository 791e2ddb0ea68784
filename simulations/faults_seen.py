"""What was seen of a run that was disturbed, beside the one that nobody disturbed; and the table that many of these make."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from server.journal import Entry, read
from server.run_folder import JOURNAL, KINDS, RunFolder

BY_ITSELF, RESUMED = "ended by itself", "ended after `--resume`"
HEADER = ("what was done", "times", "the run", "rounds begun again", "answers lost", "bits of what it made")


@dataclass(frozen=True)
class Whole:
    """The run that nobody disturbed."""

    bits: str
    answered: Mapping[int, frozenset[str]]  # round -> clients
    entries: Sequence[Entry]

    @classmethod
    def of(cls, folder: Path) -> Whole:
        return cls(bits_of(folder), answered_in(folder), entries_of(folder))


@dataclass(frozen=True)
class Seen:
    """After `times` injections of one fault. `well`: whether the run ended as it should after this fault."""

    fault: str
    ending: str
    well: bool
    repeated: int = 0  # rounds that were begun again
    lost: int = 0  # answers
    same: bool | None = None  # the bits; None where those of an earlier round were others already
    times: int = 1
    where: str = ""  # to find it again
    mendable: bool = True  # or what was damaged is nowhere else, and the bits may be others

    @property
    def wrong(self) -> bool:
        return self.same is False and self.mendable

    @property
    def faultless(self) -> bool:
        return self.well and not self.lost and not self.wrong


@dataclass(frozen=True)
class Row:
    """All that was seen of one fault."""

    fault: str
    all: Sequence[Seen]

    @property
    def times(self) -> int:
        return sum(seen.times for seen in self.all)

    @property
    def faultless(self) -> bool:
        return all(seen.faultless for seen in self.all)

    def cells(self) -> list[str]:
        endings = Counter[str]()
        for seen in self.all:
            endings[seen.ending if seen.well else f"**{seen.ending}**"] += seen.times
        lost, same = sum(seen.lost for seen in self.all), Counter(seen.same for seen in self.all)
        others = f"**{same[False]} differ**" if any(seen.wrong for seen in self.all) else f"{same[False]} differ"
        unknown = [f"{same[None]} not known"] * (same[None] > 0)
        bits = [f"{same[True]} equal"] * (same[True] > 0) + [others] * (same[False] > 0)
        said = "; ".join(f"{times} {ending}" if len(endings) > 1 else ending for ending, times in endings.items())
        repeated = str(sum(seen.repeated for seen in self.all))
        return [self.fault, str(self.times), said, repeated, f"**{lost}**" if lost else "0", ", ".join([*bits, *unknown])]


def rows(all_seen: Iterable[Seen]) -> list[Row]:
    """In the order in which their faults came first."""
    by_fault: dict[str, list[Seen]] = {}
    for seen in all_seen:
        by_fault.setdefault(seen.fault, []).append(seen)
    return [Row(fault, found) for fault, found in by_fault.items()]


def bits_of(folder: Path) -> str:
    """A digest of what a run published last: adapter, recipe or weights; empty where it published nothing."""
    digest, found = hashlib.sha256(), False
    for kind in KINDS.values():
        for file in sorted((folder / kind).glob("*.safetensors")):
            digest.update(f"{kind}/{file.name}\n".encode())
            for piece in _pieces(file):
                digest.update(piece)
            found = True
    return digest.hexdigest() if found else ""


def _pieces(file: Path) -> Iterator[bytes]:
    """Its tensors in the order of their names: the file's own order of what stands beside them is one of chance."""
    with safe_open(file, framework="np") as opened:
        yield json.dumps(opened.metadata(), sort_keys=True).encode()
        for name in sorted(opened.keys()):
            tensor = opened.get_tensor(name)
            yield f"{name} {tensor.dtype} {tensor.shape}\n".encode() + tensor.tobytes()


def answered_in(folder: Path) -> dict[int, frozenset[str]]:
    """Round -> the clients that did not fail in it, as its record says."""
    records = RunFolder(folder).records()
    return {record.round: frozenset(id for id, one in record.clients.items() if not one.failed) for record in records}


def entries_of(folder: Path) -> list[Entry]:
    return read(folder / JOURNAL)[0]


def begun_again(entries: Iterable[Entry]) -> Counter[int]:
    """Round -> how often after the first time."""
    begun = Counter(int(entry["number"]) for entry in entries if entry.what == "round")
    return Counter({number: times - 1 for number, times in begun.items() if times > 1})


def lost_in(folder: Path, whole: Whole) -> dict[int, frozenset[str]]:
    """Round -> clients whose answers the undisturbed run had, and this one has not."""
    had = answered_in(folder)
    return {round: clients - had.get(round, frozenset()) for round, clients in whole.answered.items()}


def seen_in(folder: Path, whole: Whole, fault: str, ending: str, well: bool, times: int = 1, where: str = "") -> Seen:
    """Of a run to which nothing else was done."""
    repeated = sum(begun_again(entries_of(folder)).values())
    lost = sum(map(len, lost_in(folder, whole).values())) if well else 0
    return Seen(fault, ending, well, repeated, lost, bits_of(folder) == whole.bits, times, where)
