"""Memory that runs out: the same work with fewer examples at a time has the bits of a job that asked for that size at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.data.examples import Example, single
from client.fit import evaluate, fit, gradient
from client.model import ResidentModel
from client.room import is_short, within_memory
from client.trainable import TrainableModel
from client.trainer import Trainer
from fedtune.adapter import Adapter
from fedtune.base import blueprint
from fedtune.directions import Directions
from fedtune.errors import ClientFailed
from fedtune.job import Job, Train
from fedtune.zeroth import Estimate

MakeJob = Callable[..., Job]
Ready = Callable[..., ResidentModel]
SGD = Train(optimizer="sgd", momentum=0.9, clip=0.5)
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory")


def example(seed: int, length: int) -> Example:
    ids = torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return single(ids, [True] * length)


BATCHES = [[example(0, 12), example(1, 5), example(2, 9), example(3, 3)], [example(4, 7), example(5, 4), example(6, 11)]]


@contextmanager
def room_for(resident: ResidentModel, examples: int, after: int = 0, error: BaseException = GPU) -> Iterator[list[int]]:
    """An allocator that has no room for more examples, once `after` passes have gone well: how many each pass tried."""
    tried: list[int] = []

    def allocate(module: nn.Module, given: Any, words: dict[str, Tensor]) -> None:
        tried.append(len(words["input_ids"]))
        if tried[-1] > examples and len(tried) > after:
            raise error

    hook = resident.peft.register_forward_pre_hook(allocate, with_kwargs=True)
    try:
        yield tried
    finally:
        hook.remove()


@pytest.fixture
def ready(make_job: MakeJob, draw_adapter: Callable[..., Adapter]) -> Ready:
    """A resident model with an adapter whose B is not zero in its slot. Dropout, so that draws count."""

    def make(*overrides: str) -> ResidentModel:
        resident = ResidentModel(make_job("adapter.dropout=0.2", *overrides))
        shapes = {path: (layer.out_features, layer.in_features) for path, layer in resident.lora.items()}
        resident.load(draw_adapter(shapes, 3), Adapter(), frozenset())
        torch.manual_seed(7)
        return resident

    return make


def parameters(resident: ResidentModel) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in resident.trainable()]


def equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def pull(live: Adapter) -> Tensor:
    return sum((w.square().sum() for pair in live.lora.values() for w in (pair.A, pair.B)), torch.zeros(()))


@pytest.mark.parametrize(("error", "after"), [(GPU, 0), (CPU, 1), (MemoryError(), 1)])
def test_steps_are_those_of_a_smaller_micro_batch(error: BaseException, after: int, ready: Ready) -> None:
    """After 1: the first half of a batch has left its gradient when there is no room for the second."""
    short, plain = ready(), ready()
    wanted = fit(plain, cycle(BATCHES), SGD.model_copy(update={"micro_batch": 1}), 3, 0.3, pull)
    torch.manual_seed(7)
    with room_for(short, 1, after, error) as tried:
        got = fit(short, cycle(BATCHES), SGD.model_copy(update={"micro_batch": 2}), 3, 0.3, pull)
    assert got == {**wanted, "micro_batch": 1.0}
    assert equal(parameters(short), parameters(plain))
    assert tried == [2] * (after + 1) + [1] * (4 + 3 + 4)  # what was too much is tried once, and never again


def test_a_penalty_that_does_not_fit_leaves_nothing_either(ready: Ready) -> None:
    short, plain, calls = ready(), ready(), list[int]()

    def heavy(live: Adapter) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            pull(live).backward()  # its gradient is there when memory ends
            raise GPU
        return pull(live)

    fit(plain, [BATCHES[0]], SGD.model_copy(update={"micro_batch": 2}), 1, 0.3, pull)
    torch.manual_seed(7)
    assert fit(short, [BATCHES[0]], SGD, 1, 0.3, heavy)["micro_batch"] == 2.0
    assert equal(parameters(short), parameters(plain))


def test_a_gradient_over_batches_counts_each_once(ready: Ready) -> None:
    """The first batch has left its gradient when there is no room for the second."""
    short, plain = ready(), ready()
    wanted = gradient(plain, BATCHES, 2)
    torch.manual_seed(7)
    with room_for(short, 2, after=1) as tried:
        got = gradient(short, BATCHES, None)
    for path, pair in got.lora.items():
        assert torch.equal(pair.A, wanted.lora[path].A)
        assert torch.equal(pair.B, wanted.lora[path].B)
    assert tried == [4, 3, 2, 2, 2, 1]
    assert all(parameter.grad is None for parameter in short.trainable())


def test_probes_and_losses_of_tensors_likewise(ready: Ready) -> None:
    """The first batch has left its norms when there is no room for the second."""

    def model(micro_batch: int | None) -> TrainableModel:
        train = Train(micro_batch=micro_batch)
        return TrainableModel(resident.weights(), lambda: cycle(BATCHES), train, 1, 0.1, fixed_draws)

    found = []
    for micro_batch in (2, None):
        resident = ready()
        one = model(micro_batch)
        with room_for(resident, 2, after=1):
            found.append((one.probe(list(one.shapes)[-3:], 2, signal=True), one.loss(2)))
    assert found[0] == found[1]
    assert all(probe.gradient > 0 and probe.signal > 0 for probe in found[0][0].values())


@contextmanager
def fixed_draws() -> Iterator[None]:
    torch.manual_seed(7)
    yield


@pytest.mark.parametrize(("where", "how"), [("whole", "two_sided"), ("whole", "forward"), ("adapter", "one_sided")])
def test_slopes_likewise_and_the_weights_are_where_they_were(where: Any, how: Any, make_job: MakeJob) -> None:
    """Memory ends in the second pass, while the weights are shifted: all passes are made again, with one at a time."""
    found, seeds = [], [3, 4]
    for micro_batch in ("1", "2"):
        trainer = Trainer.for_simulation(make_job(f"train.micro_batch={micro_batch}"))
        local = trainer.local("ann", 1)
        local.load(blueprint(trainer.job).adapter)
        model = local.movable(where)
        before = {name: parameter.detach().clone() for name, parameter in model.place.parameters.items()}
        with room_for(trainer.resident, 1, after=1):
            found.append(model.slopes(Directions(key=11), seeds, Estimate(how)))
        assert equal([parameter.detach() for parameter in model.place.parameters.values()], list(before.values()))
        assert model.metrics().get("micro_batch") == (1.0 if micro_batch == "2" else None)
    assert found[0] == found[1]


def test_an_evaluation_has_the_figures_of_a_smaller_batch(ready: Ready) -> None:
    resident, examples = ready(), [one for batch in BATCHES for one in batch]
    wanted = evaluate(resident, examples, 1)
    with room_for(resident, 1, after=1) as tried:
        assert evaluate(resident, examples, 2) == pytest.approx(wanted, rel=1e-6)  # lengths differ, so does their padding
        assert tried == [2, 2, 1, 1, 1, 1, 1]  # a part that had been done is not done again
        assert evaluate(resident, examples, 2) == wanted
    assert fit(resident, BATCHES, SGD, 1, 0.1).keys() == {"loss", "steps", "examples", "lr_sum"}  # training has its own size


def test_each_change_is_said_once(ready: Ready, caplog: pytest.LogCaptureFixture) -> None:
    resident = ready()
    with caplog.at_level(logging.WARNING), room_for(resident, 1):
        for _ in range(2):
            fit(resident, BATCHES, SGD, 2, 0.1)
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "memory is short: training goes on with 2 in place of 4 examples at a time",
        "memory is short: training goes on with 1 in place of 2 examples at a time",
    ]


def test_where_not_one_example_fits_the_client_fails_and_says_what_to_set(ready: Ready) -> None:
    resident = ready()
    with room_for(resident, 0), pytest.raises(ClientFailed, match=r"train\.micro_batch = 1.*data\.max_length.*checkpointing"):
        fit(resident, BATCHES, SGD, 2, 0.1)
    assert all(parameter.grad is None for parameter in resident.peft.parameters())


def test_other_errors_are_no_shortage(ready: Ready) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_short(raised.value)  # what torch really says on a CPU
    assert is_short(torch.OutOfMemoryError())
    assert not is_short(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_short(OSError("Cannot allocate memory"))
    calls = []

    def broken(size: int) -> None:
        calls.append(size)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        within_memory(ready(), "training", 4, broken)
    assert calls == [4]
