"""What a running server tells the world outside, where that was asked for: its health, and its figures for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedtune.security.addresses import address
from server.health import health_of, told_at
from server.prometheus import scraped_at


@contextmanager
def told(
    folder: Path, superlink: str, health: str = "", metrics: str = "", names: bool = False
) -> Iterator[Callable[[], None]]:
    """`health` and `metrics` are host:port, or empty. Yields what the supervisor's loop is to call at each turn. Raises
    UserError for what is no address, or where nothing can listen."""
    looked: Callable[[], None] = _nobody_asks
    with ExitStack() as open_doors:
        if health:
            own = health_of(folder, superlink)
            open_doors.enter_context(told_at(address(health), own))
            looked = own.looked
        if metrics:
            open_doors.enter_context(scraped_at(address(metrics), folder, names))
        yield looked


def _nobody_asks() -> None: ...
