"""The stock Flower app's ServerApp: FedAvg as it comes. What the bench needs is one line for each round that has ended."""

from __future__ import annotations

import time
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict
from task import load_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    arrays = ArrayRecord(get_peft_model_state_dict(load_model(str(config["model"]))))
    strategy = FedAvg(fraction_evaluate=float(config["fraction-evaluate"]))

    def ended(server_round: int, arrays: ArrayRecord) -> None:
        """Flower calls this before the first round and after each."""
        with Path(str(config["ended"])).open("a") as file:
            file.write(f"{time.monotonic()}\n")

    strategy.start(grid, arrays, num_rounds=int(config["num-server-rounds"]), evaluate_fn=ended)
