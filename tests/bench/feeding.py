"""How fast does a hospital train, and does the network wait for its images?

    make bench-feeding

`client.training` trains one network on random images of one size, as an agent does: with images augmented a batch at a
time (ours), without augmentation, and with the same steps done by MONAI image by image in one thread. On a GPU also in
float32, without mixed precision. The sides take turns in one process; figures are medians.

On a processor, what a step waited is the time until its batch was there. A GPU computes while Python prepares, so what
it waited is what training with augmentation takes longer than without.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from client import training
from client.feed import Augment, place
from client.imaging import Cohort, Membership
from models import fields, networks, tasks, transforms, weights
from models.augmentation import bare_arrays
from tests.bench.table import Line, show

PLAIN, MONAI, FULL = "not augmented", "MONAI, image by image", "float32"
MOST = 5.0
"""Of a step, in percent, may be waited for images."""
FLAT = ("random_affine", "random_flip", "random_contrast", "random_brightness")
CLASSES = ("background", "finding")


@dataclass(frozen=True)
class Case:
    """A network, its images, its random steps, and how many training steps are measured at a time."""

    network: str
    kind: str
    size: tuple[int, ...]
    channels: int
    batch: int
    steps: int
    augmentation: tuple[str, ...] = FLAT
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.network}, {' × '.join(map(str, self.size))}, {self.batch} at a time"

    def spec(self) -> dict[str, Any]:
        """As a study has it."""
        steps = [{"name": name} for name in self.augmentation]
        return {
            "task": {"kind": self.kind, "classes": list(CLASSES)},
            "network": {"name": self.network, "norm": "group", "parameters": self.parameters},
            "input": {"channels": self.channels, "size": list(self.size), "augmentation": steps},
        }


ON_PROCESSOR = (
    Case("resnet-small", "classification", (28, 28), 1, 32, 40),
    Case("resnet18", "classification", (64, 64), 3, 32, 4),
    Case("unet", "segmentation", (32, 48, 32), 1, 2, 12, ("random_affine", "random_flip")),
)
ON_GPU = (
    Case("resnet18", "classification", (224, 224), 3, 128, 60),
    Case("resnet18", "classification", (64, 64), 3, 128, 120, parameters={"stem": "small"}),
    Case("unet", "segmentation", (96, 96, 96), 1, 4, 60, ("random_affine", "random_flip")),
)


class OneByOne:
    """MONAI's own steps, an image at a time."""

    anywhere = False

    def __init__(self, case: Case) -> None:
        import monai.transforms

        self._steps = []
        for name in case.augmentation:
            entry = transforms.TRANSFORMS[name]
            made = entry.make(monai.transforms, fields.read(entry.parameters, {}), case.size)
            self._steps.append((made, entry.moves, "edge" in entry.parameters))

    def __call__(
        self, images: Tensor, seeds: Sequence[int], masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Images and masks, changed."""
        pictures, labels = list(images), [] if masks is None else list(masks[:, None].float())
        with bare_arrays():
            for step, moves, turns in self._steps:
                for at, seed in enumerate(seeds):
                    step.set_random_state(seed)
                    pictures[at] = step(pictures[at])
                    if labels and moves:
                        step.set_random_state(seed)
                        labels[at] = step(labels[at], **({"mode": "nearest"} if turns else {}))
        return torch.stack(pictures), None if masks is None else torch.stack(labels)[:, 0].to(masks.dtype)


def cohort(case: Case, count: int) -> Cohort:
    """Random images of as many patients."""
    generator = np.random.default_rng(1)
    images = generator.random((count, case.channels, *case.size), dtype=np.float32)
    drawn = generator.integers(0, 2, size=count)
    targets = (images[:, 0] > 0.5).astype(np.uint8) if case.kind == "segmentation" else drawn
    names, sides = tuple(f"p{number}" for number in range(count)), (Membership.TRAIN,) * count
    return Cohort(images, targets, names, sides, CLASSES, (), Counter(), "one image, one patient")


def measure(case: Case, device: str, runs: int) -> list[Line]:
    """What one case came to."""
    spec, found = case.spec(), cohort(case, 4 * case.batch)
    network, task = place(networks.build(spec), device), tasks.get(spec)
    plan = training.Plan("adamw", 0.001, 0.0, 0.0, case.batch, "constant", case.steps, 1, 0.0)
    sides: dict[str, tuple[Augment | None, Callable[..., Any]]] = {
        "ours": (transforms.augmentation(spec), nullcontext),
        PLAIN: (None, nullcontext),
        MONAI: (OneByOne(case), nullcontext),
    }
    if device == "cuda":
        sides[FULL] = (transforms.augmentation(spec), _in_float32)
    seen: dict[str, list[training.Trained]] = {name: [] for name in sides}
    for _ in range(runs + 1):
        for name, (augment, around) in sides.items():
            with around():
                vector = weights.trainable_vector(network)
                seen[name].append(training.train(network, task, found, plan, 1, vector, augment=augment))
    # The first run of each warms up: it chooses convolutions, and moves images to the GPU.
    seconds = {name: [one.seconds for one in some[1:]] for name, some in seen.items()}
    rate = {name: case.batch * case.steps / statistics.median(some) for name, some in seconds.items()}
    shares = {
        name: [100 * one.waited / one.seconds for one in some[1:]] if device == "cpu"
        else [100 * max(0.0, 1 - statistics.median(seconds[PLAIN]) / took) for took in seconds[name]]
        for name, some in seen.items() if name in ("ours", MONAI)
    }  # fmt: skip
    waited = {name: statistics.median(some) for name, some in shares.items()}
    low, high = min(shares["ours"]), max(shares["ours"])
    return [
        Line(f"{case.name}: images a second", "1/s", rate.pop("ours"), rate),
        Line(
            f"  of a step waited for images ({low:.1f} to {high:.1f})", "%", waited["ours"], {MONAI: waited[MONAI]},
            MOST, f"at most {MOST:g} %",
        ),
    ]  # fmt: skip


def _in_float32() -> Any:
    def compute(network: nn.Module, images: Tensor) -> Tensor:
        outputs: Tensor = network(images)
        return outputs

    return mock.patch.object(training, "compute", compute)


def main() -> None:
    """Measure all cases of this machine's device."""
    parser = argparse.ArgumentParser(prog="make bench-feeding")
    parser.add_argument("--runs", type=int, default=5, help="each side, after one that does not count")
    parser.add_argument("--threads", type=int, default=0, help="of torch on a processor; 0: its own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads of the processor"
    lines = [
        line for case in (ON_GPU if device == "cuda" else ON_PROCESSOR) for line in measure(case, device, options.runs)
    ]
    show("feeding", f"Training on {where}", lines)


if __name__ == "__main__":
    main()
