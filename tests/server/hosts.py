"""Machines of their own on one: network namespaces around a server's, with links that delay, lose and can be cut.

Where the kernel has netem, it delays and loses. Elsewhere a link is a pair of TAP devices, between which a thread carries the
frames: TCP sees the same, and has the same to repair.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import selectors
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

ONE_WAY, LOSS = 0.05, 0.01  # seconds, and the share of frames, in each direction
TUN = Path("/dev/net/tun")
SET_INTERFACE, TAP, NO_INFORMATION = 0x400454CA, 0x0002, 0x1000  # of the kernel's headers
LARGEST = 1 << 16  # bytes of a frame
SERVER = "server"


def why_not() -> str:
    """Why this machine lets nobody make hosts; empty if it does."""
    if os.geteuid() != 0:
        return "not root: cannot make network namespaces"
    if not shutil.which("ip"):
        return "ip (iproute2) is not installed"
    name = f"ft{os.getpid()}try"
    tried = _said("ip", "netns", "add", name)
    _said("ip", "netns", "del", name)
    return f"namespaces are forbidden: {tried}" if tried else ""


class Hosts:
    """`server` and the named clients, each a namespace with a loopback of its own. Leaving the `with` removes them all."""

    def __init__(self, clients: Sequence[str], seed: int = 7) -> None:
        self.clients, self._names = list(clients), {}
        self.address = "10.77.0.1"  # of the server; nobody outside the namespaces sees it
        self._wire, self._stack = Wire(random.Random(seed)), ExitStack()
        self.netem = False

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for number, host in enumerate([SERVER, *self.clients]):
                self._names[host] = f"ft{os.getpid()}h{number}"
                _ip("netns", "add", self._names[host])
                stack.callback(_said, "ip", "netns", "del", self._names[host])
                self._ip_in(host, "link", "set", "lo", "up")
            self.netem = self._has_netem()
            self._ip_in(SERVER, "link", "add", "lan", "type", "bridge")
            self._ip_in(SERVER, "address", "add", f"{self.address}/24", "dev", "lan")
            self._ip_in(SERVER, "link", "set", "lan", "up")
            for number, client in enumerate(self.clients):
                self._join(client, f"port{number}", f"10.77.0.{number + 2}/24")
            if not self.netem:
                stack.enter_context(self._wire)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def on(self, host: str, *words: str) -> list[str]:
        """The command that runs `words` there."""
        return ["ip", "netns", "exec", self._names[host], *words]

    def cut(self, client: str) -> None:
        """At the server's end, and what is on its way is lost: the client's machine sees nothing but silence."""
        self._wire.close(self._port(client))
        self._ip_in(SERVER, "link", "set", self._port(client), "down")

    def heal(self, client: str) -> None:
        self._wire.open(self._port(client))
        self._ip_in(SERVER, "link", "set", self._port(client), "up")

    def losses(self) -> str:
        """By what, and how many."""
        if self.netem:
            ports = [
                _output(*self.on(SERVER, "tc", "-s", "qdisc", "show", "dev", self._port(client))) for client in self.clients
            ]
            return " ".join(["tc netem:", *(" ".join(port.split()) for port in ports)])
        return f"user space, as this kernel has no netem: {self._wire.carried} frames carried, {self._wire.lost} lost"

    def _port(self, client: str) -> str:
        return f"port{self.clients.index(client)}"

    def _has_netem(self) -> bool:
        return bool(shutil.which("tc")) and not _said(*self.on(SERVER, *_netem("lo")), undo=self.on(SERVER, *_NO_NETEM))

    def _join(self, client: str, port: str, address: str) -> None:
        """`uplink` in the client's namespace, `port` on the server's bridge."""
        if self.netem:
            pair = ["link", "add", port, "type", "veth", "peer", "name", "uplink", "netns", self._names[client]]
            self._ip_in(SERVER, *pair)
            _run(*self.on(SERVER, *_netem(port)))
            _run(*self.on(client, *_netem("uplink")))
        else:
            self._wire.between(self._tap(SERVER, port), self._tap(client, "uplink"), port)
        self._ip_in(SERVER, "link", "set", port, "master", "lan", "up")
        self._ip_in(client, "address", "add", address, "dev", "uplink")
        self._ip_in(client, "link", "set", "uplink", "up")

    def _tap(self, host: str, name: str) -> int:
        """A device that is made under a name of nobody else's, then moved; its file stays open here."""
        own = f"{self._names[host]}{name[-2:]}"[-15:]
        file = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(file, SET_INTERFACE, struct.pack("16sH22x", own.encode(), TAP | NO_INFORMATION))
        _ip("link", "set", own, "netns", self._names[host], "name", name)
        return file

    def _ip_in(self, host: str, *words: str) -> None:
        _ip("-n", self._names[host], *words)


class Wire:
    """Carries frames between pairs of files, each frame late by ONE_WAY, or never."""

    def __init__(self, chance: random.Random) -> None:
        self._chance, self._other, self._name = chance, dict[int, int](), dict[int, str]()
        self._closed = set[str]()
        self._late: list[tuple[float, int, int, bytes]] = []  # when, number, file, frame
        self._over, self._thread = threading.Event(), threading.Thread(target=self._carry, name="wire", daemon=True)
        self.carried = self.lost = 0

    def between(self, one: int, other: int, name: str) -> None:
        self._other |= {one: other, other: one}
        self._name |= {one: name, other: name}

    def close(self, name: str) -> None:
        """Nothing arrives, not even what is on its way."""
        self._closed.add(name)

    def open(self, name: str) -> None:
        self._closed.discard(name)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for file in self._other:
            os.close(file)

    def _carry(self) -> None:
        with selectors.DefaultSelector() as selector:
            for file in self._other:
                selector.register(file, selectors.EVENT_READ)
            while not self._over.is_set():
                wait = self._late[0][0] - time.monotonic() if self._late else ONE_WAY
                for key, _ in selector.select(max(wait, 0)):
                    self._take(key.fd)
                self._deliver()

    def _take(self, file: int) -> None:
        with suppress(OSError):  # its end is down
            while True:
                frame = os.read(file, LARGEST)
                if self._chance.random() < LOSS:
                    self.lost += 1
                    continue
                self.carried += 1
                heapq.heappush(self._late, (time.monotonic() + ONE_WAY, self.carried, self._other[file], frame))

    def _deliver(self) -> None:
        while self._late and self._late[0][0] <= time.monotonic():
            *_, file, frame = heapq.heappop(self._late)
            with suppress(OSError):  # its end is down
                if self._name[file] not in self._closed:
                    os.write(file, frame)


def _netem(device: str) -> list[str]:
    chance = ["delay", f"{ONE_WAY * 1000:.0f}ms", "loss", f"{LOSS:.0%}"]
    return ["tc", "qdisc", "add", "dev", device, "root", "netem", *chance]


_NO_NETEM = ["tc", "qdisc", "del", "dev", "lo", "root"]


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*words: str) -> None:
    if said := _said(*words):
        raise RuntimeError(f"{' '.join(words)}: {said}")


def _said(*words: str, undo: Sequence[str] = ()) -> str:
    """What it complains of where it fails; empty, and undone, where it does not."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip() or f"exit code {done.returncode}"
    if undo:
        _run(*undo)
    return ""


def _output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout
