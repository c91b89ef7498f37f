"""NVFLARE's client script, as its recipe for PyTorch asks for it; notes when each round's model comes in."""

from __future__ import annotations

import os
import time
from pathlib import Path

import nvflare.client as flare
import torch
from network import PlainCNN, work


def main() -> None:
    """Answer until there is no more."""
    torch.set_num_threads(1)
    flare.init()
    site = str(flare.get_site_name())
    network = PlainCNN(int(os.environ["BENCH_WIDTH"]))
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        with Path(os.environ["BENCH_STAMPS"]).joinpath(site).open("a", encoding="ascii") as file:
            file.write(f"{time.time():.6f}\n")
        network.load_state_dict({name: torch.as_tensor(value) for name, value in received.params.items()})
        loss = work(network, sum(site.encode()))
        flare.send(
            flare.FLModel(params=network.state_dict(), metrics={"loss": loss}, meta={"NUM_STEPS_CURRENT_ROUND": 1})
        )


main()
