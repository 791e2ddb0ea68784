"""docs/compression.md: its stages, presets, codecs and figures are those of the code; its stage keeps the rules."""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.job import checked_job
from fedtune.payload import Payload, Role
from fedtune.registry import known, strategy_from
from fedtune.strategy import Strategy
from fedtune.wire.codec import codec_from
from fedtune.wire.conformance import check_stage
from fedtune.wire.joined import Codecs
from fedtune.wire.packed import pack
from fedtune.wire.presets import PRESETS
from fedtune.wire.stages import BUILT_IN, stage_from

PAGE = (Path(__file__).parents[2] / "docs" / "compression.md").read_text(encoding="utf-8")
STAGE, TESTS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
CODECS = (
    *("int8 | entropy", "int4 | entropy", "int2 | entropy", "uniform(0.7, dither=true) | entropy", "uniform(0.7) | entropy"),
    *("uniform(1) | entropy", "uniform(2) | entropy", "uniform(3) | entropy", "ternary(0.1) | entropy"),
    *("topk(0.1) | int8 | entropy", "topk(0.05) | int4 | entropy"),
)
HEADER = "| codec | bits a number | lost of the energy | no code takes fewer bits than |\n|---|---:|---:|---:|\n"
CLOSE = 0.04  # relative, from 0.25 on: a machine's libraries may draw other numbers of the same distribution


def table_after(words: str) -> list[list[str]]:
    """The cells of the first table behind these words, without its heading."""
    lines = PAGE.partition(words)[2].partition("\n|")[2].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_presets_are_all_there() -> None:
    assert [row[0].partition(",")[0].strip("`") for row in table_after('wire = "tiny"')] == list(PRESETS)


def stages() -> dict[str, list[str]]:
    """Name -> the cells of its row."""
    return {re.split(r"[`(]", row[0])[1]: row for row in table_after("Bits are those of one number")}


def test_the_stages_are_all_there() -> None:
    assert sorted(stages()) == sorted(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_row_has_a_stage_s_settings_and_defaults(name: str) -> None:
    written, _, _, unbiased, _ = stages()[name]
    stage = stage_from(name, ())
    assert is_dataclass(stage)
    assert codec_from(written.strip("`")).stages[0] == stage
    assert re.findall(r"(\w+)=", written) == [field.name for field in fields(stage)]
    assert (unbiased == "yes") is stage.unbiased


@cache
def normal_numbers() -> torch.Tensor:
    """float32 (1024, 512)."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal((1024, 512), np.float32))


def figures(text: str) -> tuple[float, float, float]:
    """Bits of a number in a packed message, the share of the squared norm that is lost, and the least bits at that loss:
    the rate-distortion function of the normal distribution, log2(1 / D) / 2."""
    x, codec = normal_numbers(), codec_from(text)
    packed = pack(Payload({"x": x}, {"x": Role.DENSE}), Codecs(codec, codec), 0)
    lost = float((packed.received.tensors["x"] - x).double().square().sum() / x.double().square().sum())
    return 8 * len(packed.data) / x.numel(), lost, max(0.0, -math.log2(lost) / 2)


def percent(share: float) -> str:
    return f"{share:.0f}" if share >= 10 else f"{share:.2g}"


def row(text: str) -> str:
    bits, lost, least = figures(text)
    return f"| `{text.replace('|', chr(92) + '|')}` | {bits:.2f} | {percent(100 * lost)} % | {least:.2f} |\n"


def test_the_table_of_normal_numbers_is_the_one_that_is_computed_here() -> None:
    shown = PAGE.partition("<!-- table normal -->\n")[2].partition("<!-- /table -->")[0]
    table = HEADER + "".join(row(text) for text in CODECS)
    near = [abs(a - b) < CLOSE * max(0.25, b) for a, b in zip(numbers(shown), numbers(table), strict=True)]
    assert all(near), f"put this table into docs/compression.md:\n{table}"
    assert [line.partition("` |")[0] for line in shown.splitlines()] == [
        line.partition("` |")[0] for line in table.splitlines()
    ]


def numbers(table: str) -> list[float]:
    """Those behind the codecs."""
    return [float(number) for line in table.splitlines() for number in re.findall(r"[\d.]+", line.partition("` |")[2])]


def test_jobs_on_the_page_are_jobs() -> None:
    jobs = [block for block in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL) if "wire" in block]
    short, full = (checked_job(tomllib.loads(job), "the page").make_wire() for job in jobs)
    assert short.up.change.text == PRESETS["tiny"].up
    assert (full.up.change.text, full.feedback) == ("topk(0.1) | int8 | entropy", True)


@pytest.mark.parametrize("stage", ["`tiny`", "`ternary`", "`topk`", "`bf16`", "`common`"])
def test_feedback_is_on_by_itself_where_the_page_says_so(stage: str) -> None:
    assert stage in PAGE.partition('`feedback = "auto"` turns it on')[2].partition(";")[0]
    wire = stage.strip("`")
    assert checked_job({"wire": wire if wire in PRESETS else {"up": wire}}, "the page").make_wire().feedback


def settings_that_need_every_bit() -> dict[str, Strategy]:
    """Of the methods that the page names, and the defaults of all others."""
    given = {"selective_layers": {"trains": "weights"}, "ferret": {"trains": "adapter"}, "flower": {"wraps": "FedAvg"}}
    return {name: strategy_from(name, given.get(name, {})) for name in known()}


def test_methods_that_need_every_bit_are_all_there() -> None:
    needy = {name for name, strategy in settings_that_need_every_bit().items() if strategy.exact_down or strategy.exact_up}
    assert {row[0].split("`")[1] for row in table_after("## Methods that need every bit")} == needy
    unsteady = {name for name, strategy in settings_that_need_every_bit().items() if not strategy.steady}
    sentence = PAGE.partition("where a codec loses nothing, and not for ")[2].partition(", where a number")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == unsteady


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "sign.py").write_text(STAGE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "sign.py"


def test_the_stage_keeps_the_rules(plugin: Path) -> None:
    check_stage(codec_from(f"{plugin}:Sign | entropy").stages[0])


def test_the_test_on_the_page_passes(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: dict[str, object] = {}
    exec(compile(TESTS, "the page", "exec"), there)
    test = there["test_the_rules"]
    assert callable(test)
    test()


def test_the_stage_takes_a_bit_and_loses_what_the_mean_size_leaves(plugin: Path) -> None:
    """Of normal numbers E|x| = sqrt(2 / pi), so that 1 - 2 / pi = 36 % of the energy is lost."""
    bits, lost, _ = figures(f"{plugin}:Sign | entropy")
    assert bits == pytest.approx(1, abs=0.01)
    assert lost == pytest.approx(1 - 2 / math.pi, abs=0.005)
