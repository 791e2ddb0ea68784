"""What the SuperNode does with an ask whose run ends while its parts are fetched: it forgets the ask.

Flower's loop leaves such an ask behind without its content, as a task for the relay, which then waits for the rest of it for
ever, and with it all asks that come after. The loop does clean up after other errors; to it this one looks like those.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from flwr.supercore.run import RunNotRunningException

log = logging.getLogger("flwr")
PULL, FETCHES = "_pull_and_store_message", ("pull_object", "confirm_message_received")


class RunIsOver(Exception):
    """The run of an ask ended while it was fetched."""


def forget_asks_of_ended_runs(loop: ModuleType) -> bool:
    """Whether the loop is as we know it; where Flower has changed it, it runs stock."""
    pull: Callable[..., int | None] | None = getattr(loop, PULL, None)
    if pull is None:
        log.warning("Flower's loop has changed: a run that ends while an ask is fetched can keep this node until a restart")
        return False
    setattr(loop, PULL, partial(_pulled, pull))
    return True


def _pulled(pull: Callable[..., int | None], **given: Any) -> int | None:
    return pull(**{name: _ordinary(one) if name in FETCHES else one for name, one in given.items()})


def _ordinary(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*words: Any) -> Any:
        try:
            return call(*words)
        except RunNotRunningException as error:  # no Exception, so nothing that cleans up would catch it
            raise RunIsOver("its run has ended") from error

    return called
