"""The units of systemd: what systemd says of them, and that the programs know the options that they give."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

from client import commands as client_commands
from server import commands as server_commands

ROOT = Path(__file__).parents[2]
UNITS = {path.name: path for part in ("client", "server") for path in (ROOT / part / "units").glob("*.service")}
TRAINER, NETWORK, SERVER = "fedtune-trainer.service", "fedtune-network.service", "fedtune-server.service"
# From 0 to 10, by systemd 252. It was 0.7 for the trainer and 1.2 for the others; a later systemd may ask for more.
MOST_EXPOSED = {TRAINER: 1.2, NETWORK: 1.7, SERVER: 1.7}
NEEDED = {
    TRAINER: {"PrivateNetwork=yes", "RestrictAddressFamilies=AF_UNIX", "NoNewPrivileges=yes", "ProtectSystem=strict"},
    NETWORK: {"MemoryDenyWriteExecute=yes", "PrivateDevices=yes", "NoNewPrivileges=yes", "ProtectSystem=strict"},
    SERVER: {"PrivateDevices=yes", "NoNewPrivileges=yes", "ProtectSystem=strict"},
}
has_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")


def lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def value(unit: str, name: str) -> str:
    return next(line.partition("=")[2] for line in lines(UNITS[unit]) if line.startswith(f"{name}="))


def settings(unit: str) -> dict[str, str]:
    """Of the file of settings that is shipped beside it."""
    name = Path(value(unit, "EnvironmentFile")).name
    return dict(line.split("=", 1) for line in lines(UNITS[unit].with_name(name)))


def parsed(words: list[str]) -> dict[str, object]:
    """What `fedtune` understands of these words; raises click's error where it does not."""
    app = typer.Typer()
    client_commands.add_to(app)
    server_commands.add_to(app)
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    with group.commands[words[0]].make_context(words[0], list(words[1:])) as context:
        return context.params


def command(unit: str) -> list[str]:
    known = settings(unit)
    return shlex.split(re.sub(r"\$\{?(\w+)\}?", lambda match: known[match[1]], value(unit, "ExecStart")))


def test_there_are_three() -> None:
    assert set(UNITS) == {TRAINER, NETWORK, SERVER}


@has_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_reads_it_without_a_word(unit: str, tmp_path: Path) -> None:
    """With a program that is there in place of the one that an operator installs."""
    copy = tmp_path / unit
    copy.write_text(UNITS[unit].read_text().replace("/usr/local/bin/fedtune", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "fedtune" in line] == []
    assert done.returncode == 0, done.stderr


@has_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_finds_it_little_exposed(unit: str) -> None:
    words = ["systemd-analyze", "security", "--offline=true", "--no-pager", UNITS[unit]]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if "offline" in done.stderr:
        pytest.skip(f"this systemd-analyze cannot look at files: {done.stderr.strip()}")
    (level,) = re.findall(r"Overall exposure level for .*: ([\d.]+)", done.stdout)
    assert float(level) <= MOST_EXPOSED[unit], done.stdout


@pytest.mark.parametrize("unit", UNITS)
def test_what_it_cannot_be_without(unit: str) -> None:
    assert NEEDED[unit] <= set(lines(UNITS[unit]))


@pytest.mark.parametrize("unit", UNITS)
def test_the_program_knows_the_options(unit: str) -> None:
    program, *words = command(unit)
    assert program == "/usr/local/bin/fedtune"
    assert parsed(words)["folder"] == f"/var/lib/{value(unit, 'StateDirectory')}"


def test_both_halves_meet_at_one_socket_in_the_trainer_s_folder() -> None:
    trainer, network = parsed(command(TRAINER)[1:]), parsed(command(NETWORK)[1:])
    assert trainer["socket"] == network["socket"]
    assert str(trainer["socket"]).rpartition("/")[0] == f"/run/{value(TRAINER, 'RuntimeDirectory')}"
    assert trainer["relay_user"] == value(NETWORK, "User") == value(TRAINER, "SupplementaryGroups")


def test_the_network_half_cannot_reach_what_the_trainer_is_given() -> None:
    given = parsed(command(TRAINER)[1:])
    closed = [Path(path.removeprefix("-")) for path in value(NETWORK, "InaccessiblePaths").split()]
    for path in (given["data"], given["model"], given["folder"], f"{given['bundle']}/trainer"):
        assert any(Path(str(path)).is_relative_to(one) for one in closed), path


@pytest.mark.parametrize("unit", UNITS)
def test_its_user_is_one_that_systemd_makes(unit: str) -> None:
    made = [line.split()[1] for line in lines(UNITS[unit].with_name("sysusers.conf"))]
    assert value(unit, "User") == value(unit, "Group")
    assert value(unit, "User") in made


@pytest.mark.skipif(not shutil.which("systemd-sysusers"), reason="systemd-sysusers is not installed")
@pytest.mark.parametrize("part", ["client", "server"])
def test_systemd_makes_the_users(part: str, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    conf = ROOT / part / "units" / "sysusers.conf"
    done = subprocess.run(["systemd-sysusers", f"--root={tmp_path}", conf], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    users = {line.split(":")[0] for line in (tmp_path / "etc" / "passwd").read_text().splitlines()}
    assert {line.split()[1] for line in lines(conf)} <= users
