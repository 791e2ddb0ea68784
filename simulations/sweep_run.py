"""`fedtune compare` from a plan to its table: finished cells are found again, the others played, what came of all written."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.text import Text

from server.run_folder import writing
from simulations import sweep_table
from simulations.sweep import Plan
from simulations.sweep_cell import finished
from simulations.sweep_page import page
from simulations.sweep_pool import play_all
from simulations.sweep_progress import SweepProgress


def sweep(plan: Plan, processes: int | None, console: Console) -> bool:
    """Play what is not finished, then show and write the table and the page. False where a cell failed.

    Raises RunFolderError where a cell of another job lies in the folder, before anything is played.
    """
    found = [finished(cell) for cell in plan.cells]
    done = [outcome for outcome in found if outcome]
    missing = [cell for cell, outcome in zip(plan.cells, found, strict=True) if not outcome]
    if done:
        console.print(f"{len(done)} of {len(plan.cells)} cells are finished in {plan.out}: skipped", soft_wrap=True)
    with SweepProgress(console, len(plan.cells), len(done)) as audience:
        done += play_all(missing, processes, audience)
    rows = sweep_table.rows_of(done, plan.impossible)
    console.print(sweep_table.rich_table(rows))
    for note in sweep_table.notes_of(rows):
        console.print(Text(note), soft_wrap=True)
    _write(plan.out / "table.md", sweep_table.markdown(_title(plan), rows))
    _write(plan.out / "comparison.html", page(_title(plan), rows))
    console.print(Text(f"table: {plan.out / 'table.md'}\npage:  {plan.out / 'comparison.html'}"), soft_wrap=True)
    return not any(outcome.state == "failed" for outcome in done)


def _title(plan: Plan) -> str:
    return f"{plan.scenario}: {plan.seeds} seed{'s' * (plan.seeds != 1)}"


def _write(path: Path, text: str) -> None:
    """All of the new file or the old one."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.writing")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
