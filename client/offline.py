"""How a process leaves the network for good, with what an ordinary user may do on Linux; and how to see that it has left."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

SELF = Path("/proc/self")
# From the kernel's headers; Python has names for the first two from 3.12 on. The numbers of the system calls are the same on
# every architecture that torch runs on.
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446
LANDLOCK_VERSION = 1
BIND_TCP, CONNECT_TCP = 1, 2
ABSTRACT_SOCKETS = 1
FIRST_WITH_TCP, FIRST_WITH_SCOPES = 4, 6
INTERFACE_FLAGS, IS_UP, IS_LOOPBACK = 0x8913, 1, 8
HIDES = "a user namespace would hide which user the relay is"


def leave_network(other_users: bool) -> str:
    """By right, else in a user namespace, where anybody has that right; else it may be that somebody has done it for us."""
    with contextlib.suppress(OSError):
        call("unshare", NEW_NETWORK)
        return "a network namespace of its own"
    if not other_users and _works_in_a_child(_enter_user_namespace):
        _enter_user_namespace()
        return "a network namespace of its own, in a user namespace"
    if only_loopback():
        return "no interface here but loopback"
    raise OSError(errno.EPERM, f"no network namespace: {HIDES if other_users else 'not permitted here'}")


def _enter_user_namespace() -> None:
    """The own user and group mean the same inside, so files stay as accessible as they were."""
    user, group = os.geteuid(), os.getegid()
    call("unshare", NEW_USER | NEW_NETWORK)
    (SELF / "setgroups").write_text("deny")
    (SELF / "uid_map").write_text(f"{user} {user} 1")
    (SELF / "gid_map").write_text(f"{group} {group} 1")


def _works_in_a_child(work: Callable[[], None]) -> bool:
    """Tried where it does no harm: halfway in, there is no way back."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def leave_tcp() -> str:
    """Landlock, which needs no right: a domain that handles TCP and has no rule that permits any.

    Unix sockets without a file (abstract ones) are out of reach with it, too, where the kernel can do that.
    """
    version = call("syscall", LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION)
    if version < FIRST_WITH_TCP:
        raise OSError(errno.EOPNOTSUPP, f"Landlock {version} of this kernel knows no TCP, from 6.7 on it does")
    handled = struct.pack("3Q", 0, BIND_TCP | CONNECT_TCP, ABSTRACT_SOCKETS if version >= FIRST_WITH_SCOPES else 0)
    rules = call("syscall", LANDLOCK_CREATE_RULESET, handled, len(handled), 0)
    try:
        call("syscall", LANDLOCK_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)
    return "Landlock refuses TCP, not UDP"


def only_loopback() -> bool:
    """Whether no interface but loopback is up: so it is in a namespace that was made for us."""
    names = [line.partition(":")[0].strip() for line in (SELF / "net/dev").read_text().splitlines()[2:]]
    with socket.socket(socket.AF_UNIX) as any_socket:
        for name in names:
            answer = fcntl.ioctl(any_socket, INTERFACE_FLAGS, struct.pack("16s24x", name.encode()))
            (flags,) = struct.unpack_from("16xH", answer)
            if flags & IS_UP and not flags & IS_LOOPBACK:
                return False
    return True


@contextlib.contextmanager
def listener() -> Iterator[tuple[str, int] | None]:
    """A port of this machine's loopback; None where there is none, or no internet address can be used at all."""
    with contextlib.ExitStack() as stack:
        try:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        except OSError:
            yield None
        else:
            yield listener.getsockname()


def reaches(address: tuple[str, int] | None) -> bool:
    if address is None:
        return False
    with socket.socket() as end:
        end.settimeout(1)
        return end.connect_ex(address) == 0


def call(name: str, *given: int | bytes | None) -> int:
    """A function of the C library that Python has no name for. Whole numbers go as long: `syscall` reads no less."""
    library = ctypes.CDLL(None, use_errno=True)
    result: int = getattr(library, name)(*(ctypes.c_long(one) if isinstance(one, int) else one for one in given))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result
