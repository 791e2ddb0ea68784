"""The estimate of what the network adds, against the objects that Flower really makes of a message."""

from __future__ import annotations

import time

import httpx
import numpy as np
import pytest
from flwr.app import Message, Metadata
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedtune.envelope import Envelope, WireTensor
from fedtune.messages import to_record
from fedtune.wire.transport import CALL, CHUNK, FULL, RECORD, REQUEST, transport_size

NODE, RUN, SESSION = Node(node_id=2**63 + 5), 2**63 + 7, "0" * 36


def envelope(tensors: int, size: int, header: int = 200) -> Envelope:
    """Every tensor has other bytes: Flower keeps one of two that are alike."""
    names = [f"model.layers.{number}.self_attn.q_proj.lora_A" for number in range(tensors)]
    rows = (np.random.default_rng(number).bytes(size) for number in range(tensors))
    return Envelope(
        {"ask": "x" * header},
        tuple(WireTensor(name, "float32", (8, 128), "fedtune.raw", row) for name, row in zip(names, rows, strict=True)),
    )


def flowers(envelope: Envelope, up: bool) -> int:
    """All bodies of all calls that move a message, by Flower's own classes, without what is the message's own."""
    metadata = Metadata(RUN, "", 2**63 + 5, 1, "f" * 64 if up else "", "", time.time(), 3600.0, "query")
    message = Message(metadata=metadata, content=to_record(envelope))
    objects, tree = get_all_nested_objects(message), get_object_tree(message)
    message.metadata.__dict__["_message_id"] = message.object_id
    bare = message_to_proto(Message(metadata=metadata, content=to_record(Envelope({}))))
    bare.ClearField("content")
    bodies = [ConfirmMessageReceivedRequest(node=NODE, run_id=RUN, message_object_id="f" * 64)]
    if up:
        about = PushMessagesRequest(node=NODE, messages_list=[bare], message_object_trees=[tree], clientapp_runtime_list=[1.0])
        bodies = [about, PushMessagesResponse(session_id=SESSION)]
    else:
        about = PullMessagesResponse(messages_list=[bare], message_object_trees=[tree])
        bodies += [PullMessagesRequest(node=NODE), about]
    for name, one in objects.items():
        content = one.deflate()
        if up:
            push = PushObjectRequest(node=NODE, run_id=RUN, object_id=name, object_content=content, session_id=SESSION)
            bodies += [push, PushObjectResponse(stored=True)]
        else:
            pull = PullObjectResponse(object_found=True, object_available=True, object_content=content)
            bodies += [PullObjectRequest(node=NODE, run_id=RUN, object_id=name), pull]
    sizes = [body.ByteSize() for body in bodies]
    records = sum(size // FULL for size in sizes) * RECORD
    return sum(sizes) + records + (len(objects) + 2) * CALL - envelope.size()


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize(("tensors", "size"), [(0, 0), (1, 30_000), (112, 4096), (3, 2 * CHUNK + 1), (2, 0)])
def test_the_estimate_is_near_what_flower_makes(tensors: int, size: int, up: bool) -> None:
    given = envelope(tensors, size)
    if size == 0:  # both arrays are alike then, and Flower sends one
        given = Envelope(given.header, given.tensors[:1])
    assert transport_size(given) == pytest.approx(flowers(given, up), rel=0.03)


def test_the_chunk_is_flowers() -> None:
    assert CHUNK == FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE


def test_the_head_of_a_request_is_as_long_as_we_say() -> None:
    """Of the real client, whose call ends in this process."""
    lengths = []

    def answer(request: httpx.Request) -> httpx.Response:
        line = f"{request.method} {request.url.raw_path.decode()} HTTP/1.1\r\n"
        heads = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        lengths.append(len(line + heads + "\r\n"))
        return httpx.Response(200, content=b"")

    proofs = [RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(*generate_key_pairs())]
    with FleetHttpClient.from_server_address("10.0.0.1:9092", True, None, interceptors=proofs) as client:
        client._client._transport.close()
        client._client._transport = httpx.MockTransport(answer)
        client.PullObject(PullObjectRequest(node=NODE, run_id=RUN, object_id="f" * 64))
    assert lengths[0] == pytest.approx(REQUEST, abs=15)


def test_many_messages_are_counted_in_no_time() -> None:
    """A thousand clients, packed and plain: far below a second."""
    packed, plain = envelope(1, 30_000), envelope(112, 4096)
    began = time.process_time()
    for _ in range(1000):
        transport_size(packed)
    assert time.process_time() - began < 0.2
    assert transport_size(plain) > 15 * transport_size(packed)  # 228 objects, and 6
