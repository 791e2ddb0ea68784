"""Parts that make no message are a reply that did not come, and the run goes on; fetched by Flower's own Grid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflate_object_from_contents
from flwr.superlink.grid import http_grid

from server.fetching import SOONER, Fetch, fetch_well


def message() -> Message:
    metadata = Metadata(1, "", 2, 3, "asked", "", 0.0, 60.0, "query")
    return Message(metadata=metadata, content=RecordDict({"c": ConfigRecord({"json": "{}"})}))


def parts_of(message: Message) -> dict[str, bytes]:
    """As they lie in the SuperLink; the message's own last."""
    objects = get_all_nested_objects(message)
    found = {id: found.deflate() for id, found in objects.items()}
    own = found.pop(message.object_id)
    return {**found, message.object_id: own}


def fetch(parts: dict[str, bytes]) -> Fetch:
    return Fetch(lambda ids: {id: parts[id] for id in ids}, inflate_object_from_contents)


def test_a_message_is_put_together_once() -> None:
    parts = parts_of(message())
    given = fetch(parts)
    fetched = given.pull(list(parts))
    assert given.inflate(list(parts)[-1], fetched).metadata.reply_to_message_id == "asked"


def garbled() -> Iterator[dict[str, bytes]]:
    """Each part in its turn with a right head, which is all that the SuperLink looks at, and a body of nonsense."""
    parts = parts_of(message())
    for id, content in parts.items():
        head, _, _ = content.partition(b"\0")
        yield {**parts, id: head + b"\0" + b"\xff\x00{[" * 9}


@pytest.mark.parametrize("parts", list(garbled()))
def test_nonsense_is_an_answer_that_did_not_come(parts: dict[str, bytes]) -> None:
    with pytest.raises(ObjectPullError, match="it is no message"):
        fetch(parts).pull(list(parts))


def test_a_part_in_place_of_the_message_is_none() -> None:
    parts = parts_of(message())
    with pytest.raises(ObjectPullError, match="it is no message"):
        fetch(parts).pull(list(parts)[:-1])


def test_flower_s_grid_fetches_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, however often it is called; the names are those that the Grid uses."""
    for name in ("pull_objects", "inflate_object_from_contents"):
        monkeypatch.setattr(http_grid, name, getattr(http_grid, name))
    fetch_well()
    first = http_grid.pull_objects
    fetch_well()
    assert http_grid.pull_objects == first
    assert isinstance(first.__self__, Fetch)
    assert first.__self__._pull.keywords == SOONER
    assert "pull_objects(" in Path(http_grid.__file__).read_text(encoding="utf-8")
