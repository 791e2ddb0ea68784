"""Local training and evaluation against the same sums written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from client.data.examples import Example, Labelled, single
from client.fit import evaluate, fit, lr_factor
from client.model import ResidentModel
from fedtune.adapter import Adapter
from fedtune.job import Job, Train

MakeJob = Callable[..., Job]
Ready = Callable[..., ResidentModel]


def example(seed: int, length: int, prompt: int = 0) -> Example:
    """Random tokens; the first `prompt` of them are not learnt."""
    ids = torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return single(ids, [place >= prompt for place in range(length)])


UNEQUAL = [example(0, 12), example(1, 5, prompt=4), example(2, 9, prompt=2), example(3, 3)]  # 11, 1, 7, 2 are learnt
LABELLED = [Labelled(one.input_ids, label) for one, label in zip(UNEQUAL, (2, 0, 1, 2), strict=True)]


@pytest.fixture
def ready(make_job: MakeJob, draw_adapter: Callable[..., Adapter]) -> Ready:
    """ready("train.checkpointing=true", ...): a resident model with an adapter of rank 3 in its slot."""

    def make(*overrides: str) -> ResidentModel:
        resident = ResidentModel(make_job(*overrides))
        shapes = {path: (layer.out_features, layer.in_features) for path, layer in resident.lora.items()}
        resident.load(draw_adapter(shapes, 3), Adapter(), frozenset())
        return resident

    return make


def again(batch: Sequence[Example]) -> Iterator[list[Example]]:
    while True:
        yield list(batch)


def parameters(resident: ResidentModel) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in resident.trainable()]


def token_losses(resident: ResidentModel, one: Example) -> tuple[Tensor, Tensor]:
    """The loss of each learnt token, and whether it was the likeliest: one text at a time, without padding."""
    logits = resident.peft(input_ids=torch.tensor([one.input_ids])).logits[0, :-1]
    labels = torch.tensor(one.labels[1:])
    learnt = labels != -100
    losses = -logits.log_softmax(-1)[learnt].gather(1, labels[learnt][:, None]).squeeze(1)
    return losses, logits[learnt].argmax(-1) == labels[learnt]


def mean_loss(resident: ResidentModel, batch: Sequence[Example]) -> Tensor:
    """Over all learnt tokens of the batch, each counted once."""
    return torch.cat([token_losses(resident, one)[0] for one in batch]).mean()


def gradients(resident: ResidentModel, batch: Sequence[Example]) -> list[Tensor]:
    return list(torch.autograd.grad(mean_loss(resident, batch), resident.trainable()))


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
def test_cutting_a_batch_changes_nothing(micro_batch: int, ready: Ready) -> None:
    train = Train(optimizer="sgd", clip=0.5)
    whole, cut = ready(), ready()
    wanted = fit(whole, again(UNEQUAL), train, 3, 0.5)
    got = fit(cut, again(UNEQUAL), train.model_copy(update={"micro_batch": micro_batch}), 3, 0.5)
    assert got == pytest.approx(wanted, abs=1e-6)
    for one, other in zip(parameters(cut), parameters(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_cutting_a_batch_of_labelled_texts_changes_nothing(micro_batch: int, ready: Ready) -> None:
    job, train = ("model.task=classification", "model.labels=3"), Train(optimizer="sgd", clip=0)
    whole, cut = ready(*job), ready(*job)
    for resident in (whole, cut):
        resident.dense["score.weight"].data.copy_(torch.linspace(-1, 1, 96).reshape(3, 32))
    fit(whole, again(LABELLED), train, 1, 0.1)
    fit(cut, again(LABELLED), train.model_copy(update={"micro_batch": micro_batch}), 1, 0.1)
    for one, other in zip(parameters(cut), parameters(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_one_step_of_sgd_is_w_less_lr_times_the_gradient(ready: Ready) -> None:
    resident = ready()
    loss = mean_loss(resident, UNEQUAL).item()
    wanted = [w - 0.25 * g for w, g in zip(parameters(resident), gradients(resident, UNEQUAL), strict=True)]
    got = fit(resident, again(UNEQUAL), Train(optimizer="sgd", clip=0), 1, 0.25)
    assert got == pytest.approx({"loss": loss, "steps": 1, "examples": 4, "lr_sum": 0.25}, rel=1e-5)
    for one, other in zip(parameters(resident), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_gradient_longer_than_clip_is_cut_to_that_norm(ready: Ready) -> None:
    resident = ready()
    before, gradient = parameters(resident), gradients(resident, UNEQUAL)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradient))
    clip = norm / 4
    fit(resident, again(UNEQUAL), Train(optimizer="sgd", clip=clip), 1, 1.0)
    for now, then, g in zip(parameters(resident), before, gradient, strict=True):
        torch.testing.assert_close(then - now, g / 4, rtol=1e-3, atol=1e-5)
    moved = [then - now for now, then in zip(parameters(resident), before, strict=True)]
    assert math.sqrt(sum(step.double().square().sum().item() for step in moved)) == pytest.approx(clip, rel=1e-4)


def test_a_gradient_shorter_than_clip_is_left_alone(ready: Ready) -> None:
    clipped, free = ready(), ready()
    fit(clipped, again(UNEQUAL), Train(optimizer="sgd", clip=1e6), 1, 0.1)
    fit(free, again(UNEQUAL), Train(optimizer="sgd", clip=0), 1, 0.1)
    for one, other in zip(parameters(clipped), parameters(free), strict=True):
        torch.testing.assert_close(one, other)


def test_adamw_is_torch_s_on_the_same_gradients(ready: Ready) -> None:
    resident, other = ready(), ready()
    train = Train(betas=(0.8, 0.95), weight_decay=0.1, clip=0, schedule="cosine", min_lr=0.5)
    fit(resident, again(UNEQUAL), train, 3, 0.01)
    optimizer = torch.optim.AdamW(other.trainable(), betas=(0.8, 0.95), weight_decay=0.1)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.01 * (0.5 + 0.25 * (1 + math.cos(math.pi * step / 3)))
        for parameter, gradient in zip(other.trainable(), gradients(other, UNEQUAL), strict=True):
            parameter.grad = gradient
        optimizer.step()
    for one, wanted in zip(parameters(resident), parameters(other), strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=2e-5)


def test_momentum_starts_afresh_in_every_fit(ready: Ready) -> None:
    train = Train(optimizer="sgd", momentum=0.9, clip=0)
    resident = ready()
    fit(resident, again(UNEQUAL), train, 1, 0.1)
    wanted = [w - 0.1 * g for w, g in zip(parameters(resident), gradients(resident, UNEQUAL), strict=True)]
    fit(resident, again(UNEQUAL), train, 1, 0.1)
    for one, other in zip(parameters(resident), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_penalty_adds_its_gradient(ready: Ready) -> None:
    resident = ready()
    pairs = zip(parameters(resident), gradients(resident, UNEQUAL), strict=True)
    wanted = [w - 0.1 * (g + 3 * w) for w, g in pairs]  # the gradient of 3/2 |w|^2 is 3 w

    def penalty(live: Adapter) -> Tensor:
        return sum((1.5 * w.square().sum() for pair in live.lora.values() for w in (pair.A, pair.B)), torch.zeros(()))

    fit(resident, again(UNEQUAL), Train(optimizer="sgd", clip=0), 1, 0.1, penalty)
    for one, other in zip(parameters(resident), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_only_as_many_batches_are_drawn_as_there_are_steps(ready: Ready) -> None:
    drawn = iter([UNEQUAL[:1], UNEQUAL[1:2], UNEQUAL[2:]])
    figures = fit(ready(), drawn, Train(), 2, 1e-3)
    assert (figures["steps"], figures["examples"]) == (2, 2)
    assert list(drawn) == [UNEQUAL[2:]]


def test_checkpointing_saves_memory_and_changes_no_gradient(ready: Ready) -> None:
    plain, checkpointed = ready(), ready("train.checkpointing=true")
    layer = checkpointed.peft.base_model.model.model.layers[0].mlp
    ran = []
    layer.register_forward_pre_hook(lambda *_: ran.append(1))
    for resident in (plain, checkpointed):
        fit(resident, again(UNEQUAL), Train(optimizer="sgd", clip=0), 1, 0.5)
    assert len(ran) == 2  # once forward, and once more on the way back
    for one, other in zip(parameters(checkpointed), parameters(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_warm_up_counts_to_the_peak_and_stays_there() -> None:
    train = Train(warmup=3)
    assert [lr_factor(step, 6, train) for step in range(6)] == [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]


def test_a_cosine_goes_from_the_peak_towards_min_lr() -> None:
    """After one step of warm-up eight are left, so step 5 is half-way and step 9 would be at min_lr."""
    train = Train(warmup=1, schedule="cosine", min_lr=0.2)
    wanted = {0: 1 / 2, 1: 1.0, 3: 0.2 + 0.4 * (1 + 2**-0.5), 5: 0.6, 7: 0.2 + 0.4 * (1 - 2**-0.5), 9: 0.2}
    assert {step: lr_factor(step, 9, train) for step in wanted} == pytest.approx(wanted)


def test_a_cosine_without_min_lr_ends_at_zero() -> None:
    assert lr_factor(4, 4, Train(schedule="cosine", min_lr=0)) == pytest.approx(0)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_warm_up_longer_than_the_round_only_climbs(schedule: str) -> None:
    factors = [lr_factor(step, 3, Train(warmup=9, schedule=schedule)) for step in range(3)]
    assert factors == [0.1, 0.2, 0.3]


def test_the_schedule_reaches_the_optimiser(ready: Ready) -> None:
    """Two steps of warm-up with SGD: a third of the rate, and then two thirds."""
    resident, train = ready(), Train(optimizer="sgd", clip=0, warmup=2)
    wanted = parameters(resident)
    other = ready()
    for share in (1 / 3, 2 / 3):
        wanted = [w - share * 0.1 * g for w, g in zip(wanted, gradients(other, UNEQUAL), strict=True)]
        for parameter, value in zip(other.trainable(), wanted, strict=True):
            parameter.data.copy_(value)
    fit(resident, again(UNEQUAL), train, 2, 0.1)
    for one, value in zip(parameters(resident), wanted, strict=True):
        torch.testing.assert_close(one, value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_evaluation_counts_every_learnt_token_once(batch: int, ready: Ready) -> None:
    resident = ready()
    resident.peft.eval()
    with torch.no_grad():
        losses, right = (torch.cat(parts) for parts in zip(*(token_losses(resident, one) for one in UNEQUAL), strict=True))
    assert len(losses) == 11 + 1 + 7 + 2
    wanted = {"loss": losses.mean().item(), "token_accuracy": right.double().mean().item(), "tokens": 21}
    wanted["perplexity"] = math.exp(wanted["loss"])
    assert evaluate(resident, UNEQUAL, batch) == pytest.approx(wanted, rel=1e-5)


def test_token_accuracy_of_a_model_that_learnt_its_text(ready: Ready) -> None:
    resident = ready()
    fit(resident, again(UNEQUAL[2:3]), Train(), 60, 0.02)
    assert evaluate(resident, UNEQUAL[2:3], 1)["token_accuracy"] == 1.0


def test_classification_counts_texts(ready: Ready) -> None:
    resident = ready("model.task=classification", "model.labels=3")
    resident.dense["score.weight"].data.copy_(torch.linspace(-1, 1, 96).reshape(3, 32))
    resident.peft.eval()
    with torch.no_grad():
        logits = torch.cat([resident.peft(input_ids=torch.tensor([one.input_ids])).logits for one in LABELLED])  # (4, 3)
    labels = torch.tensor([one.label for one in LABELLED])
    loss = nn.functional.cross_entropy(logits, labels).item()
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    assert evaluate(resident, LABELLED, 3) == pytest.approx({"loss": loss, "accuracy": accuracy, "tokens": 4}, rel=1e-5)


def test_no_held_out_examples_give_no_figures(ready: Ready) -> None:
    assert evaluate(ready(), [], 4) == {}


def test_evaluation_has_no_dropout_and_no_gradient(ready: Ready) -> None:
    resident = ready("adapter.dropout=0.5")
    resident.peft.train()
    assert evaluate(resident, UNEQUAL, 2) == evaluate(resident, UNEQUAL, 2)
    assert all(parameter.grad is None for parameter in resident.trainable())
