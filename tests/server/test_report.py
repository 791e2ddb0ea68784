"""The report: what it shows, whole and partial runs, strangers' text, and writing that loses nothing."""

from __future__ import annotations

import html
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import RunFolderError
from fedtune.paths import base_model
from server import report_charts as charts
from server import report_figures as figures
from server import report_units as units
from server.records import ClientRecord, Comparison, RoundRecord
from server.report import write_report
from server.report_folder import read_run
from server.report_ledger import ledger

EVIL = '<script>alert("x")</script>'


def run_folder(folder: Path, rounds: list[RoundRecord], comparison: Comparison | None = None, job: str = "") -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r.as_json()) + "\n" for r in rounds))
    if comparison:
        (folder / "comparison.json").write_text(json.dumps(comparison.as_json()))
    (folder / "job.toml").write_text(job)
    return folder


def a_round(number: int, loss: float | None, **clients: ClientRecord) -> RoundRecord:
    return RoundRecord(number, loss, {}, seconds=2.0, clients=clients)


def text_of(page: Path) -> str:
    """The words of the page, tags gone, white space as one space."""
    words = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(words).split())


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.links += [value or "" for key, value in attributes if key in ("src", "href", "action")]


def test_headline_figures_come_from_the_records(tmp_path: Path) -> None:
    base = a_round(0, 4.0, a=ClientRecord(bytes_down=100, loss=4.0))
    first = a_round(1, 3.25, a=ClientRecord(1_000_000, 500_000, loss=3.2), b=ClientRecord(3_000_000, 700_000, loss=3.3))
    words = text_of(write_report(run_folder(tmp_path, [base, first])))
    # Two answers in training rounds: (1.0 + 3.0) / 2 MB down, (0.5 + 0.7) / 2 MB up; round 0 trains nobody.
    assert "2.0 MB down, 600 kB up" in words
    assert "held-out loss, nats per token 3.250 −0.750 to the base model (4.000), perplexity 25.79" in words
    assert f"{math.exp(3.25):.2f}" == "25.79"
    assert "time 4.0 s" in words


def test_the_ledger_is_told_by_stage_and_direction(tmp_path: Path) -> None:
    """Down 90 + 10 bytes of which 10 are header, up 45 + 5; plain they are 2000 and 1000: 20 times and 20 times as many. Round
    0 is in the sums, not in the ratio of training."""
    first = a_round(0, 4.0, a=ClientRecord(10, 10, header_down=10, header_up=10, plain_down=1000, plain_up=10))
    client = ClientRecord(
        100, 50, 0.0, header_down=10, header_up=5, transport_down=300, transport_up=200, plain_down=2000, plain_up=1000
    )
    run = [first, a_round(1, 3.0, a=client)]
    words = text_of(write_report(run_folder(tmp_path, run)))
    assert "100 B down, 50 B up; 170 B in the whole run; 20x smaller than plain numbers" in words
    assert "down 90 B 20 B 300 B 3.0 kB 27x" in words  # (2000 + 1000) / (100 + 10)
    assert "up 45 B 15 B 200 B 1.0 kB 17x" in words  # (1000 + 10) / (50 + 10)
    assert "it is 20x in both directions of the rounds of training together" in words
    found = ledger(run)
    assert found is not None
    down, up = found.bars
    assert [piece.width for piece in down.pieces] == pytest.approx([100 * part / 410 for part in (90, 20, 300)], abs=0.01)
    assert up.pieces[-1].x + up.pieces[-1].width == pytest.approx(100 * 260 / 410, abs=0.01)
    assert [(entry.name, round(entry.ratio or 0, 1)) for entry in found.by_round] == [("0", 50.5), ("1", 20.0)]
    assert [(entry.name, entry.down.plain, entry.up.header) for entry in found.by_client] == [("a", 3000, 15)]


def test_plain_runs_and_older_ones_say_little_of_bytes(tmp_path: Path) -> None:
    plain = a_round(1, 3.0, a=ClientRecord(100, 50, header_down=10, header_up=5, plain_down=100, plain_up=50))
    words = text_of(write_report(run_folder(tmp_path, [plain])))
    assert "What the bytes are: payload, header, transport" in words  # folded
    assert "smaller" not in words
    assert "answered ratio" not in words
    words = text_of(write_report(run_folder(tmp_path, [a_round(1, 3.0, a=ClientRecord(100, 50))])))
    assert "transport" not in words
    assert "ratio" not in words


def test_comparison_says_who_is_better(tmp_path: Path) -> None:
    comparison = Comparison(base=4.0, alone={"a": 3.5, "b": 2.9}, federated=3.0, central=2.5)
    words = text_of(write_report(run_folder(tmp_path, [a_round(1, 3.0)], comparison)))
    assert "better than 1 of 2 clients alone, and 20.0 % above central training" in words  # 3.0 / 2.5 = 1.2
    assert "b alone 2.900 18.17 −0.100" in words


def test_a_stranger_cannot_write_markup(tmp_path: Path) -> None:
    clients = {EVIL: ClientRecord(loss=1.0), "b": ClientRecord(failed=EVIL)}
    comparison = Comparison(2.0, {EVIL: 1.5}, 1.0, 0.9)
    folder = run_folder(tmp_path, [RoundRecord(1, 1.0, {EVIL: 1.0}, 1.0, clients)], comparison, job=f"name = '{EVIL}'")
    page = write_report(folder).read_text()
    assert "script" not in Tags(page).names
    assert html.unescape(page).count(EVIL) >= 6  # title, heading, panel, tables, reason, job


def test_what_was_out_of_the_ordinary_is_told_as_text_and_in_short(tmp_path: Path) -> None:
    rounds = [RoundRecord(1, 1.0), RoundRecord(2, 1.0, notes=(f"ann sits out {EVIL}", "x" * 500))]
    page = write_report(run_folder(tmp_path, rounds)).read_text()
    assert "script" not in Tags(page).names
    assert f"ann sits out {EVIL}" in html.unescape(page)
    assert "x" * 399 + "…" in page
    assert "Out of the ordinary" not in write_report(run_folder(tmp_path, rounds[:1])).read_text()


def test_the_page_asks_nobody_for_anything(tmp_path: Path) -> None:
    page = write_report(run_folder(tmp_path, [a_round(1, 3.0, a=ClientRecord(loss=3.0))])).read_text()
    assert set(Tags(page).links) <= {"data:,", "#everyone"}
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page
    assert '<html lang="en">' in page


def test_one_round_without_a_loss_is_a_report(tmp_path: Path) -> None:
    words = text_of(write_report(run_folder(tmp_path, [a_round(0, None, a=ClientRecord())])))
    assert "No held-out loss was measured" in words
    assert "no training round yet" in words
    assert "panels" not in words


def test_numbers_that_overflowed_are_missing_not_drawn(tmp_path: Path) -> None:
    rounds = [a_round(0, math.nan), a_round(1, math.inf), a_round(2, 3.0, a=ClientRecord(loss=math.nan))]
    page = write_report(run_folder(tmp_path, rounds, Comparison(math.inf, {"a": math.nan}, 3.0, math.nan)))
    drawn = re.findall(r' (?:d|x|y|width|height)="([^"]*)"', page.read_text())
    assert drawn
    assert not [shape for shape in drawn if "nan" in shape or "inf" in shape]


def test_a_half_written_last_line_is_left_out_with_a_note(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, [a_round(0, 4.0), a_round(1, 3.0)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "loss": 2.')
    words = text_of(write_report(folder))
    assert "Line 3 of metrics.jsonl is no whole record and is left out." in words
    assert [r.round for r in read_run(folder).rounds] == [0, 1]


def test_a_round_done_again_counts_once(tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path, [a_round(1, 3.0), a_round(2, 2.9), a_round(2, 2.8)]))
    assert [(r.round, r.loss) for r in run.rounds] == [(1, 3.0), (2, 2.8)]


def test_what_is_damaged_beside_the_metrics_is_noted(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, [a_round(1, 3.0)], job="name = ")
    (folder / "comparison.json").write_text('{"base": "much"}')
    (folder / "job.toml").write_bytes(b"\xff\xfe")
    words = text_of(write_report(folder))
    assert "comparison.json cannot be read" in words
    assert "job.toml cannot be read" in words


@pytest.mark.parametrize(
    "job", ["model = 3\nstrategy = 4", "strategy = 'flora'", "name = 7", "[model]\ntask = 'classification'\nlabels = 'many'"]
)
def test_a_job_file_of_another_shape_is_shown_as_it_is(tmp_path: Path, job: str) -> None:
    assert " ".join(job.split()) in text_of(write_report(run_folder(tmp_path, [a_round(1, 3.0)], job=job)))


def test_no_metrics_is_an_error_that_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no run folder.*no metrics\.jsonl.*fedtune report"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"round"')
    with pytest.raises(RunFolderError, match="no finished round"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_full_disk_keeps_the_report_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path, [a_round(1, 3.0)])
    before = write_report(folder).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunFolderError, match="No space left on device"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["job.toml", "metrics.jsonl", "report.html"]


def test_the_loading_lines_name_the_base_of_the_adapter(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, [a_round(1, 3.0)], job='[model]\npath = "builtin:stdlib"')
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "models/it\'s"}')
    lines = html.unescape(write_report(folder).read_text()).split("<code>")[1].split("</code>")[0]
    assert len(lines.splitlines()) == 3
    assert """from_pretrained("models/it's"), 'adapter')""" in lines
    compile(lines, "lines", "exec")


def test_the_base_that_is_shipped_is_named_by_its_folder(tmp_path: Path) -> None:
    page = write_report(run_folder(tmp_path, [a_round(1, 3.0)], job='[model]\npath = "builtin:stdlib"')).read_text()
    assert f"from_pretrained({str(base_model())!r})" in html.unescape(page)


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize(("task", "auto"), [("causal", "CausalLM"), ("classification", "SequenceClassification")])
def test_a_run_that_published_a_recipe_says_how_its_model_is_loaded(
    task: str, auto: str, written: bool, tmp_path: Path
) -> None:
    rounds = [a_round(0, 4.0, a=ClientRecord(loss=4.0)), a_round(1, 3.0, a=ClientRecord(loss=3.0))]
    folder = run_folder(tmp_path, rounds, Comparison(4.0, {"a": 3.5}, 3.0, 2.5), job=f'[model]\ntask = "{task}"')
    (folder / "recipe").mkdir()
    if written:
        (folder / "model").mkdir()
    page = write_report(folder)
    assert "Loss of the published model on each" in text_of(page)
    assert "Alone and central are LoRA adapters, trained by gradients with this job’s optimiser" in text_of(page)
    assert "Load the model In the folder of this run, with stock transformers:" in text_of(page)
    *first, imported, model, tokenizer = html.unescape(page.read_text()).split("<code>")[1].split("</code>")[0].splitlines()
    assert first == ([] if written else ["# the model is not written yet; first type: fedtune export ."])
    assert imported == f"from transformers import AutoModelFor{auto}, AutoTokenizer"
    assert model == f"model = AutoModelFor{auto}.from_pretrained('model')"
    assert tokenizer == "tokenizer = AutoTokenizer.from_pretrained('model')"


def test_many_clients_stay_a_page(tmp_path: Path) -> None:
    clients = {f"client-{i}": ClientRecord(loss=3.0 + i / 1000) for i in range(1000)}
    rounds = [RoundRecord(n, 3.0, {}, 1.0, clients) for n in range(30)]
    page = write_report(run_folder(tmp_path, rounds, Comparison(4.0, dict.fromkeys(clients, 3.5), 3.0, 2.9)))
    assert "alone, worst client-0 3.500" in text_of(page)
    assert "The first 48 of 1000 clients are shown" in text_of(page)
    assert page.stat().st_size < 500_000


def test_clients_stand_in_the_order_of_their_numbers() -> None:
    clients = {name: ClientRecord() for name in ("client-10", "client-9", "b", "client-9a", "7")}
    assert figures.client_names([RoundRecord(1, clients=clients)]) == ["7", "b", "client-9", "client-9a", "client-10"]


def test_change_bridges_rounds_that_were_not_measured() -> None:
    rounds = [a_round(0, 4.0), a_round(1, None), a_round(2, 3.5), a_round(3, 3.75)]
    assert figures.changes(rounds) == [None, None, -0.5, 0.25]


@given(st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=1, max_size=20))
def test_ticks_are_in_the_plot_and_differ(values: list[float]) -> None:
    scale = charts.around(values)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 6
    assert all(-0.1 <= tick.at <= 100.1 for tick in ticks)
    assert len({tick.label for tick in ticks}) == len(ticks)
    assert all(0 <= scale.y(value) <= 100 for value in values)


@given(st.floats(1e-9, 1e9))
def test_a_nice_step_is_near_what_was_wanted(wanted: float) -> None:
    assert wanted * (1 - 1e-9) <= charts.nice_step(wanted) <= wanted * 2.5 * (1 + 1e-9)


def test_bars_start_at_zero_and_keep_their_ratio() -> None:
    scale = charts.from_zero([10.0, 40.0])
    small, large = charts.bars(charts.Rounds((0, 1)), scale, [("x", {0: 10.0, 1: 40.0})], str)
    assert small.y + small.height == pytest.approx(100)
    assert large.height == pytest.approx(4 * small.height, rel=1e-2)


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (units.size(0), "0 B"),
        (units.size(999), "999 B"),
        (units.size(1_230_000), "1.2 MB"),
        (units.size(999_600), "1.0 MB"),
        (units.size(123_456), "123 kB"),
        (units.size_tick(2_500_000), "2.5 MB"),
        (units.ratio(9.94), "9.9x"),
        (units.ratio(9.96), "10x"),
        (units.ratio(1e6), ">999x"),
        (units.ratio(None), "–"),
        (units.duration(3.21), "3.2 s"),
        (units.duration(9.97), "10 s"),
        (units.duration(59.6), "1 min 00 s"),
        (units.duration(7500), "2 h 05 min"),
        (units.signed(-0.1234), "−0.123"),
        (units.signed(-0.0001), "0"),
        (units.loss(None), "–"),
        (units.perplexity(1000.0), "e^1000"),
        (units.count(12345), "12 345"),
        (units.one_line("a\nb\x1b[31m\u202ec"), "a b?[31m?c"),
        (units.one_line("x" * 300, 10), "x" * 9 + "…"),
        (units.one_line("x" * 10 + " ", 10), "x" * 10),
        (units.one_line("x" * 11, 10), "x" * 9 + "…"),
    ],
)
def test_units(shown: str, wanted: str) -> None:
    assert shown == wanted
