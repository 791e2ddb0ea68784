"""The command `fedtune`. The commands themselves are in simulations/commands.py, which may import everything."""

from __future__ import annotations

from importlib import import_module

from fedtune.paths import put_app_on_path
from fedtune.starting import start


def main() -> None:
    start()
    put_app_on_path()
    import_module("simulations.commands").main()


if __name__ == "__main__":
    main()
