"""Folders by the names of clients, which may be any text."""

from __future__ import annotations

import hashlib
from urllib.parse import quote

LONGEST_NAME = 100


def folder_name(client: str) -> str:
    """A name that no client can lead out of the folder with, and no two clients share; it never begins with a dot."""
    name = quote(client, safe=" ") or "%"
    if name.startswith("."):
        name = f"%2E{name[1:]}"
    return name if len(name) <= LONGEST_NAME else hashlib.sha256(client.encode()).hexdigest()
