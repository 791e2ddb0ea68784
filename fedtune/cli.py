"""The command `fedtune`. The commands themselves are in simulations/commands.py, which may import everything."""

from __future__ import annotations

import atexit
import gc
from importlib import import_module

from fedtune.paths import put_app_on_path


def main() -> None:
    atexit.register(gc.freeze)  # to look for garbage in all that was imported would take a second or two at the end
    put_app_on_path()
    import_module("simulations.commands").main()


if __name__ == "__main__":
    main()
