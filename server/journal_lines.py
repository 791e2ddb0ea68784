"""What each line of the journal must hold for a run to go on by it. A line that is whole and does not hold it counts as
damaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.fields import Fits, above_0, each, exactly, flag, holds, some, text, whole


def fits(what: str, about: Mapping[str, Any]) -> bool:
    """Lines that nothing depends on may say what they like."""
    return holds(about, MUST.get(what, {}), MAY.get(what, {}))


def _failure(value: Any) -> bool:
    return isinstance(value, dict) and holds(value, {"reason": text}, FAILED)


CLIENT = exactly(examples=lambda value: whole(value) and value > 0, rank=whole, scale=above_0, limits=each(above_0))
COST = exactly(bytes=whole, header=whole, transport=whole, plain=whole)
FAILED: Mapping[str, Fits] = {"has": flag, "diverged": flag, "refused": flag}
MUST: Mapping[str, Mapping[str, Fits]] = {
    "started": {"run": text, "clients": each(CLIENT), "nodes": each(whole)},
    "round": {"number": whole, "cohort": some(text)},
    "asked": {"ask": text, "clients": some(text)},
    "answered": {"ask": text, "client": text, "digest": text, "cost": COST},
    "failed": {"ask": text, "client": text, "reason": text},
    "closed": {"ask": text, "answered": some(text), "failed": each(_failure)},
    "state": {"round": whole},
}
MAY: Mapping[str, Mapping[str, Fits]] = {
    "answered": {"whole": flag, "late": exactly(ask=text, rounds=whole)},
    "failed": FAILED,
}
