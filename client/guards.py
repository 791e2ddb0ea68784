"""What the trainer's process takes from itself before it reads a model or data: the network, new privileges, core dumps.

Each guard is raised where the kernel and the surroundings permit it, and says whether it is on. None of them filters system
calls, so CUDA works as before. Files, and unix sockets in the file system, stay as they are.

Not among them: a process that its own user cannot trace (PR_SET_DUMPABLE). Where trainer and relay are one user, that user may
read the data file anyway; where they are two, neither can trace the other; and who started the trainer could no longer read
its environment, by which it finds what has to end.
"""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass

from client.offline import SELF, call, leave_network, leave_tcp, listener, only_loopback, reaches

SET_NO_NEW_PRIVILEGES = 38  # of prctl


@dataclass(frozen=True)
class Guard:
    """One thing that this process can no longer do, or why it still can."""

    name: str
    on: bool
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {'on' if self.on else 'OFF'} ({self.why})"


def raise_guards(other_users: bool = False) -> tuple[Guard, ...]:
    """To be called before there is any thread: a guard holds for the thread that raises it, and for those that it starts.

    `other_users`: the trainer has to recognise users other than its own. So it makes no user namespace, where all others look
    alike.
    """
    if sys.platform != "linux":
        return tuple(Guard(name, False, "only Linux has it") for name in ("privileges", "core dumps", "network"))
    return _privileges(), _core_dumps(), _network(other_users)


def _privileges() -> Guard:
    """No program that this process starts gains rights by setuid or file capabilities. Landlock wants it, too."""
    try:
        call("prctl", SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    except OSError as error:
        return Guard("privileges", False, f"cannot give up new ones: {error.strerror}")
    return Guard("privileges", True, "no new ones")


def _core_dumps() -> Guard:
    """The limit holds for files; a program that the kernel pipes dumps to gets one without memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        (SELF / "coredump_filter").write_text("0")
    except OSError as error:
        return Guard("core dumps", True, f"none in files; what the kernel pipes holds memory: {error.strerror}")
    return Guard("core dumps", True, "none in files, none with memory")


def _network(other_users: bool) -> Guard:
    """Two layers where both can be had. Believed only after a try: the loopback of before must be out of reach."""
    if (threads := len(os.listdir(SELF / "task"))) > 1:
        return Guard("network", False, f"{threads} threads run already, and would keep it")
    said, left = [], 0
    with listener() as address:
        for leave in (lambda: leave_network(other_users), leave_tcp):
            try:
                said.append(leave())
                left += 1
            except OSError as error:
                said.append(error.strerror)
        on = left > 0 and (only_loopback() or not reaches(address))
    return Guard("network", on, "; ".join(said))
