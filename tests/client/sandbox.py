"""Starts programs as a unit of systemd would, as far as isolation goes: with its users, network, and paths out of reach.

It reads the units themselves. Their paths lie below a folder of the test, their users are numbers that no machine has.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedtune.paths import app_root

UNITS = app_root() / "client" / "units"
USERS = {"fedtune-trainer": 61021, "fedtune-network": 61022, "somebody": 61023}
TOOLS = ("unshare", "setpriv", "mount", "ip", "systemd-tmpfiles")
KEPT = ("PATH", "PYTHONPATH", "LANG", "OMP_NUM_THREADS")  # of the environment


def why_not() -> str:
    """Why this machine lets nobody do this; empty if it does."""
    if os.geteuid() != 0:
        return "not root: can neither change users nor make namespaces"
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"{', '.join(missing)} not installed"
    if closed := [str(folder) for folder in _needed() if not folder.stat().st_mode & 1]:
        return f"other users may not enter {', '.join(closed)}, where Python or this checkout lies"
    tried = subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True, text=True, check=False)
    return f"namespaces are forbidden: {tried.stderr.strip()}" if tried.returncode else ""


def directives(unit: str) -> dict[str, list[str]]:
    """Name -> values in order; a line may go on after a backslash."""
    lines = (UNITS / unit).read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    found: dict[str, list[str]] = defaultdict(list)
    for name, given, value in (line.partition("=") for line in lines if not line.startswith("#")):
        if given:
            found[name].append(value.strip())
    return found


class Machine:
    """A folder that stands for the root of a client's machine, with both users."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.chmod(0o755)
        people = [f"{name}:x:{number}:{number}::/:/bin/false" for name, number in USERS.items()]
        groups = [f"{name}:x:{number}:" for name, number in USERS.items()]
        (root / "etc").mkdir()
        (root / "etc" / "passwd").write_text("\n".join(["root:x:0:0::/:/bin/sh", *people, ""]))
        (root / "etc" / "group").write_text("\n".join(["root:x:0:", *groups, ""]))

    def path(self, of_unit: str) -> Path:
        return self.root / of_unit.removeprefix("-").lstrip("/")

    def hand_over(self) -> None:
        """What the page on deployment says: once before files are copied in, and once after."""
        subprocess.run(["systemd-tmpfiles", "--create", f"--root={self.root}", UNITS / "tmpfiles.conf"], check=True)

    def started(self, unit: str, words: Sequence[str], user: str = "", reachable: bool = False) -> subprocess.Popen[str]:
        """`user` in place of the unit's; `reachable`: without InaccessiblePaths."""
        given = directives(unit)
        user = user or given["User"][0]
        self._make_folders(given)
        script = [*self._names(), *_python_for_all(self.root / "python"), *([] if reachable else self._closed(given))]
        private = ["--net"] if given["PrivateNetwork"] == ["yes"] else []
        script += ["ip link set lo up"] if private else []
        groups = [USERS[name] for line in given["SupplementaryGroups"] for name in line.split()]
        script.append(f"exec {shlex.join([*_as_user(USERS[user], groups), *words])}")
        return subprocess.Popen(
            ["unshare", "--mount", *private, "sh", "-ec", "\n".join(script)],
            cwd=app_root(),
            env={name: os.environ[name] for name in KEPT if name in os.environ} | {"HOME": "/"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _make_folders(self, given: dict[str, list[str]]) -> None:
        owner = USERS[given["User"][0]]
        for kind, place in (("State", "var/lib"), ("Runtime", "run")):
            for name in given[f"{kind}Directory"]:
                (folder := self.root / place / name).mkdir(parents=True, exist_ok=True)
                folder.chmod(int(given[f"{kind}DirectoryMode"][0], 8))
                os.chown(folder, owner, owner)

    def _names(self) -> list[str]:
        return [f"mount --bind {self.root}/etc/{file} /etc/{file}" for file in ("passwd", "group")]

    def _closed(self, given: dict[str, list[str]]) -> list[str]:
        """An empty folder without any right lies over each; the parents of these paths are there."""
        paths = [self.path(path) for line in given["InaccessiblePaths"] for path in line.split()]
        return [f"mount -t tmpfs -o mode=000 closed {path}" for path in paths if path.exists()]


def _as_user(number: int, groups: Iterable[int]) -> list[str]:
    more = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    rights = ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    return ["setpriv", f"--reuid={number}", f"--regid={number}", more, *rights]


def _python_for_all(spare: Path) -> list[str]:
    """Python and this checkout may lie in a folder of root's: over it, one in which only they are."""
    closed = {folder: _closed_above(folder) for folder in _needed()}
    lines = []
    for number, (folder, above) in enumerate(closed.items()):
        if above:
            lines += [f"mkdir -p {spare}/{number}", f"mount --bind {folder} {spare}/{number}"]
    lines += [f"mount -t tmpfs -o mode=755 open {above}" for above in set(closed.values()) if above]
    for number, (folder, above) in enumerate(closed.items()):
        if above:
            lines += [f"mkdir -p {folder}", f"mount --bind {spare}/{number} {folder}"]
    return lines


def _needed() -> set[Path]:
    return {Path(folder).resolve() for folder in (sys.base_prefix, sys.prefix, app_root())}


def _closed_above(folder: Path) -> Path | None:
    """The highest folder above that others may not enter."""
    return next((above for above in reversed(folder.parents) if not above.stat().st_mode & 1), None)
