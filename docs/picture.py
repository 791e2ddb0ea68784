"""The picture of the demo's table in the README, from the folder of a real run: python docs/picture.py runs/demo"""

from __future__ import annotations

import json
import re
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI

from client.data.sources import clients_in
from fedtune.job import load_job
from server.records import Comparison, RoundRecord
from server.table_parts import Words
from simulations.flower_engine import training_examples


def picture(run: Path) -> str:
    """The table that the terminal showed, as SVG."""
    job = load_job(run / "job.toml")
    metrics = (run / "metrics.jsonl").read_text(encoding="utf-8")
    rounds = [RoundRecord.from_json(json.loads(line)) for line in metrics.splitlines()]
    console = Console(record=True, file=StringIO(), force_terminal=True, width=76)
    words = Words(console)
    title = words.title(job, training_examples(job, clients_in(job.data, job.clients)))
    console.print(words.table(title, rounds, len(rounds)))
    if (compared := run / "comparison.json").is_file():
        console.print(words.comparison(Comparison(**json.loads(compared.read_text(encoding="utf-8"))), rounds))
    svg = console.export_svg(title="fedtune simulate demo", theme=DIMMED_MONOKAI, unique_id="demo")
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # fetches no font: the reader's own does


if __name__ == "__main__":
    Path(__file__).with_name("demo.svg").write_text(picture(Path(sys.argv[1])), encoding="utf-8")
