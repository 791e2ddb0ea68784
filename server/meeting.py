"""Before the first round: every node is told the job and says who it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from flwr.serverapp import Grid

from fedtune.base import Blueprint, pinned
from fedtune.envelope import UNKNOWN_RUN, Envelope
from fedtune.errors import ClientFailed, RoundFailed
from fedtune.job import Job
from fedtune.strategy import Ask, ClientInfo
from fedtune.wire import pack_ask
from server.exchange import Reply, exchange
from server.post import OPEN, Post
from server.report_units import one_line
from server.tally import LONGEST_REASON

LIMITS = ("layers", "memory", "seconds")  # what a client may say that it can afford


Met = tuple[dict[str, ClientInfo], dict[str, int]]  # what each client says of itself, and its node, by client id


def meet(grid: Grid, job: Job, plan: Blueprint, post: Post = OPEN, run: str = "") -> Met:
    """Say hello to every node. Those that cannot take part, or have another base model, are left out. Raises RoundFailed when
    too few remain."""
    wanted, left_out = job.clients.count or 1, list[str]()
    # one that is wanted and away may come back
    clients, nodes = greet(grid, grid.get_node_ids(), job, plan, post, run, job.rounds.timeout, wanted, left_out.append)
    if len(clients) < wanted:
        reasons = f": {'; '.join(left_out)}" if left_out else ""
        raise RoundFailed(f"{len(clients)} clients can take part, wanted {wanted} (clients.count){reasons}")
    return clients, nodes


def greet(
    grid: Grid,
    whom: Iterable[int],
    job: Job,
    plan: Blueprint,
    post: Post,
    run: str,
    timeout: float,
    enough: int = 0,
    left_out: Callable[[str], object] = lambda reason: None,
) -> Met:
    """Say hello to these nodes; of those that are left out, `left_out` hears why."""
    hello = pack_ask(Ask("hello"), "", {"ask": "hello", "run": run or job.name, "job": job.model_dump(mode="json")})
    clients: dict[str, ClientInfo] = {}
    nodes: dict[str, int] = {}
    for reply in exchange(grid, dict.fromkeys(whom, hello), timeout, post, enough=enough):
        try:
            info = _introduced(reply, plan.adapter.base)
            _require_possible(info, job, plan)
            if job.clients.names and info.id not in job.clients.names:
                raise ClientFailed(f"{info.id}: it is none of those that the job names (clients.names)")
            if info.id in clients:
                raise ClientFailed(f"node {reply.node}: a client named '{info.id}' is already here, names must differ")
        except ClientFailed as reason:
            left_out(one_line(str(reason), LONGEST_REASON))
        else:
            clients[info.id], nodes[info.id] = info, reply.node
    return {id: with_the_job(info, job, plan) for id, info in sorted(clients.items())}, nodes


def wants_hello(answer: Envelope) -> bool:
    """Whether it is the failure of a client that has heard another run since, or nothing."""
    return "failed" in answer.header and answer.header.get(UNKNOWN_RUN) is True


def _introduced(reply: Reply, base: str) -> ClientInfo:
    if reply.envelope is None:
        raise ClientFailed(f"node {reply.node}: {reply.failed}")
    header = reply.envelope.header
    if "failed" in header:
        raise ClientFailed(f"{header.get('client', reply.node)}: {header['failed']}")
    if header.get("base") != base:
        raise ClientFailed(
            f"{header.get('client')}: its base model is {header.get('base')}, wanted {base}: give it the same files"
        )
    try:
        limits = {str(name): float(value) for name, value in dict(header.get("limits", {})).items()}
        own = str(header["client"]), int(header["examples"]), int(header["rank"]), float(header["scale"])
        own[0].encode()  # files and seeds are made of it
        info = ClientInfo(*own, limits=limits)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ClientFailed(f"node {reply.node}: its hello cannot be read: {error}") from error
    if info.examples < 1 or info.rank < 1 or not 0 < info.scale < math.inf:
        raise ClientFailed(f"{info.id}: it says {info}; wanted examples and rank of at least 1, and a scale above 0")
    if odd := {name: value for name, value in limits.items() if name not in LIMITS or not 0 < value < math.inf}:
        raise ClientFailed(f"{info.id}: it says that it can afford {odd}; wanted {', '.join(LIMITS)}, each above 0")
    return info


def with_the_job(info: ClientInfo, job: Job, plan: Blueprint) -> ClientInfo:
    """And what the job says of this client."""
    pins = pinned(job, plan.adapter.lora, info.rank, info.scale)
    return replace(info, pinned=pins, steps=job.train.steps_for(info.examples), lr=job.train.lr, sizes=plan.sizes)


def _require_possible(info: ClientInfo, job: Job, plan: Blueprint) -> None:
    """Memory on the server and the client's say grow with these numbers, which are only claimed."""
    most = max(min(pair.shape) for pair in plan.adapter.lora.values())
    if info.rank > most:
        raise ClientFailed(f"{info.id}: its rank is more than {most}, which no module of this model can take")
    if info.examples > job.rounds.max_weight:
        raise ClientFailed(f"{info.id}: it claims more than {job.rounds.max_weight:g} examples (rounds.max_weight)")
