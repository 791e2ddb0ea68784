"""What `fedtune doctor` looks at on either side: findings, versions, disk, memory, clock, the base model."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from fedtune import __version__
from fedtune.errors import FedtuneError

Result = Literal["ok", "warn", "fail"]
PACKAGES = ("flwr", "torch", "transformers", "peft")
TOLERATED, NOTED = 300.0, 30.0  # seconds that clocks may differ: beyond the first, Flower refuses signatures
FULL, CLOSE = 1.0, 0.8  # shares of what is free


@dataclass(frozen=True)
class Finding:
    check: str
    result: Result
    found: str
    todo: str = ""  # what to do about it

    def as_json(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        found = " ".join(self.found.split())
        return f"{self.result:<5} {self.check:<11} {found}{f'; {self.todo}' if self.todo else ''}"


Look = Callable[[], Iterable[Finding]]


def looked(checks: Mapping[str, Look]) -> Iterator[Finding]:
    """Every check's findings; one that cannot be made has failed, with its reason."""
    for name, look in checks.items():
        try:
            yield from look()
        except (FedtuneError, OSError) as error:
            yield Finding(name, "fail", str(error))


def versions() -> Iterator[Finding]:
    found = f"fedtune {__version__}, python {platform.python_version()}"
    wanted = _wanted()
    for package in PACKAGES:
        try:
            has = version(package)
        except PackageNotFoundError:
            yield Finding("versions", "fail", f"{package} is not installed", "pip install fedtune")
            continue
        found += f", {package} {has}"
        if package in wanted and not wanted[package].specifier.contains(has, prereleases=True):
            range = wanted[package].specifier
            yield Finding("versions", "warn", f"{package} {has}, tested with {range}", f"pip install '{package}{range}'")
    yield Finding("versions", "ok", f"{found}; the same on both sides is best")


def _wanted() -> dict[str, Requirement]:
    """As the package says it; nothing in a checkout that was not installed."""
    try:
        return {one.name: one for one in map(Requirement, requires("fedtune") or ()) if one.marker is None}
    except PackageNotFoundError:
        return {}


def clock(ahead: float | None, of_whom: str) -> Finding:
    """`ahead`: by how many seconds the other clock is ahead of ours."""
    if ahead is None:
        return Finding("clock", "warn", f"{of_whom} does not say what time it is", "compare the clocks by hand")
    words = f"{of_whom} is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}"
    if abs(ahead) > TOLERATED:
        return Finding("clock", "fail", f"{words}, and Flower refuses beyond {TOLERATED:g} s", "set the clocks, best by NTP")
    if abs(ahead) > NOTED:
        return Finding("clock", "warn", f"{words} of {TOLERATED:g} s that Flower bears", "set the clocks, best by NTP")
    return Finding("clock", "ok", f"{words}; Flower bears {TOLERATED:g} s")


def disk(folder: Path, needed: float, what: str) -> Finding:
    """Of the file system on which the folder is, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    return _fits("disk", f"{size(free)} free in {there}", needed, free, what, "free some, or name another --dir")


def ram(needed: float, what: str) -> Finding:
    free = psutil.virtual_memory().available
    return _fits("memory", f"{size(free)} of RAM free", needed, free, what, "end other programs, or take a smaller model")


def vram(needed: float, what: str) -> Finding:
    """Of the first GPU. No kernel is started."""
    import torch

    free, total = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name()
    instead = "--set train.micro_batch=1, --set train.checkpointing=true, or a smaller model"
    return _fits("memory", f"{size(free)} of {size(total)} VRAM free on {name}", needed, free, what, instead)


def _fits(check: str, found: str, needed: float, free: float, what: str, instead: str) -> Finding:
    words = f"{found}, {what} needs about {size(needed)}"
    share = needed / max(free, 1)
    if share > FULL:
        return Finding(check, "fail", words, instead)
    if share > CLOSE:
        return Finding(check, "warn", f"{words}: that is close", instead)
    return Finding(check, "ok", words)


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
