"""Who sits out: a client whose answers were refused in so many rounds in a row is not asked for a while.

A round counts as refused if the gate refused anything of the client's in it; as accepted if all of it was let in; and not at
all if nothing came. After its time a client has one chance: refused once more, it sits out again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedtune.errors import RoundFailed
from fedtune.job import Job
from fedtune.job_sections import Gate
from server.quorum import quorum, wanted


@dataclass(frozen=True)
class Conduct:
    """Of a whole run, after a round. It lies in the checkpoint."""

    refused: Mapping[str, int] = field(default_factory=dict)  # rounds in a row
    until: Mapping[str, int] = field(default_factory=dict)  # the last round that a client sits out

    def out(self, number: int, gate: Gate) -> dict[str, int]:
        """Who sits out this round -> the last one that it does; by name."""
        return {client: last for client, last in sorted(self.until.items()) if number <= last} if gate.sits_out else {}

    def after(self, number: int, refused: Collection[str], accepted: Collection[str], gate: Gate) -> Conduct:
        """With what came of this round."""
        counts = {client: count for client, count in self.refused.items() if client not in accepted or client in refused}
        counts |= {client: min(counts.get(client, 0) + 1, gate.refusals) for client in refused}
        gone = [client for client in refused if counts[client] >= gate.refusals] if gate.sits_out else []
        until = {client: last for client, last in self.until.items() if last > number}
        return Conduct(dict(sorted(counts.items())), until | dict.fromkeys(sorted(gone), number + gate.sits_out))

    def sent_out(self, before: Conduct) -> dict[str, int]:
        """Who sits out from the next round on, and did not before -> the last round that it does."""
        return {client: last for client, last in sorted(self.until.items()) if before.until.get(client) != last}

    def as_json(self) -> dict[str, Any]:
        return {"refused": dict(self.refused), "until": dict(self.until)}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Conduct:
        return cls(dict(given["refused"]), dict(given["until"]))


def require_enough(job: Job, clients: Collection[str], out: Mapping[str, int], number: int) -> None:
    """Raises RoundFailed where so many sit out that the others are no quorum."""
    able, needed = len(clients) - len(out), quorum(job, wanted(job, len(clients)))
    if number and able < needed:
        raise RoundFailed(
            f"round {number}: {able} of {len(clients)} clients may take part, wanted {needed} (rounds.quorum); "
            f"{'; '.join(told(out))}, as their answers were refused (gate.refusals): the run goes on with --resume "
            "--set gate.sits_out=0"
        )


def told(out: Mapping[str, int]) -> list[str]:
    """For the notes of a round."""
    return [f"{client} sits out until round {last}" for client, last in out.items()]
