"""A run as TensorBoard scalars: `tensorboard --logdir runs`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from fedtune.job import Job
from server.records import Comparison, RoundRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class TensorBoard:
    """Writes `folder/events/`, from its first round. Each round is on disk when `round_ended` returns."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: SummaryWriter | None = None

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._open is not None:
            with suppress(OSError):
                self._open.close()

    def started(self, job: Job, clients: Mapping[str, int]) -> None: ...

    def doing(self, what: str, done: int, total: int) -> None: ...

    def round_ended(self, record: RoundRecord) -> None:
        """On a disk that is full a run has worse troubles than this, and says so itself."""
        try:
            writer = self._writer()
            for tag, value in _scalars(record):
                writer.add_scalar(tag, value, record.round)
            writer.flush()
        except OSError as error:
            log.warning("round %d is not in %s: %s", record.round, self._folder / "events", error.strerror or error)

    def compared(self, comparison: Comparison) -> None: ...

    def _writer(self) -> SummaryWriter:
        """Opened at the first record: before that the run folder is not ours to write into."""
        if self._open is None:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self._open = SummaryWriter(str(self._folder / "events"))
        return self._open


def _scalars(record: RoundRecord) -> Iterator[tuple[str, float]]:
    """The part of a tag before its slash is the group that TensorBoard draws together."""
    if record.loss is not None:
        yield "round/loss", record.loss
    yield "round/seconds", record.seconds
    yield "round/answered", record.answered
    yield "bytes/down", record.bytes_down
    yield "bytes/up", record.bytes_up
    if record.ratio is not None:
        yield "bytes/ratio_to_plain", record.ratio
    yield from ((f"metrics/{name}", value) for name, value in record.metrics.items())
    yield from ((f"aggregation_error/{path}", error) for path, error in record.layer_errors.items())
    for name, client in record.clients.items():
        if client.loss is not None:
            yield f"client_loss/{name}", client.loss
