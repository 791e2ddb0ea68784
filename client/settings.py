"""What `fedtune client` was given, checked before anything is started."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from client.transport import checked as checked_socket
from fedtune.daemon import State
from fedtune.errors import DataError, KeysError, ModelError, UserError
from fedtune.folders import require_folder
from fedtune.security.addresses import address, client_name
from fedtune.security.handover import Bundle, Part

BUILTIN = "builtin:"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # also what a relative path looks like, which is tried first


@dataclass(frozen=True)
class Settings:
    """Of one client, or of the half of it that `part` names. Paths are absolute: its processes run in `folder`."""

    folder: Path
    part: Part = "both"
    name: str = ""
    server: str = ""  # host:port where --server was typed; empty: the bundle's
    bundle: Path | None = None  # None: insecure
    socket: Path = field(default=Path())
    trainer: Mapping[str, str] = field(default_factory=dict)  # its further options, without the dashes

    @property
    def network(self) -> bool:
        return self.part != "trainer"

    @property
    def training(self) -> bool:
        return self.part != "network"

    @property
    def without(self) -> str:
        """What it means that --data or --model was left out; empty where neither was."""
        missing = [option for option in ("data", "model") if option not in self.trainer] if self.training else []
        if not missing:
            return ""
        named = " and ".join(f"--{option}" for option in missing)
        return f"without {named}: only jobs with built-in {' and '.join(missing)} ({BUILTIN}…) are answered"

    def handed(self) -> Bundle | None:
        """What lies in the bundle now: the operator may put another in its place. Raises KeysError."""
        return Bundle.load(self.bundle, self.part) if self.bundle else None


def checked(
    folder: Path,
    bundle: Path | None = None,
    server: str = "",
    name: str = "",
    only: Literal["trainer", "network"] | None = None,
    socket: Path | None = None,
    insecure: bool = False,
    anywhere: bool = False,
    **trainer: str | float | Path | None,
) -> Settings:
    """Raises UserError with what to type."""
    part: Part = only or "both"
    folder = folder.expanduser().absolute()
    if bundle:
        handed = Bundle.load(bundle.expanduser().absolute(), part)
        _require_alone(name, handed.name, insecure or anywhere)
        name, bundle = handed.name, handed.folder
    else:
        _require_insecure(name, server, part, insecure or anywhere, anywhere)
    if part == "network" and not socket:
        raise UserError(
            "--only network was given without --socket; wanted the path on which `fedtune client --only trainer` listens: the "
            "halves have a --dir each"
        )
    options = _trainer_options(trainer) if part != "network" else {}
    _glance(options, name)
    _require_free(folder)
    require_folder(folder)
    where = checked_socket(socket or folder / "trainer.sock")
    _require_reachable(options.get("relay-user"), where, folder)
    return Settings(folder, part, client_name(name), str(address(server)) if server else "", bundle, where, options)


def _require_reachable(relay_user: str | None, socket: Path, folder: Path) -> None:
    if relay_user and socket.parent == folder:
        raise UserError(
            f"--relay-user {relay_user} was given, and {folder} is closed to all other users; wanted --socket with a path in "
            "a folder that both can enter"
        )


def _require_alone(name: str, bundle_s: str, insecure: bool) -> None:
    if insecure:
        raise UserError("--bundle and --insecure were both given; leave --insecure out: the bundle has what TLS and keys need")
    if name and name != bundle_s:
        raise UserError(f"--name {name} was given, and the bundle is of '{bundle_s}'; leave --name out")


def _require_insecure(name: str, server: str, part: Part, insecure: bool, anywhere: bool) -> None:
    """Without keys the client must be told who it is, where to go, and that it is meant."""
    if not insecure:
        raise KeysError(
            "no --bundle was given; wanted the folder that the coordinator's operator made with `fedtune keys client NAME`, "
            "or --insecure to go without TLS and keys on this machine"
        )
    if not name or (part != "trainer" and not server):
        raise UserError("--insecure needs what a bundle would say: --name NAME --server host:port")
    if part != "trainer" and not anywhere and not is_loopback(address(server).host):
        raise UserError(
            f"--insecure goes to this machine only, and --server is {server}: whoever is on the way could read and change "
            f"everything. Take a bundle (`fedtune keys client {name}` at the coordinator), or type --insecure-anywhere"
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _trainer_options(given: Mapping[str, str | float | Path | None]) -> dict[str, str]:
    known = {key.replace("_", "-"): value for key, value in given.items() if value not in (None, "")}
    options = {key: str(value) for key, value in known.items()}
    for key, (error, fetch) in FETCHED.items():
        if key in options and not options[key].startswith(BUILTIN):
            options[key] = str(_local(f"--{key}", options[key], error, fetch))
    if "policy" in options:
        options["policy"] = str(Path(options["policy"]).expanduser().absolute())
        if not Path(options["policy"]).is_file():
            raise UserError(f"--policy {given['policy']} is no file; wanted a TOML file of what this client allows")
    return options


def _glance(options: Mapping[str, str], client: str) -> None:
    """Raises DataError or ModelError for what the trainer could not use."""
    from client.glance import glance_at_data, glance_at_model

    for option, glance in (("data", lambda path: glance_at_data(path, client)), ("model", glance_at_model)):
        if not options.get(option, BUILTIN).startswith(BUILTIN):
            glance(Path(options[option]))


# What the trainer, which has no network, cannot fetch itself: the error, and how to fetch it before.
FETCHED = {
    "model": (ModelError, "hf download {id} --local-dir ./{name}"),
    "data": (DataError, "hf download {id} --repo-type dataset --local-dir ./{name}"),
}


def _local(option: str, given: str, error: type[UserError], fetch: str) -> Path:
    path = Path(given).expanduser().absolute()
    if path.exists():
        return path
    if HUB_ID.fullmatch(given):
        name = given.rpartition("/")[2]
        raise error(
            f"{option} {given} is not on this machine, and the trainer has no network; if it is a hub id, type "
            f"`{fetch.format(id=given, name=name)}` and then {option} ./{name}"
        )
    raise error(f"{option} {given} does not exist; wanted a path on this machine")


def _require_free(folder: Path) -> None:
    try:
        state = State.read(folder)
    except UserError:
        return  # nothing was started there, or what stands there cannot be read and is replaced
    if state.role != "client":
        raise UserError(f"{folder} is the folder of a fedtune {state.role}; give this client another --dir")
    if state.alive:
        raise UserError(
            f"a {state.role} already runs in {folder} (pid {state.pid}); stop it with `fedtune stop --dir {folder}`, or give "
            f"this one another --dir"
        )
