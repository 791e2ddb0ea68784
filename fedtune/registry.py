"""From a name in the job file to a Strategy: a built-in, installed or registered name, `package.module:Class`, or
`file.py:Class`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedtune.errors import StrategyError, UserError, nearest
from fedtune.strategy import Strategy

GROUP = "fedtune.strategies"
# The same lines stand in pyproject.toml as entry points; here they serve a checkout that was not installed.
BUILT_IN = {
    "decomfl": "strategies.decomfl:DeComFL",
    "fed_sb": "strategies.fed_sb:FedSB",
    "fedavg": "strategies.fedavg:FedAvg",
    "fedex_lora": "strategies.fedex_lora:FedExLoRA",
    "fedkseed": "strategies.fedkseed:FedKSeed",
    "fedprox": "strategies.fedprox:FedProx",
    "fedsa_lora": "strategies.fedsa_lora:FedSALoRA",
    "fedsvd": "strategies.fedsvd:FedSVD",
    "ferret": "strategies.ferret:Ferret",
    "ffa_lora": "strategies.ffa_lora:FfaLora",
    "flexlora": "strategies.flexlora:FlexLoRA",
    "flora": "strategies.flora:FLoRA",
    "flower": "strategies.flower:Flower",
    "hetlora": "strategies.hetlora:HetLoRA",
    "lora_fair": "strategies.lora_fair:LoraFair",
    "mezo": "strategies.mezo:MeZO",
    "rolora": "strategies.rolora:RoLoRA",
    "scaffold": "strategies.scaffold:Scaffold",
    "selective_layers": "strategies.selective_layers:SelectiveLayers",
}


REGISTERED: dict[str, type[Strategy]] = {}
Class = TypeVar("Class", bound=type[Strategy])


def register(cls: Class) -> Class:
    """Let jobs of this process name a class that lies in no file, such as one in a notebook: `@register` above it.

    Raises StrategyError where its name belongs to another method.
    """
    enter(cls, known(), REGISTERED, StrategyError)
    return cls


def known() -> dict[str, str]:
    """Every name that a job may use, with the `module:Class` behind it."""
    return all_names(GROUP, REGISTERED, BUILT_IN)


def enter(cls: type, names: Mapping[str, str], registered: dict[str, Any], wrong: type[UserError]) -> None:
    """Into what this process has registered, under its own name. Raises `wrong` where it has none, or another's."""
    name = getattr(cls, "name", None)
    if not isinstance(name, str):
        raise wrong(f"{cls.__name__} has no name to register: add `name: ClassVar[str] = ...`")
    if name in names and name not in registered:
        raise wrong(f"the name '{name}' belongs to {names[name]}; give {cls.__name__} another")
    registered[name] = cls


def all_names(group: str, registered: Mapping[str, type], built_in: Mapping[str, str]) -> dict[str, str]:
    """Of installed packages, of this process, and the built-in ones, which nobody replaces."""
    installed = {point.name: point.value for point in entry_points(group=group)}
    here = {name: f"{cls.__module__}:{cls.__qualname__}" for name, cls in registered.items()}
    return dict(sorted({**installed, **here, **built_in}.items()))


def able(capability: str) -> list[str]:
    """The known strategies whose class says so: `mixed_ranks`, `secure_sum`, `personal`, `exact`."""
    return [name for name in known() if getattr(_class_or_none(name), capability, False)]


def _class_or_none(name: str) -> type[Strategy] | None:
    try:
        return strategy_class(name)
    except StrategyError:  # a broken plug-in is no reason to fail here
        return None


def strategy_class(name: str) -> type[Strategy]:
    """Raises StrategyError, with what would have been right."""
    if name in REGISTERED:
        return REGISTERED[name]
    reference = BUILT_IN.get(name) or known().get(name, name)  # to look through what is installed takes milliseconds
    module, _, attribute = reference.rpartition(":")
    if not module:
        names = ", ".join(known())
        raise StrategyError(f"unknown strategy '{name}'{nearest(name, known())}; known are {names}, or 'file.py:Class'")
    found = getattr(module_of(module, name), attribute, None)
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise StrategyError(f"'{name}' was given, but '{attribute}' in it is no subclass of fedtune.strategy.Strategy")
    return found


def settings_of(name: str) -> list[str]:
    """The names of a method's settings. Raises StrategyError."""
    cls = strategy_class(name)
    if not is_dataclass(cls):
        raise StrategyError(f"strategy '{name}' must be a dataclass: put @dataclass(frozen=True) above class {cls.__name__}")
    return [field.name for field in fields(cls) if field.init]


def strategy_from(name: str, settings: Mapping[str, Any]) -> Strategy:
    """The strategy with its settings, each checked against the type of its field."""
    cls, known_settings = strategy_class(name), settings_of(name)
    for key in settings:
        if key not in known_settings:
            has = f"its settings are {', '.join(known_settings)}" if known_settings else "it has no settings"
            raise StrategyError(f"strategy '{name}' has no setting '{key}'{nearest(key, known_settings)}; {has}")
    try:
        return TypeAdapter(cls).validate_python(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StrategyError(f"strategy '{name}', setting '{where}': {first['msg']}, given {first['input']!r}") from error


def module_of(reference: str, name: str, what: str = "strategy", wrong: type[UserError] = StrategyError) -> ModuleType:
    """What stands before the colon of `package.module:Class` or `file.py:Class`. Raises `wrong`, which says `name`."""
    is_file = reference.endswith(".py") or "/" in reference
    try:
        return _module_of_file(Path(reference)) if is_file else importlib.import_module(reference)
    except Exception as error:  # a plug-in can raise anything while it is imported
        reason = str(error) if isinstance(error, (ImportError, OSError)) else f"{type(error).__name__}: {error}"
        raise wrong(f"{what} '{name}' cannot be loaded: {reason}; wanted 'file.py:Class' or 'package.module:Class'") from error


def _module_of_file(path: Path) -> ModuleType:
    path = path.with_suffix(".py").expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"fedtune_plugin_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
