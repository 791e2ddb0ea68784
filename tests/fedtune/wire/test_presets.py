"""Which codecs a job gets: its preset's, those that it names, and none that a method cannot work with."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedtune.errors import JobError
from fedtune.job import Job
from fedtune.job_sections import Wire as WireSettings
from fedtune.wire.codec import codec_from
from fedtune.wire.presets import LOSSLESS, PRESETS

MakeJob = Callable[..., Job]


def test_the_default_is_balanced() -> None:
    assert WireSettings().preset == "balanced"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_all_three(name: str, make_job: MakeJob) -> None:
    wire, preset = make_job(f"wire={name}").make_wire(), PRESETS[name]
    assert (wire.up.change.text, wire.down.change.text) == (preset.up, preset.down)
    assert {wire.up.first.text, wire.down.first.text} == {preset.first}


def test_what_the_job_names_goes_before_the_preset(make_job: MakeJob) -> None:
    wire = make_job("wire.preset=tiny", "wire.up=int8", "wire.first=fp16").make_wire()
    assert (wire.up.change.text, wire.down.change.text) == ("int8", PRESETS["tiny"].down)
    assert (wire.up.first.text, wire.down.first.text) == ("fp16", "fp16")


def test_a_plain_codec_has_no_other_for_first_tensors(make_job: MakeJob) -> None:
    wire = make_job("wire.up=fp32").make_wire()
    assert wire.up.first.text == "fp32"


@pytest.mark.parametrize(
    ("up", "feedback", "on"),
    [
        ("int4", "auto", False),  # right on average
        ("'int4(rounding=nearest)'", "auto", True),
        ("'topk(0.1) | int8'", "auto", True),
        ("int4", "always", True),
        ("'topk(0.1) | int8'", "never", False),
        ("fp32", "always", False),  # loses nothing
    ],
)
def test_feedback_where_the_mean_is_not_right_by_itself(up: str, feedback: str, on: bool, make_job: MakeJob) -> None:
    assert make_job(f"wire.up={up}", f"wire.feedback={feedback}").make_wire().feedback is on


def test_a_method_that_needs_every_bit_gets_every_bit_of_a_preset(make_job: MakeJob) -> None:
    """Fed-SB: all clients must hold the same A and B; their answers may lose a little."""
    wire = make_job("strategy=fed_sb", "wire=tiny").make_wire()
    assert (wire.up.change.text, wire.down.change.text) == (PRESETS["tiny"].up, LOSSLESS)
    assert wire.down.first.exact


def test_a_codec_that_loses_what_a_method_needs_is_refused(make_job: MakeJob) -> None:
    with pytest.raises(JobError, match=r"wire.down = 'int8' loses bits, and 'fed_sb' needs all of them: .* the same A and B"):
        make_job("strategy=fed_sb", "wire.down=int8")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["wire=small"], "wire"),
        (["wire.up=int9"], "unknown stage 'int9', did you mean 'int"),
        (["wire.up='entropy | int8'"], "wanted stages as in"),
        (["wire.up='int8 | topk'"], "what comes before 'topk' leaves whole numbers"),
        (["wire.up='topk(2)'"], "stage 'topk', setting 'density'"),
    ],
)
def test_what_is_no_codec_is_refused_with_the_job(keys: list[str], message: str, make_job: MakeJob) -> None:
    with pytest.raises(JobError, match=message):
        make_job(*keys)


def test_lossless_is() -> None:
    assert codec_from(LOSSLESS).exact


@pytest.mark.parametrize("up", ["'randk(0.1) | uniform(0.7)'", "'int2 | entropy'", "'uniform(4, dither=true)'"])
def test_no_feedback_where_a_codec_can_lose_more_than_an_update_has(up: str, make_job: MakeJob) -> None:
    """|x - C(x)| > |x| on average: what waits would grow by that from round to round."""
    assert not make_job(f"wire.up={up}").make_wire().feedback
    with pytest.raises(JobError, match="errors would grow without end"):
        make_job(f"wire.up={up}", "wire.feedback=always")


def test_what_takes_long_to_decode_comes_down_only(make_job: MakeJob) -> None:
    assert make_job("wire.down='delta_come | entropy'").make_wire().down.change.stages[0].name == "delta_come"
    for key in ("up", "first"):  # clients send both
        with pytest.raises(JobError, match=r"'delta_come' is for wire.down"):
            make_job("wire.preset=balanced", f"wire.{key}='delta_come | entropy'")


def test_where_differences_lose_nothing_first_tensors_lose_nothing_either(make_job: MakeJob) -> None:
    wire = make_job("wire.preset=balanced", "wire.down='fp32 | entropy'").make_wire()
    assert wire.down.exact
    assert not wire.up.exact


def test_a_word_sets_the_preset_and_leaves_the_rest_of_the_table(make_job: MakeJob) -> None:
    wire = make_job("wire.up=int8", "wire=tiny").make_wire()
    assert (wire.up.change.text, wire.down.change.text) == ("int8", PRESETS["tiny"].down)
    with pytest.raises(JobError, match="codec ''"):
        make_job("wire.up=''")
