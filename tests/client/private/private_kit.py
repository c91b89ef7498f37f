"""What the tests of the private step share: specifications, batches, and the clipped sum taken the slow way."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from client.private.gradients import SLACK
from models import tasks
from models.networks import NETWORKS
from models.weights import Layout

torch.set_num_threads(1)

ONE_PATIENT_EACH = np.arange(6, dtype=np.int64)


def spec_of(name: str, size: list[int], kind: str | None = None, **sections: Any) -> dict[str, Any]:
    """A specification of a network, with a task that it fits."""
    usual = "segmentation" if NETWORKS[name].answers == "pixels" else "classification"
    return {
        "task": {"kind": kind or usual, "classes": ["a", "b", "c"]},
        "network": {"name": name, **sections.pop("network", {})},
        "input": {"channels": 1, "size": size},
        **sections,
    }


def batch(
    spec: dict[str, Any], images: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[tasks.Task, Tensor, Tensor]:
    """The task of a specification, random images and their targets."""
    generator, task = torch.Generator().manual_seed(seed), tasks.get(spec)
    size = spec["input"]["size"]
    shown = torch.randn(images, spec["input"]["channels"], *size, generator=generator, dtype=dtype)
    if task.target == "labels":
        marks = torch.randint(0, 2, (images, 3), generator=generator).to(dtype)
        marks[:, 1] = float("nan")  # not known
        return task, shown, marks
    shape = (images, *size) if task.target == "mask" else (images,)
    return task, shown, torch.randint(0, 3, shape, generator=generator)


def vectors(network: nn.Module, task: Any, images: Tensor, targets: Tensor, owner: Any) -> dict[int, Any]:
    """Each patient's mean gradient in the order of the layout, float64 [d] by number; one ordinary pass each."""
    own, layout = dict(network.named_parameters()), Layout.of(network)
    wanted = [own[name] for name, trainable in zip(layout.names, layout.trainable, strict=True) if trainable]
    found = {}
    for patient in sorted(set(owner.tolist()) - {-1}):
        at = torch.from_numpy(np.flatnonzero(owner == patient))
        loss = task.losses(network(images[at]), targets[at]).mean()
        parts = torch.autograd.grad(loss, wanted, allow_unused=True)
        whole = [torch.zeros_like(o) if p is None else p for o, p in zip(wanted, parts, strict=True)]
        found[patient] = torch.cat([part.flatten().double() for part in whole]).numpy()
    return found


def clipped(vector: Any, clip_norm: float) -> Any:
    """A patient's vector within C (1 − 2⁻¹⁰)."""
    bound = clip_norm * (1 - SLACK)
    norm = np.linalg.norm(vector)
    return vector * min(1.0, bound / norm) if norm > 0 else vector


def middle(found: dict[int, Any]) -> float:
    """A clip norm that some patients exceed and others do not."""
    return float(np.median([np.linalg.norm(vector) for vector in found.values()]))


class Every(nn.Module):
    """Small, with one of every kind of layer that the networks have, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.down = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.slope = nn.PReLU()
        self.depth = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False)
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.mirror = nn.Conv2d(4, 4, (3, 2), padding="same", padding_mode="reflect")
        self.slopes = nn.PReLU(4)
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1)
        self.twice = nn.Conv2d(6, 6, 1)
        self.rows = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 1, h, w] -> [n, 3]."""
        x = self.slope(self.norm(self.down(x)))
        x = self.slopes(self.mirror(self.instance(x + self.depth(x))))
        x = self.twice(torch.tanh(self.twice(self.up(x))))
        return self.head(self.rows(x.mean((2, 3))))


@contextmanager
def watched(network: nn.Module) -> Iterator[tuple[list[tuple[int, ...]], list[str]]]:
    """The shapes of what goes through a network, and every line that we log meanwhile, of any level."""
    passes: list[tuple[int, ...]] = []
    lines: list[str] = []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.partition(".")[0] in {"consilium", "root"}:
                lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")

    def note(_: nn.Module, received: tuple[Tensor, ...]) -> None:
        passes.append(tuple(received[0].shape))

    loggers, listen = [logging.getLogger(name) for name in ("", "consilium", "consilium.agent")], Listen()
    levels = [logger.level for logger in loggers]
    hook = network.register_forward_pre_hook(note)
    loggers[0].addHandler(listen)
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    try:
        yield passes, lines
    finally:
        hook.remove()
        loggers[0].removeHandler(listen)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
