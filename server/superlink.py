"""`python -m server.superlink`: Flower's own `flower-superlink`, its options as they are, behind our door.

The door goes through the one hook that Flower has for middleware. A Flower without it is not started: it would be open.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from flwr import __version__ as flower_version
from flwr.superlink import extensions
from starlette.middleware import Middleware

from fedtune.errors import KeysError
from fedtune.logs import configure
from fedtune.security.keyfiles import read_private
from server.door import Address, Door, plain_address, word_of

# Settings of the environment that open other ways in: Control without a door on a port of its own, and peers of our choice.
SIDE_DOORS = ("FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API", "FORWARDED_ALLOW_IPS")
ANY = ("0.0.0.0", "::")


def main() -> None:
    configure("superlink", format=None)
    close_side_doors(os.environ)
    options = sys.argv[1:]
    install_door(word_of(secret_in(options)), own_addresses(option(options, "--host") or "127.0.0.1"))  # as Flower has it
    for name in ("uvicorn.access", "flwr"):
        logging.getLogger(name).addFilter(is_news)
    from flwr.superlink.cli import flower_superlink

    flower_superlink()


def install_door(word: str, own: Sequence[Address] = ()) -> None:
    """Ends the process where Flower would not put the door before everything else."""
    already = getattr(extensions, "get_middleware", None)
    if already is not None:
        extensions.get_middleware = lambda: (Middleware(Door, word=word, own=own), *already())
    if already is None or not is_installed():
        sys.exit(
            f"fedtune: flwr {flower_version} does not take the door that keeps strangers from submitting runs "
            "(flwr.superlink.extensions.get_middleware), so the SuperLink is not started; wanted flwr>=1.41,<1.43: "
            "pip install 'flwr>=1.41,<1.43'"
        )


def is_installed() -> bool:
    """Whether Flower's app would have the door outermost."""
    from flwr.superlink import main as flower

    middleware = getattr(flower, "_get_middleware", list)()
    return bool(middleware) and middleware[0].cls is Door


def close_side_doors(environment: MutableMapping[str, str]) -> None:
    for name in SIDE_DOORS:
        environment.pop(name, None)


def secret_in(options: Sequence[str]) -> bytes:
    """Ends the process where there is none, or where Flower would not ask executors for it."""
    file = option(options, "--superexec-auth-secret-file")
    if not file or option(options, "--isolation") != "process":
        sys.exit("fedtune: wanted `--isolation process` and --superexec-auth-secret-file: without, others could take our tasks")
    try:
        secret = read_private(Path(file))
    except KeysError as error:
        sys.exit(f"fedtune: {error}")
    return secret or sys.exit(f"fedtune: {file} is empty; wanted random bytes")


def option(options: Sequence[str], wanted: str) -> str:
    """What it says; empty where it is not given. The last counts, as for Flower."""
    found = ""
    for word, value in zip(options, [*options[1:], ""], strict=True):
        name, equals, joined = word.partition("=")
        if name == wanted:
            found = joined if equals else value
    return found


def own_addresses(host: str) -> tuple[Address, ...]:
    """On one address alone, Flower's own processes come from that address: the kernel drops a stranger's packets with it."""
    if host in ANY:
        return ()
    return tuple({plain_address(str(found[4][0]).partition("%")[0]) for found in socket.getaddrinfo(host, None)})


def is_news(record: logging.LogRecord) -> bool:
    """Nodes ask several times a second, we every two: of requests that went well the log would hold nothing else."""
    if record.name == "flwr":
        return not str(record.msg).startswith("ControlServicer.List")
    status = record.args[-1] if isinstance(record.args, tuple) and record.args else None
    return not (isinstance(status, int) and status < 400)


if __name__ == "__main__":
    main()
