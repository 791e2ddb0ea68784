"""How many answers a round cannot do without, and what is done while they are not there."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping

from fedtune.errors import RoundFailed
from fedtune.job import Job
from server.records import Watcher
from server.report_units import one_line
from server.tally import LONGEST_REASON

log = logging.getLogger("fedtune.serverapp")
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0  # seconds before who failed is asked again; it doubles


def wanted(job: Job, clients: int) -> int:
    """Answers that a round of so many clients is to have."""
    return min(job.rounds.clients or clients, clients)


def asked(job: Job, clients: int) -> int:
    """And clients that are asked for them."""
    return min(math.ceil(wanted(job, clients) * job.rounds.oversample), clients)


def buffered(job: Job, clients: int) -> int:
    """Answers of a buffered round."""
    return job.rounds.buffer or max(wanted(job, clients) // 2, 1)


def quorum(job: Job, answers: int) -> int:
    """Of so many answers, those without which there is no round."""
    return max(1, math.ceil(job.rounds.quorum * answers))


def pauses() -> Iterator[float]:
    pause = FIRST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE)


def too_few(round: int, answered: int, asked: int, wanted: int, reasons: Mapping[str, str]) -> RoundFailed:
    told = "; ".join(f"{client}: {reason}" for client, reason in reasons.items())
    return RoundFailed(f"round {round}: {answered} of {asked} clients answered, wanted {wanted} (rounds.quorum). {told}")


def pause(seconds: float, reason: str, watcher: Watcher, answered: int, wanted: int, write: Callable[..., None]) -> None:
    """Nobody waits in silence: the journal, the log and the watcher are told first; not of each of a thousand clients."""
    reason = one_line(reason, LONGEST_REASON)
    write("waiting", reason=reason, seconds=seconds, answered=answered, wanted=wanted)
    log.warning("%d of %d answers came; who is missing is asked again in %g s: %s", answered, wanted, seconds, reason)
    watcher.doing("waiting for a quorum", answered, wanted)
    time.sleep(seconds)
