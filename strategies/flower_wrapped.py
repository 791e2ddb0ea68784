"""One instance of a Flower strategy class: made by name, its memory taken out and put back, its aggregation called.

In strategies/ only this file and flower_memory.py know Flower.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, Metadata, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fedtune.errors import RoundFailed, StrategyError, nearest
from fedtune.registry import module_of
from fedtune.strategy import Answer
from strategies.flower_memory import changed, put_back

Tensors = Mapping[str, Tensor]
KEYS = (("arrayrecord_key", "arrays"), ("weighted_by_key", "num-examples"))  # attributes that name records, and the usual names

REFUSED = {
    flower.FedProx: "its server half is FedAvg's, what it is known for is done by clients: --set strategy.name=fedprox",
    flower.FedXgbBagging: "it joins the trees of XGBoost, not tensors",
    flower.FedXgbCyclic: "it hands on the trees of XGBoost, not tensors",
    flower.DifferentialPrivacyServerSideFixedClipping: "it is put around another strategy's object",
    flower.DifferentialPrivacyServerSideAdaptiveClipping: "it is put around another strategy's object",
    flower.DifferentialPrivacyClientSideFixedClipping: "it is put around another strategy's object, and clients must clip",
    flower.DifferentialPrivacyClientSideAdaptiveClipping: "it is put around another strategy's object, and clients must clip",
}
WAITED_FOR = ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes")
NOT_OPTIONS = {  # what fedtune says itself, with where
    **dict.fromkeys(
        (*WAITED_FOR, "fraction_train", "fraction_evaluate"), "rounds.clients and rounds.quorum say who takes part"
    ),
    **dict.fromkeys(("weighted_by_key", "arrayrecord_key", "configrecord_key"), "records are named by fedtune"),
    **dict.fromkeys(("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"), "metrics are averaged by fedtune"),
}


class Wrapped:
    """A Flower strategy for one round. Raises StrategyError where the name or an option is wrong."""

    def __init__(self, reference: str, options: Mapping[str, Any]) -> None:
        self.name, self._class = reference, class_named(reference)
        checked = _checked(self.name, self._class, options)
        self._instance, self._fresh = self._made(checked), self._made(checked)

    def _made(self, options: Mapping[str, Any]) -> Any:
        try:
            made = self._class(**options)
        except Exception as error:  # whatever a constructor may raise
            raise StrategyError(f"Flower's {self.name} takes no such options {dict(options)}: {error}") from error
        for name in WAITED_FOR:  # else it would wait for nodes that never come
            if hasattr(made, name):
                setattr(made, name, 0)
        return made

    def aggregated(self, number: int, sent: Tensors, answers: Sequence[Answer]) -> dict[str, Tensor]:
        """The new tensors in round `number`, from what was sent and what came back."""
        nobody: Any = SimpleNamespace(get_node_ids=list)  # the clients were asked by us: configure_train only takes its notes
        with _quiet() as heard:
            try:
                list(self._instance.configure_train(number, _record(sent), ConfigRecord(), nobody))
                arrays, _ = self._instance.aggregate_train(number, self._replies(answers))
            except Exception as error:
                raise StrategyError(
                    f"Flower's {self.name} failed in round {number}: {type(error).__name__}: {error}"
                ) from error
        if arrays is None:
            raise RoundFailed(f"Flower's {self.name} made nothing of {len(answers)} answers: {' '.join(heard)}")
        return self._fitting({name: torch.from_numpy(np.array(array.numpy())).float() for name, array in arrays.items()}, sent)

    def _fitting(self, given: dict[str, Tensor], sent: Tensors) -> dict[str, Tensor]:
        for name in given.keys() | sent.keys():
            if name not in given or name not in sent or given[name].shape != sent[name].shape:
                raise StrategyError(f"Flower's {self.name} must give back the arrays that it got, '{name}' is other")
            if not torch.isfinite(given[name]).all():
                raise RoundFailed(f"Flower's {self.name} made '{name}' infinite: its steps are too large")
        return given

    def _replies(self, answers: Sequence[Answer]) -> list[Message]:
        arrays, weight = (getattr(self._instance, key, usual) for key, usual in KEYS)
        common = set.intersection(*(set(answer.metrics) for answer in answers))
        replies = []
        for node, answer in enumerate(answers, start=1):
            metrics = {name: float(answer.metrics[name]) for name in sorted(common)}
            loss = {"train_loss": metrics["loss"]} if "loss" in metrics else {}
            numbers = MetricRecord({**loss, **metrics, weight: float(answer.weight)})
            replies.append(_reply(node, RecordDict({arrays: _record(answer.payload.tensors), "metrics": numbers})))
        return replies

    def remembered(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        try:
            return changed(self._instance, self._fresh)
        except TypeError as error:
            raise StrategyError(f"Flower's {self.name} {error}") from error

    def restore(self, tensors: Tensors, scalars: Mapping[str, float]) -> None:
        put_back(self._instance, tensors, scalars)


# names and options


def class_named(reference: str) -> type[flower.Strategy]:
    module, _, attribute = reference.rpartition(":")
    found = getattr(module_of(module, reference) if module else flower, attribute, None)
    if not (isinstance(found, type) and issubclass(found, flower.Strategy)) or found is flower.Strategy:
        names = known()
        raise StrategyError(
            f"Flower has no strategy '{reference}'{nearest(reference, names)}; known are {', '.join(names)}, "
            "or 'package.module:Class' or 'file.py:Class' of one's own"
        )
    for refused, reason in REFUSED.items():
        if issubclass(found, refused):
            raise StrategyError(f"Flower's {reference} cannot be wrapped: {reason}")
    return found


def known() -> list[str]:
    classes = [getattr(flower, name) for name in flower.__all__]
    usable = [one for one in classes if issubclass(one, flower.FedAvg) and not issubclass(one, tuple(REFUSED))]
    return sorted(one.__name__ for one in usable)


def _checked(name: str, cls: type[flower.Strategy], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, as the types that the constructor names."""
    taken = inspect.signature(cls).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    names = [key for key, parameter in taken.items() if key not in NOT_OPTIONS and parameter.kind is not parameter.VAR_KEYWORD]
    for key in options:
        if key in NOT_OPTIONS:
            raise StrategyError(f"strategy.options.{key} is no option of Flower's {name} here: {NOT_OPTIONS[key]}")
        if key not in names and not anything:
            has = f"its options are {', '.join(names)}" if names else "it has no options"
            raise StrategyError(f"Flower's {name} has no option '{key}'{nearest(key, names)}; {has}")
    return {key: _typed(name, key, value, taken) for key, value in options.items()}


def _typed(name: str, key: str, value: Any, taken: Mapping[str, inspect.Parameter]) -> Any:
    wanted = taken[key].annotation if key in taken else None
    if wanted not in (bool, int, float, str):
        return value
    try:
        return TypeAdapter(wanted).validate_python(value)
    except ValidationError as error:
        raise StrategyError(f"Flower's {name}, option '{key}': wanted {wanted.__name__}, given {value!r}") from error


# records and logs


def _record(tensors: Tensors) -> ArrayRecord:
    """Sorted by name: some of Flower's classes go by the place of an array."""
    return ArrayRecord({name: Array(tensor.float().numpy()) for name, tensor in sorted(tensors.items())})


def _reply(node: int, content: RecordDict) -> Message:
    """As it would come from a node; a message in answer to another can only be made where Flower runs."""
    metadata = Metadata(
        run_id=0,
        message_id=str(node),
        src_node_id=node,
        dst_node_id=0,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=1.0,
        message_type=MessageType.TRAIN,
    )
    make: Any = Message  # Flower does not declare this way to make one
    message: Message = make(metadata=metadata, content=content)
    return message


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Flower's log lines are kept from the terminal; warnings are in the list."""
    log, heard = logging.getLogger("flwr"), list[str]()

    def hear(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            heard.append(record.getMessage())
        return False

    log.addFilter(hear)
    try:
        yield heard
    finally:
        log.removeFilter(hear)
