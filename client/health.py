"""What the trainer says of its health, on its own socket: whether it lives, and whether it has a job and its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fedtune.health import Health

TRAINER = "fedtune.Trainer"
Built = TypeVar("Built")


def trainer_health() -> Health:
    return Health([TRAINER])


def saying(build: Callable[[dict[str, Any]], Built], health: Health) -> Callable[[dict[str, Any]], Built]:
    """`build`, during which and after whose failure the trainer is not ready: the model of the job before has gone."""

    def built(job: dict[str, Any]) -> Built:
        health.say(TRAINER, False)
        trainer = build(job)
        health.say(TRAINER, True)
        return trainer

    return built
