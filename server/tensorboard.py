"""A run as TensorBoard scalars: `tensorboard --logdir runs`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from fedtune.job import Job
from server.records import Comparison, RoundRecord


class TensorBoard:
    """Writes `folder/events/`. Each round is on disk when `round_ended` returns."""

    def __init__(self, folder: Path):
        # torch.utils.tensorboard takes seconds to import: only those who want the events pay for it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "events"))

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._writer.close()

    def started(self, job: Job, clients: Mapping[str, int]) -> None: ...

    def doing(self, what: str, done: int, total: int) -> None: ...

    def round_ended(self, record: RoundRecord) -> None:
        for tag, value in _scalars(record):
            self._writer.add_scalar(tag, value, record.round)
        self._writer.flush()

    def compared(self, comparison: Comparison) -> None: ...


def _scalars(record: RoundRecord) -> Iterator[tuple[str, float]]:
    """The part of a tag before its slash is the group that TensorBoard draws together."""
    if record.loss is not None:
        yield "round/loss", record.loss
    yield "round/seconds", record.seconds
    yield "round/answered", record.answered
    yield "bytes/down", record.bytes_down
    yield "bytes/up", record.bytes_up
    yield from ((f"metrics/{name}", value) for name, value in record.metrics.items())
    for name, client in record.clients.items():
        if client.loss is not None:
            yield f"client_loss/{name}", client.loss
