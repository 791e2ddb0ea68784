"""What stays the same over all rounds of a run, and what is under way between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from fedtune.base import Blueprint
from fedtune.job import Job
from fedtune.strategy import ClientInfo, Strategy
from fedtune.wire.ends import ServerEnd
from server.at_work import AtWork
from server.journal import Journal
from server.late import UnderWay
from server.post import OPEN, Post
from server.records import Watcher
from server.roll import Roll


@dataclass(frozen=True)
class Federation:
    job: Job
    strategy: Strategy
    plan: Blueprint
    grid: Grid
    roll: Roll
    watcher: Watcher
    wire: ServerEnd
    journal: Journal
    run: str  # its name in every message, and in no other run's
    at_work: AtWork
    post: Post = OPEN
    under_way: UnderWay = field(default_factory=UnderWay)

    @property
    def clients(self) -> Mapping[str, ClientInfo]:
        return self.roll.clients
