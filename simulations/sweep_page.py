"""The page of a comparison: one self-contained HTML file with the table and the plots, in the look of a run's report."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedtune.paths import app_root
from server import report_units as units
from simulations import sweep_charts as charts
from simulations import sweep_table as tables
from simulations.sweep_frontier import loss_by_cost
from simulations.sweep_table import Row

LOOKS = 8  # colours; beyond them the lines are dashed


def page(title: str, rows: list[Row], lede: str = "") -> str:
    personal = [row.name for row in rows if row.figures and row.figures[0].personal]
    return (
        _templates()
        .get_template("sweep.html.j2")
        .render(
            title=title,
            lede=lede,
            verdict=verdict(rows),
            headers=tables.headers(rows),
            rows=list(enumerate(rows)),
            base=tables.base_cells(rows),
            note=tables.note(rows),
            notes=tables.notes_of(rows),
            plots=[plot for plot in (charts.loss_by_round(rows), charts.loss_by_bytes(rows)) if plot],
            frontier=loss_by_cost(rows),
            pairs=charts.pairs(rows),
            base_loss=charts.base_loss(rows),
            personal=personal,
            looks=LOOKS,
        )
    )


def verdict(rows: list[Row]) -> str:
    """The best, and whether the next is beyond the spread of the seeds."""
    done = [row for row in rows if row.figures and row.loss.mean == row.loss.mean]
    if not done:
        return "No cell ended well."
    best, base = done[0], charts.base_loss(rows)
    words = f"Best on everybody’s examples: {best.name}, {best.loss}"
    if base is not None:
        words += f", {units.signed(best.loss.mean - base)} to the base model"
    if best.loss.std is None or len(done) < 2:
        return words + "."
    near = [row.name for row in done[1:] if row.loss.mean - best.loss.mean <= best.loss.std + (row.loss.std or 0.0)]
    if not near:
        return f"{words}; no other comes within the spread of the seeds."
    return f"{words}; within the spread of the seeds: {', '.join(near)}."


@cache
def _templates() -> Environment:
    # Names and reasons come from a job file or a plug-in: everything is escaped.
    folders = [app_root() / "simulations", app_root() / "server"]
    return Environment(
        loader=FileSystemLoader(folders), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
