"""What is asked of a SuperLink that fails for a while.

Flower's client itself waits for one that is not there. One that is there and fails, as with a full disk, is waited for here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import httpx
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

log = logging.getLogger("fedtune.serverapp")
PATIENCE, PAUSE = 120.0, 2.0  # seconds that it may fail, and before it is asked again

Got = TypeVar("Got")


def patiently(call: Callable[[], Got]) -> Got:
    """What was half done is done again: a message that is pushed twice is one, and an answer that is lost is overdue soon."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except (httpx.HTTPStatusError, ObjectPushError) as error:
            refused = isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error
            if refused or time.monotonic() >= deadline:
                raise
            log.warning("the SuperLink is in trouble, and is asked again: %s", error)
            time.sleep(PAUSE)
