"""What a process does first that is about to import torch and what builds on it."""

from __future__ import annotations

import atexit
import gc

OBJECTS = 10_000  # that are made between two looks for garbage; Python's default is below


def start() -> None:
    """A million objects are made by imports and stay. To look through them at each 700 takes a fifth of the seconds until the
    process is there, and once more a second at its end."""
    gc.set_threshold(OBJECTS)
    atexit.register(gc.freeze)
