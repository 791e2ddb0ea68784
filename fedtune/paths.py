"""Where the parts of fedtune lie: `_app` inside an installed wheel, the repository in a checkout."""

from __future__ import annotations

import sys
from pathlib import Path


def app_root() -> Path:
    """The folder that holds `server`, `client`, `strategies` and `simulations`."""
    package = Path(__file__).resolve().parent
    return package / "_app" if (package / "_app").is_dir() else package.parent


def put_app_on_path() -> None:
    """Make the four folders importable, before anything else that may bear such a name."""
    root = str(app_root())
    if root not in sys.path:
        sys.path.insert(0, root)


def base_model() -> Path:
    """The small base model that is shipped."""
    return app_root() / "simulations" / "base_model"


def job_file(job: str) -> Path:
    """What a command was given: a file, or the name of a scenario that is shipped."""
    scenario = app_root() / "simulations" / "scenarios" / f"{job}.toml"
    return scenario if scenario.is_file() and not Path(job).is_file() else Path(job)
