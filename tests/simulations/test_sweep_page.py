"""The page of a comparison: where its points are, and that no name gets into it as markup."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from simulations.sweep_cell import Figures, Outcome, Point
from simulations.sweep_charts import Across, loss_by_bytes, loss_by_round, pairs
from simulations.sweep_frontier import loss_by_cost
from simulations.sweep_page import page
from simulations.sweep_table import Row, rows_of


def outcome(variant: str, losses: tuple[float, ...], seed: int = 0, sent: float = 1000.0, own: float = 2.0) -> Outcome:
    curve = tuple(Point(number, loss, sent * number) for number, loss in enumerate(losses))
    figures = Figures(losses[-1], own, losses[0], losses[0], sent, sent, 1.0, None, False, False, curve)
    return Outcome(variant, seed, variant, "done", figures=figures)


def rows(*outcomes: Outcome) -> list[Row]:
    return rows_of(outcomes, {})


def numbers(path: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", path)]


def test_a_line_is_the_mean_over_the_seeds_with_a_band_around_it() -> None:
    """Round 1: mean of 2 and 4 is 3, half way from 4 (round 0) to round 2's 2. The deviation there is sqrt(2)."""
    plot = loss_by_round(rows(outcome("a", (4.0, 2.0, 2.0)), outcome("a", (4.0, 4.0, 2.0), seed=1)))
    assert plot is not None
    x0, y0, x1, y1, x2, y2 = numbers(plot.lines[0].path)
    assert (x0, x1, x2) == (0, 50, 100)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.02)
    band = numbers(plot.lines[0].band)  # the upper edge from left to right, then the lower one back
    per_nat = (y2 - y0) / 2
    assert band[3] == pytest.approx(y1 - math.sqrt(2) * per_nat, abs=0.05)
    assert band[9] == pytest.approx(y1 + math.sqrt(2) * per_nat, abs=0.05)


def test_one_seed_has_no_band_and_a_round_that_not_all_seeds_have_is_left_out() -> None:
    assert loss_by_round(rows(outcome("a", (4.0, 3.0)))).lines[0].band == ""  # type: ignore[union-attr]
    plot = loss_by_round(rows(outcome("a", (4.0, 3.0, 2.0)), outcome("a", (4.0, 3.0), seed=1)))
    assert plot is not None
    assert len(plot.lines[0].dots) == 2


def test_bytes_are_on_a_logarithm_without_round_0() -> None:
    """100 kB, 1 MB and 10 MB in equal steps."""
    curve = (Point(0, 4.0, 3.0), Point(1, 3.0, 1e5), Point(2, 2.0, 1e6), Point(3, 1.0, 1e7))
    figures = Figures(1.0, 2.0, 4.0, 4.0, 1.0, 1.0, 1.0, None, False, False, curve)
    plot = loss_by_bytes(rows(Outcome("a", 0, "a", "done", figures=figures)))
    assert plot is not None
    first, second, third = (dot[0] for dot in plot.lines[0].dots)
    assert third - second == pytest.approx(second - first, abs=0.02)
    assert [tick.label for tick in plot.x_ticks] == ["100 kB", "1 MB", "10 MB"]


def test_ticks_of_a_short_logarithm_are_1_2_and_5() -> None:
    assert [tick.label for tick in Across(90, 600, log=True).ticks("{:.0f}".format)] == ["100", "200", "500"]


def test_one_that_went_astray_does_not_flatten_the_others() -> None:
    """From 4 to 2 is at least half of the height, whatever the third does."""
    plot = loss_by_round(rows(outcome("a", (4.0, 2.0)), outcome("b", (4.0, 3.0)), outcome("c", (4.0, 90.0))))
    assert plot is not None
    ends = {line.name: line.dots for line in plot.lines}
    assert ends["a"][1][1] - ends["a"][0][1] > 50


def test_everybody_s_and_own_loss_are_on_one_scale() -> None:
    found = pairs(rows(outcome("a", (4.0, 3.0), own=2.0), outcome("b", (4.0, 2.0), own=3.0)))
    assert found is not None
    b, a = found[0]
    assert (a.loss, a.own) == (b.own, b.loss)
    assert a.loss > a.own


def test_loss_against_bytes_is_drawn_where_they_differ() -> None:
    """`sent` goes each way: 2 kB, 20 kB and 200 kB a round are in equal steps on a logarithm."""
    assert loss_by_cost(rows(outcome("a", (4.0, 3.0)), outcome("b", (4.0, 3.0), sent=1900.0))) is None
    frontier = loss_by_cost(rows(*(outcome(name, (4.0, 3.0), sent=10.0**n) for n, name in ((3, "a"), (4, "b"), (5, "c")))))
    assert frontier is not None
    a, b, c = sorted(frontier.marks, key=lambda mark: mark.name)
    assert b.x - a.x == pytest.approx(c.x - b.x, abs=0.02)
    assert a.y == b.y == c.y
    assert (a.left, c.left) == (False, True)
    assert [tick.label for tick in frontier.x_ticks] == ["10 kB", "100 kB"]


def test_a_point_is_the_mean_over_the_seeds() -> None:
    """Losses 2 and 4: the mean is 3, and the ends are sqrt(2) to both sides."""
    given = [outcome("a", (5.0, 2.0)), outcome("a", (5.0, 4.0), seed=1), outcome("b", (5.0, 4.0), sent=5000.0)]
    frontier = loss_by_cost(rows(*given))
    assert frontier is not None
    a, b = sorted(frontier.marks, key=lambda mark: mark.name)
    assert a.deviation is not None
    per_nat = (a.y - b.y) / (4 - 3)
    assert a.deviation[0] - a.y == pytest.approx(math.sqrt(2) * per_nat, abs=0.05)
    assert b.deviation is None


def test_names_in_one_place_stand_below_each_other() -> None:
    given = [outcome(name, (4.0, 3.0), sent=1000.0) for name in "abc"]
    frontier = loss_by_cost(rows(*given, outcome("far", (4.0, 3.0), sent=1e6)))
    assert frontier is not None
    heights = sorted(mark.name_at for mark in frontier.marks if mark.name != "far")
    assert all(lower - upper >= 5 for upper, lower in pairwise(heights))
    far = next(mark for mark in frontier.marks if mark.name == "far")
    assert far.name_at == far.y


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_whole_and_names_are_text() -> None:
    many = [outcome(f"method {n}", (4.0, 3.0 - n / 100)) for n in range(12)]
    trouble = Outcome("<script>alert(1)</script>", 0, "x", "failed", "<b>boom</b>")
    parsed = Tags()
    html = page("<i>demo</i>: 1 seed", rows(*many, trouble))
    parsed.feed(html)
    assert not {"script", "i"} & set(parsed.tags)
    assert parsed.tags.count("figure") == 2
    assert any("<b>boom</b>" in words for words in parsed.words)
    assert not re.search('(?:src|href)=(?!"data:)', html)  # nothing is fetched
    assert "Best on everybody’s examples: method 11, 2.890, −1.110 to the base model." in html


@pytest.mark.parametrize(
    "given",
    [[], [Outcome("a", 0, "a", "failed", "why")], [outcome("a", (math.nan, math.nan))], [outcome("a", (2.0,))]],
)
def test_a_page_of_little(given: list[Outcome]) -> None:
    assert "</html>" in page("x", rows(*given))


def test_the_page_draws_loss_against_bytes() -> None:
    html = page("x", rows(outcome("<b>a</b>", (4.0, 3.0)), outcome("b", (4.0, 3.0), sent=1e5)))
    parsed = Tags()
    parsed.feed(html)
    assert parsed.tags.count("figure") == 3
    assert "Loss against bytes" in html
    assert "<b>a</b>" not in html
