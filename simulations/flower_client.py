"""Flower's ClientApp for Ray's workers: each worker process keeps one trainer, and answers for whichever client it is given."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.data.sources import clients_in
from client.names import folder_name
from client.trainer import Trainer, with_labels
from client.transport import failure
from fedtune.envelope import Envelope
from fedtune.errors import FedtuneError
from fedtune.job import checked_job
from fedtune.messages import from_record, to_record

MEMORY = "clients"  # in the run's folder while it runs; what stays there is the clients' own adapters

app = ClientApp()


class Worker(Trainer):
    """A client's next ask may go to another worker, so memory is read from disk for each."""

    def answer(self, envelope: Envelope, client: str | None = None) -> Envelope:
        self._memories.reread(client or self.clients[0])
        return super().answer(envelope, client)

    def _own_folder(self, client: str) -> Path | None:
        return self._directory / folder_name(client) / "adapter" if self._directory else None


@app.query()
def answer(message: Message, context: Context) -> Message:
    ask = from_record(message.content)
    try:
        worker = worker_of(str(context.run_config["job"]), str(context.run_config["folder"]))
        client = worker.clients[int(context.node_config["partition-id"])]
        given = worker.answer(ask, client)
    except FedtuneError as error:
        given = failure(str(error), ask.header)
    return Message(to_record(given), reply_to=message)


@lru_cache(maxsize=1)
def worker_of(job_json: str, folder: str) -> Worker:
    """Made at this process's first ask of the run, which need not be its client's `hello`: the job is in the run's config."""
    job = checked_job(json.loads(job_json), "the run's config")
    sources = clients_in(job.data, job.clients)
    return Worker(with_labels(job, sources), sources, Path(folder) / MEMORY)
