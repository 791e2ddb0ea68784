"""The bundle that Flower sends to its nodes (FAB): one pyproject.toml that names modules which are installed there.

No code of ours travels: what runs on a node is what its operator installed.
"""

from __future__ import annotations

from pathlib import Path

import tomli_w

from fedtune import __version__


def make_bundle(folder: Path, serverapp: str, clientapp: str) -> Path:
    """Writes the project into `folder`, to be given to `flwr run`.

    Flower lets a run set only keys that stand here, so `job` (JSON), `folder`, `keys` (the folder of the coordinator's keys)
    and `resume` (anything is yes) are declared empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    app = {
        "publisher": "fedtune",
        "components": {"serverapp": serverapp, "clientapp": clientapp},
        "config": {"job": "", "folder": "", "keys": "", "resume": ""},
    }
    project = {"name": "fedtune", "version": __version__, "license": "Apache-2.0", "description": "", "dependencies": []}
    (folder / "pyproject.toml").write_text(
        tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}}), encoding="utf-8"
    )
    return folder
