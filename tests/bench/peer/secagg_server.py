"""The stock Flower app's server side under its SecAgg+: the workflow as shipped, a line in a file after each round."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from flwr.app import Context
from flwr.common import ndarrays_to_parameters
from flwr.server import Grid, LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import ServerApp
from network import PlainCNN

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and note when each round was done (round 0: when the first began)."""
    torch.set_num_threads(1)
    stamps = Path(str(context.run_config["stamps"]))

    def note(*_: object) -> None:
        with stamps.open("a", encoding="ascii") as file:
            file.write(f"{time.time():.6f}\n")

    nodes = int(context.run_config["nodes"])
    network = PlainCNN(int(context.run_config["width"]))
    initial = ndarrays_to_parameters([value.numpy() for value in network.state_dict().values()])
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_fit_clients=nodes,
        min_available_clients=nodes,
        initial_parameters=initial,
        evaluate_fn=note,
    )
    config = ServerConfig(num_rounds=int(context.run_config["rounds"]))
    legacy = LegacyContext(context=context, config=config, strategy=strategy)
    DefaultWorkflow(fit_workflow=SecAggPlusWorkflow(num_shares=nodes, reconstruction_threshold=2))(grid, legacy)
