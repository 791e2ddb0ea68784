"""How the ServerApp fetches answers through Flower: soon, and whatever they are made of.

Both are changed where Flower's Grid has these two functions by name; a Flower that has them elsewhere runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.superlink.grid import http_grid

SOONER = {"initial_backoff": 0.05, "backoff_cap": 0.5}  # seconds; Flower's own are 1 and 10


def fetch_well() -> None:
    """For this process."""
    pull, inflate = (getattr(http_grid, name, None) for name in ("pull_objects", "inflate_object_from_contents"))
    if pull is None or inflate is None or isinstance(getattr(pull, "__self__", None), Fetch):
        return
    fetch = Fetch(partial(pull, **SOONER), inflate)
    http_grid.pull_objects, http_grid.inflate_object_from_contents = fetch.pull, fetch.inflate  # type: ignore[attr-defined]


class Fetch:
    """Flower asks for an answer's parts, then puts them together. Parts that make no message would end its ServerApp there, and
    the run; while the parts are fetched, it reports such an answer as one that did not come."""

    def __init__(self, pull: Callable[..., dict[str, bytes]], inflate: Callable[..., Any]) -> None:
        self._pull, self._inflate = pull, inflate
        self._message: Message | None = None

    def pull(self, object_ids: list[str], *given: Any, **named: Any) -> dict[str, bytes]:
        """The last of the ids is the message's own."""
        parts = self._pull(object_ids, *given, **named)
        try:
            found = self._inflate(object_ids[-1], parts)
        except Exception as error:  # whatever bytes from anywhere do to a parser
            raise ObjectPullError(object_ids[-1], f"it is no message: {type(error).__name__}") from error
        if not isinstance(found, Message):
            raise ObjectPullError(object_ids[-1], f"it is no message: {type(found).__name__}")
        self._message = found
        return parts

    def inflate(self, object_id: str, parts: dict[str, bytes]) -> Message:
        """That was put together just now."""
        message, self._message = self._message, None
        assert message is not None
        return message
