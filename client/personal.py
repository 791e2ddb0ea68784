"""A client's own adapter, as a PEFT folder: what a personal method leaves with each client, beside what is published."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from client.names import folder_name as folder_name
from fedtune import __version__
from fedtune.adapter import Adapter
from fedtune.base import Blueprint
from fedtune.job import Job
from fedtune.peft_folder import write_adapter
from fedtune.strategy import Strategy


def write_own(folder: Path, adapter: Adapter, job: Job, plan: Blueprint, strategy: Strategy, client: str, round: int) -> None:
    """Write the adapter that `strategy.use` loaded for this client, as it was after this round."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, adapter, job, plan, _provenance(adapter, job, strategy, client, round))


def _provenance(adapter: Adapter, job: Job, strategy: Strategy, client: str, round: int) -> dict[str, Any]:
    return {
        "fedtune": __version__,
        "base": adapter.base,
        "base_path": job.model.path,
        "client": client,
        "strategy": {"name": job.strategy.name, **asdict(strategy)},  # type: ignore[call-overload]
        "round": round,
        "rounds": job.rounds.count,
        "seed": job.seed,
    }
