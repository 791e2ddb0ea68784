"""Which stages there are: the built-in ones, those of installed packages, those of this process, and files that a job names.

The door is that of strategies: an entry point of the group `fedtune.stages`, `@register`, or `file.py:Class` in the job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedtune.errors import JobError, nearest
from fedtune.registry import all_names, enter, module_of
from fedtune.wire.stage import Stage

GROUP = "fedtune.stages"
BUILT_IN = {
    "bf16": "fedtune.wire.floats:Bf16",
    "common": "fedtune.wire.common:Common",
    "delta_come": "fedtune.wire.delta_come:DeltaCoMe",
    "fp16": "fedtune.wire.floats:Fp16",
    "fp32": "fedtune.wire.floats:Fp32",
    "int2": "fedtune.wire.integers:Int2",
    "int4": "fedtune.wire.integers:Int4",
    "int8": "fedtune.wire.integers:Int8",
    "powersgd": "fedtune.wire.powersgd:PowerSGD",
    "randk": "fedtune.wire.randk:RandK",
    "rotate": "fedtune.wire.rotate:Rotate",
    "ternary": "fedtune.wire.ternary:Ternary",
    "topk": "fedtune.wire.topk:TopK",
    "uniform": "fedtune.wire.uniform:Uniform",
}
REGISTERED: dict[str, type[Stage]] = {}
Class = TypeVar("Class", bound=type[Stage])


def register(cls: Class) -> Class:
    """Let codecs of this process name a class that lies in no file: `@register` above it. Raises JobError."""
    enter(cls, known(), REGISTERED, JobError)
    return cls


def known() -> dict[str, str]:
    """Every name that a codec may use, with the `module:Class` behind it."""
    return all_names(GROUP, REGISTERED, BUILT_IN)


def stage_class(name: str) -> type[Stage]:
    """Raises JobError, with what would have been right."""
    if name in REGISTERED:
        return REGISTERED[name]
    module, _, attribute = (BUILT_IN.get(name) or known().get(name, name)).rpartition(":")
    if not module:
        raise JobError(
            f"unknown stage '{name}'{nearest(name, known())}; known are {', '.join(known())}, entropy, or 'file.py:Class'"
        )
    found = getattr(module_of(module, name, "stage", JobError), attribute, None)
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise JobError(f"'{name}' was given, but '{attribute}' in it is no subclass of fedtune.wire.stage.Stage")
    return found


def stage_from(name: str, given: Sequence[str]) -> Stage:
    """The stage with its settings: in order, or `key=value`."""
    cls = stage_class(name)
    if not is_dataclass(cls):
        raise JobError(f"stage '{name}' must be a dataclass: put @dataclass(frozen=True) above class {cls.__name__}")
    names = [field.name for field in fields(cls) if field.init]
    settings: dict[str, Any] = {}
    for place, text in enumerate(given):
        key, equals, value = text.partition("=")
        key = key.strip() if equals else names[place] if place < len(names) else ""
        if key not in names or key in settings:
            raise JobError(f"stage '{name}' was given '{text}'; its settings are, in order: {', '.join(names) or 'none'}")
        settings[key] = (value if equals else text).strip()
    try:
        return TypeAdapter(cls).validate_python(settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise JobError(f"stage '{name}', setting '{where}': {first['msg']}, given {first['input']!r}") from error
