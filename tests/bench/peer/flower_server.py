"""The stock Flower app's server side: FedAvg as shipped, a line in a file at the end of each round."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from network import PlainCNN

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and note when each round was done (round 0: when the first began)."""
    torch.set_num_threads(1)
    stamps = Path(str(context.run_config["stamps"]))

    def note(_: int, __: ArrayRecord) -> MetricRecord | None:
        with stamps.open("a", encoding="ascii") as file:
            file.write(f"{time.time():.6f}\n")
        return None

    nodes = int(context.run_config["nodes"])
    network = PlainCNN(int(context.run_config["width"]))
    arrays = ArrayRecord(network.state_dict())
    del network
    FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes).start(
        grid, arrays, num_rounds=int(context.run_config["rounds"]), evaluate_fn=note
    )
