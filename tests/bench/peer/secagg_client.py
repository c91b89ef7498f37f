"""The stock Flower app's client side under its SecAgg+."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.client import Client, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from network import PlainCNN, work


class Site(NumPyClient):
    """One site's training."""

    def __init__(self, context: Context) -> None:
        self._width, self._part = int(context.run_config["width"]), int(context.node_config["partition-id"])

    def fit(
        self, parameters: list[np.ndarray], _config: dict[str, Any]
    ) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        """One round."""
        network = PlainCNN(self._width)
        names = list(network.state_dict())
        network.load_state_dict({n: torch.from_numpy(p.copy()) for n, p in zip(names, parameters, strict=True)})
        work(network, self._part)
        return [value.numpy() for value in network.state_dict().values()], 8, {}


def client_fn(context: Context) -> Client:
    """The client of one message."""
    return Site(context).to_client()


app = ClientApp(client_fn, mods=[secaggplus_mod])
