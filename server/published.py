"""A round's adapter, recipe or weights as a folder that stock PEFT or transformers load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.adapter import Adapter
from fedtune.base import Blueprint
from fedtune.changed_weights import ChangedWeights
from fedtune.job import Job
from fedtune.model_folder import drawn_weights
from fedtune.peft_folder import write_adapter
from fedtune.recipe import Recipe
from fedtune.recipe_file import write_recipe
from fedtune.weights_file import write_weights


def write_published(
    target: Path,
    published: Adapter | Recipe | ChangedWeights,
    job: Job,
    blueprint: Blueprint,
    provenance: Mapping[str, Any],
) -> None:
    """Into the new folder `target`, which is named by the kind."""
    about = {**provenance, "published": target.name, "lr": job.train.lr}
    if isinstance(published, Recipe):
        write_recipe(target, published, about)
    elif isinstance(published, ChangedWeights):
        write_weights(target, _with_what_is_drawn(published, job, blueprint), job, about)
    else:
        write_adapter(target, published, job, blueprint, provenance)


def _with_what_is_drawn(weights: ChangedWeights, job: Job, blueprint: Blueprint) -> ChangedWeights:
    """And what stock transformers would draw anew: heads, and what else a classifier's checkpoint lacks."""
    return replace(weights, values={**drawn_weights(job, blueprint), **weights.values})
