"""The report of a run: one self-contained HTML page, made again at any time from what the run folder holds."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedtune import changed_weights
from fedtune.errors import RunFolderError
from fedtune.paths import base_model
from server import report_clients as clients
from server import report_figures as figures
from server import report_units as units
from server import report_view as view
from server.report_folder import RecordedRun, read_run
from server.report_ledger import ledger
from server.report_selection import selection

NAME = "report.html"
FAILURES_SHOWN = 200


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` from metrics.jsonl, comparison.json and job.toml; a failure leaves the old one."""
    page = render(read_run(folder))
    target = folder / NAME
    try:
        _replace(target, page)
    except OSError as error:
        raise RunFolderError(f"the report {target} cannot be written: {error.strerror or error}") from error
    return target


def render(run: RecordedRun) -> str:
    failures, notes = figures.failures(run.rounds), figures.notes(run.rounds)
    names = figures.client_names(run.rounds)
    return (
        _templates()
        .get_template("report.html.j2")
        .render(
            run=run,
            lede=view.lede(run),
            verdict=view.verdict(run.comparison),
            metric_names=view.metric_names(run.rounds),
            layers=view.layers(run.rounds),
            selection=selection(run.rounds),
            headlines=view.headlines(run),
            loss_chart=view.loss_chart(run),
            bytes_chart=view.bytes_chart(run.rounds),
            seconds_chart=view.seconds_chart(run.rounds),
            clients=clients.client_views(run.rounds),
            clients_hidden=max(0, len(names) - clients.SHOWN),
            clients_count=len(names),
            scale=clients.clients_scale(run.rounds),
            changes=figures.changes(run.rounds),
            ledger=ledger(run.rounds),
            comparison=view.comparison_rows(run.comparison),
            notes=notes[-FAILURES_SHOWN:],
            notes_hidden=max(0, len(notes) - FAILURES_SHOWN),
            failures=failures[-FAILURES_SHOWN:],
            failures_hidden=max(0, len(failures) - FAILURES_SHOWN),
            loading=loading_lines(run),
        )
    )


def loading_lines(run: RecordedRun, folder: Path = Path()) -> str:
    """Three lines of Python that load what the run published; as it stands, they are typed in the run folder."""
    model = view.section(run.job, "model")
    classification = model.get("task") == "classification"
    auto = "AutoModelForSequenceClassification" if classification else "AutoModelForCausalLM"
    if run.published == "model":
        return _model_lines(auto, folder, run.model_written)
    base = run.base_model or str(model.get("path", "the base model"))
    if base.startswith("builtin:"):
        base = str(base_model())
    classes = _classes(model["labels"]) if classification and "labels" in model else None
    if run.published == "weights":
        return changed_weights.loading_lines(auto, base, str(folder / "weights" / "weights.safetensors"), classes)
    labels = f", num_labels={classes}" if classes else ""
    return (
        "from peft import PeftModel\n"
        f"from transformers import {auto}\n"
        f"model = PeftModel.from_pretrained({auto}.from_pretrained({base!r}{labels}), {str(folder / 'adapter')!r})"
    )


def _model_lines(auto: str, folder: Path, written: bool) -> str:
    lines = (
        f"from transformers import {auto}, AutoTokenizer\n"
        f"model = {auto}.from_pretrained({str(folder / 'model')!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder / 'model')!r})"
    )
    return lines if written else f"# the model is not written yet; first type: fedtune export {folder}\n{lines}"


def _classes(labels: Any) -> Any:
    """A job names its classes or says how many there are."""
    return len(labels) if isinstance(labels, list) else labels


@cache
def _templates() -> Environment:
    # Client names and failure reasons come from strangers: everything is escaped, and a forgotten name is an error.
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "size": units.size,
        "duration": units.duration,
        "loss": units.loss,
        "signed": units.signed,
        "perplexity": units.perplexity,
        "count": units.count,
        "metric": units.metric,
        "ratio": units.ratio,
        "name": lambda text: units.one_line(text, 60),
        "note": lambda text: units.one_line(text, 400),
    }
    return templates


def _replace(target: Path, text: str) -> None:
    """All of the new file or the old one: written beside it, then renamed."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
