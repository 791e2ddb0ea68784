"""The relay: Flower's ClientApp, which carries each message to the node's trainer and its answer back.

`python -m client.relay` keeps it in one process. A stock flower-supernode starts a new one for every message, so it imports
nothing heavy; and it knows nothing of what it carries.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.transport import carry, failure
from fedtune.errors import ClientFailed, MalformedMessage, UserError
from fedtune.messages import from_record, to_record

SOCKET = "trainer-socket"

app = ClientApp()


@app.query()
def relay(message: Message, context: Context) -> Message:
    """A trainer that cannot be reached is an answer too: the reason belongs in the coordinator's report."""
    header: Mapping[str, Any] = {}
    try:
        ask = from_record(message.content)
        header = ask.header
        answer = carry(ask, trainer_socket(context))
    except (MalformedMessage, ClientFailed, UserError) as error:
        answer = failure(str(error), header)
    return Message(to_record(answer), reply_to=message)


def trainer_socket(context: Context) -> Path:
    path = context.node_config.get(SOCKET)
    if not path:
        raise UserError(
            f"this node does not say where its trainer is; start it with: flower-supernode --node-config '{SOCKET}=\"/path\"'"
        )
    return Path(str(path))
