"""Named randomness: the same bits on every machine, and nothing in common between names."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.seeds import generator, lora_a, seed_of, uniform

names = st.lists(st.text(max_size=3) | st.integers() | st.booleans(), max_size=4)


def test_a_seed_is_the_low_63_bits_of_a_sha256() -> None:
    text = b"int:0\x1fint:3\x1fstr:asyncio\x1fstr:batches"
    assert seed_of(0, 3, "asyncio", "batches") == int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def test_golden_seeds() -> None:
    """Never to change: old runs could not be repeated."""
    assert seed_of() == 724655455495936113
    assert seed_of(0, "lora_A", "model.layers.0.self_attn.q_proj", 8) == 7143383281535805566


def test_golden_bits() -> None:
    """Philox words and three exact float32 operations: no rounding that a machine could do otherwise."""
    assert uniform((4,), 1.0, "golden").numpy().view(np.uint32).tolist() == [1048782440, 3196494924, 3206148644, 3205999518]
    assert lora_a(7, "model.q_proj", 2, 3).numpy().view(np.uint32).flatten().tolist() == [
        3205335967,
        3193486731,
        1057217370,
        3173658385,
        1055456519,
        3180658480,
    ]


@given(names, names)
def test_other_names_other_seed(one: list[object], other: list[object]) -> None:
    same = [(type(n), n) for n in one] == [(type(n), n) for n in other]
    assert (seed_of(*one) == seed_of(*other)) is same


@pytest.mark.parametrize(("one", "other"), [((1,), ("1",)), (("ab", "c"), ("a", "bc")), ((1,), (True,)), (("a",), ("a", ""))])
def test_types_and_borders_of_names_count(one: tuple[object, ...], other: tuple[object, ...]) -> None:
    assert seed_of(*one) != seed_of(*other)


def test_uniform_is_uniform_within_its_bound() -> None:
    """Of n = 40,000: the mean within 5 sigma of 0, sigma = b/sqrt(3n); the variance b^2/3 within 5 %."""
    n, bound = 40_000, 0.25
    drawn = uniform((200, 200), bound, "spread")
    assert drawn.dtype == torch.float32
    assert -bound <= drawn.min() < -0.99 * bound
    assert 0.99 * bound < drawn.max() < bound
    assert abs(drawn.mean().item()) < 5 * bound / math.sqrt(3 * n)
    assert drawn.var().item() == pytest.approx(bound**2 / 3, rel=0.05)


def test_draws_of_two_names_are_independent() -> None:
    """The correlation of n = 10,000 independent pairs has a standard deviation of 1/sqrt(n) = 0.01."""
    one, other = uniform((10_000,), 1.0, "one"), uniform((10_000,), 1.0, "other")
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1].item()) < 0.05


def test_a_draw_does_not_depend_on_others() -> None:
    first = uniform((3,), 1.0, "x")
    torch.manual_seed(1)
    uniform((5,), 1.0, "y")
    assert torch.equal(uniform((3,), 1.0, "x"), first)
    assert torch.equal(uniform((5,), 1.0, "x")[:3], first)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0)])
def test_shapes_of_one_number_or_none(shape: tuple[int, ...]) -> None:
    assert uniform(shape, 1.0, "small").shape == shape


def test_lora_a_is_drawn_as_peft_draws_it() -> None:
    """kaiming_uniform with a = sqrt(5) is U(-1/sqrt(k), 1/sqrt(k)), whatever the rank."""
    k = 64
    A = lora_a(0, "m", 16, k)
    wanted = torch.nn.init.kaiming_uniform_(torch.empty(16, k), a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
    assert A.shape == (16, k)
    assert A.abs().max().item() <= 1 / math.sqrt(k)
    assert A.std().item() == pytest.approx(wanted.std().item(), rel=0.1)


def test_lora_a_differs_by_seed_path_and_rank() -> None:
    first_rows = [lora_a(*names, 8)[0] for names in ((0, "m", 2), (1, "m", 2), (0, "n", 2), (0, "m", 3))]
    assert len({tuple(row.tolist()) for row in first_rows}) == 4


def test_generators_follow_their_names() -> None:
    draws = [torch.rand(3, generator=generator(*names)) for names in (("a", 1), ("a", 1), ("a", 2))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
