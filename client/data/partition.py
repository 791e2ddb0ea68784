"""Partitions for simulation: new clients, among whom the examples of the clients in the data are dealt out.

What is held out is chosen before, in the data's own clients, so that all clients together have the same held-out examples
under every partition, and a loss on everybody's compares like with like. What is dealt are encoded examples, of
`data.max_length` tokens at most, since rows may be as coarse as whole files.

iid: all examples are one heap, and every client gets an equal part of it.
dirichlet: every topic is a heap of its own, of which the clients get shares drawn from a symmetric Dirichlet distribution
(Yurochkin et al. 2019, arXiv 1905.12022, section 4). A topic is a client of the data, or in classification a label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from client.data.compact import compact
from client.data.examples import ClientData, Labelled
from fedtune.errors import DataError
from fedtune.job import Data
from fedtune.seeds import generator, seed_of

if TYPE_CHECKING:
    from client.data.sources import Source

Topic = str | int
Shares = Mapping[Topic, Sequence[float]]  # of each topic, client by client; they sum to 1
Settings = tuple[Data, str, Any, int, Sequence[str] | None]  # data, task, tokenizer, seed, labels


class Pool:
    """The examples of the clients in the data, read and dealt out when the first of the new clients is asked for its part."""

    def __init__(self, sources: Sequence[Source], count: int) -> None:
        self.sources = sources
        self.clients = tuple(f"client-{number:0{max(2, len(str(count - 1)))}}" for number in range(count))
        self._settings: Settings | None = None
        self._parts: Mapping[str, ClientData] = {}

    def part(self, client: str, settings: Settings, split: Callable[..., ClientData]) -> ClientData:
        """One client's examples; `split(source, *settings)` reads one of the sources. Raises DataError."""
        if settings != self._settings:
            self._parts, self._settings = self._dealt(settings, split), settings
        return self._parts[client]

    def _dealt(self, settings: Settings, split: Callable[..., ClientData]) -> dict[str, ClientData]:
        data, seed = settings[0], settings[3]
        found = {source.name: split(source, *settings) for source in self.sources}
        train = [(topic_of(one, name, data), one) for name, its in found.items() for one in its.train]
        held_out = [(topic_of(one, name, data), one) for name, its in found.items() for one in its.held_out]
        if len(train) < len(self.clients):
            raise DataError(
                f"clients.count = {len(self.clients)}, but {data.path} has {len(train)} training examples to deal out "
                f"(data.partition = '{data.partition}'); type --set clients.count={len(train)}, or add data"
            )
        shares = {topic: shares_of(topic, len(self.clients), data, seed) for topic, _ in train + held_out}
        hands = zip(deal(train, shares, seed, "train"), deal(held_out, shares, seed, "held-out"), strict=True)
        return {
            client: ClientData(compact(own), compact(own_held_out))
            for client, (own, own_held_out) in zip(self.clients, hands, strict=True)
        }


def topic_of(example: Any, source: str, data: Data) -> Topic:
    """The heap that an example lies on."""
    if data.partition == "iid":
        return "all"
    return example.label if isinstance(example, Labelled) else source


def shares_of(topic: Topic, clients: int, data: Data, seed: int) -> Sequence[float]:
    """Each client's share of a topic: training and held-out examples are cut by the same ones."""
    if data.partition == "iid":
        return [1 / clients] * clients
    draw = np.random.Generator(np.random.Philox(key=seed_of(seed, "partition", topic)))
    return draw.dirichlet([data.concentration] * clients).tolist()


def deal(examples: Sequence[tuple[Topic, Any]], shares: Shares, *names: object) -> list[list[Any]]:
    """Each client's examples, in the order in which they came; `names` seed which of a topic they are."""
    hands: list[list[int]] = [[] for _ in next(iter(shares.values()))]
    for topic, parts in shares.items():
        heap = [number for number, (its, _) in enumerate(examples) if its == topic]
        order = torch.randperm(len(heap), generator=generator(*names, "partition", topic)).tolist()
        ends = np.rint(np.cumsum(parts) * len(heap)).astype(int).tolist()
        for hand, begin, end in zip(hands, [0, *ends], [*ends[:-1], len(heap)], strict=False):
            hand.extend(heap[place] for place in order[begin:end])
    _leave_none_empty(hands)
    return [[examples[number][1] for number in sorted(hand)] for hand in hands]


def _leave_none_empty(hands: list[list[int]]) -> None:
    """Who got nothing takes one example from whoever has most then, where there are enough for all."""
    if sum(map(len, hands)) >= len(hands):
        for hand in hands:
            if not hand:
                hand.append(max(hands, key=len).pop())
