"""What does it cost to clip each patient's gradient, beside Opacus and beside training without?

    make bench-dp

One step is forward, backward, and the sum of gradients (of clipped gradients), without noise and without the
optimiser. Opacus runs in its hooks mode (every patient's gradient of every layer at once) and in its ghost mode (norms
first, then a second backward pass), with one patient an image, the same loss as a sum and the same bound. All sides
work in one process on one thread and take turns; that they give the same sum is checked before anything is timed.
Seconds are those of the processor, so that other work on the machine counts little. Memory is the most that the
process held during a step beyond what it held before it.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn

from client.private.gradients import PatientGradients
from models import networks, tasks
from models.weights import Layout
from tests.bench.table import Line, show

CLIP_NORM = 1.0
GOAL = 0.7
"""Of the smaller of Opacus' overheads."""
AGREE = 2e-3
"""Our bound is below Opacus' by one part in a thousand."""
MIB = 1 << 20
Step = Callable[[], None]
Result = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A network, its images and how often a step is measured."""

    name: str
    spec: dict[str, Any]
    batch: int
    runs: int


CASES = [
    Case("resnet18, 32 px, 16 images", {
        "task": {"kind": "classification", "classes": ["normal", "finding"]},
        "network": {"name": "resnet18", "norm": "group", "parameters": {"stem": "small"}},
        "input": {"channels": 1, "size": [32, 32]},
    }, 16, 7),
    Case("unet, 32³ voxels, 4 volumes", {
        "task": {"kind": "segmentation", "classes": ["background", "structure"]},
        "network": {"name": "unet", "norm": "group"},
        "input": {"channels": 1, "size": [32, 32, 32]},
    }, 4, 15),
]  # fmt: skip


@dataclass
class Side:
    """One way to do a step, how its result is read and forgotten, and what its steps took."""

    step: Step
    result: Result
    forget: Step
    seconds: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """One step, from nothing but the network to its result."""
        self.forget()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        before, start, busy = _status("VmRSS"), time.perf_counter(), time.process_time()
        self.step()
        self.seconds.append(time.process_time() - busy)
        self.clock.append(time.perf_counter() - start)
        self.memory.append(_status("VmHWM") - before)
        self.forget()


def sides(case: Case) -> dict[str, Side]:
    """Every way to do a step on the same network, images and targets."""
    torch.manual_seed(1)
    network, task = networks.build(case.spec).train(), tasks.get(case.spec)
    size = case.spec["input"]["size"]
    images = torch.randn(case.batch, 1, *size)
    targets = torch.randint(0, 2, (case.batch, *size) if task.target == "mask" else (case.batch,))
    return {
        "plain": _plain(copy.deepcopy(network), task, images, targets),
        "ours": _ours(copy.deepcopy(network), task, images, targets),
        "Opacus hooks": _hooks(copy.deepcopy(network), task, images, targets),
        "Opacus ghost": _ghost(copy.deepcopy(network), task, images, targets),
    }


def _plain(network: nn.Module, task: Any, images: Tensor, targets: Tensor) -> Side:
    def step() -> None:
        task.losses(network(images), targets).sum().backward()

    return Side(step, lambda: _gradients(network), network.zero_grad)


def _ours(network: nn.Module, task: Any, images: Tensor, targets: Tensor) -> Side:
    engine, owner = PatientGradients(network, task, CLIP_NORM), np.arange(len(images))
    found: dict[str, Any] = {}

    def step() -> None:
        found["sum"] = engine.sum(images, targets, owner)

    def result() -> dict[str, Tensor]:
        vector = found["sum"].astype(np.float32)
        return {name: torch.from_numpy(part) for name, part in Layout.of(network).split(vector).items()}

    return Side(step, result, found.clear)


def _hooks(network: nn.Module, task: Any, images: Tensor, targets: Tensor) -> Side:
    module = GradSampleModule(network, loss_reduction="sum")
    optimiser = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=None,
        loss_reduction="sum",
    )

    def step() -> None:
        task.losses(module(images), targets).sum().backward()
        optimiser.clip_and_accumulate()

    def result() -> dict[str, Tensor]:
        return {name: value.summed_grad for name, value in network.named_parameters()}

    return Side(step, result, lambda: optimiser.zero_grad(set_to_none=True))


def _ghost(network: nn.Module, task: Any, images: Tensor, targets: Tensor) -> Side:
    module = GradSampleModuleFastGradientClipping(
        network, max_grad_norm=CLIP_NORM, use_ghost_clipping=True, loss_reduction="sum"
    )
    optimiser = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=None,
        loss_reduction="sum",
    )

    def step() -> None:
        module.enable_hooks()
        DPTensorFastGradientClipping(module, optimiser, task.losses(module(images), targets), "sum").backward()

    return Side(step, lambda: _gradients(network), lambda: optimiser.zero_grad(set_to_none=True))


def _gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad for name, value in network.named_parameters() if value.grad is not None}


def agree(found: dict[str, Side]) -> float:
    """How far the three clipped sums lie apart, as a share of ours; ends the program where it is too far."""
    ours = found["ours"].result()
    length = float(torch.stack([part.double().norm() for part in ours.values()]).norm())
    worst = 0.0
    for name in ("Opacus hooks", "Opacus ghost"):
        theirs = found[name].result()
        apart = torch.stack([(ours[key].double() - theirs[key].double()).norm() for key in ours]).norm()
        worst = max(worst, float(apart) / length)
    if worst > AGREE:
        raise SystemExit(f"the sums differ by {worst:.1e} of their length: nothing was measured")
    return worst


def measure(case: Case) -> tuple[list[Line], list[str]]:
    """All lines of one case, and the spread for the notes."""
    found = sides(case)
    for side in found.values():
        side.step()
    apart = agree(found)
    for _ in range(case.runs):
        for side in found.values():
            side.measure()
    seconds = {name: statistics.median(side.seconds) for name, side in found.items()}
    memory = {name: statistics.median(side.memory) / MIB for name, side in found.items()}
    overhead = {name: seconds[name] / seconds["plain"] - 1 for name in found if name != "plain"}
    best = min(overhead["Opacus hooks"], overhead["Opacus ghost"])
    lines = [
        _line(f"{case.name}: a step", "ms", {name: 1000 * value for name, value in seconds.items()}),
        _line("  overhead over plain", "", overhead, GOAL * best, f"{GOAL} of Opacus' best"),
        _line("  memory of a step", "MiB", memory),
    ]
    spread = ", ".join(
        f"{name} {1000 * min(side.seconds):,.0f} to {1000 * max(side.seconds):,.0f}"
        f" (clock {1000 * statistics.median(side.clock):,.0f})"
        for name, side in found.items()
    )
    return lines, [f"{case.name}: ms over {case.runs} steps: {spread}; the sums agree to {apart:.1e}"]


def _line(what: str, unit: str, values: dict[str, float], goal: float | None = None, rule: str = "") -> Line:
    return Line(
        what, unit, values["ours"], {name: value for name, value in values.items() if name != "ours"}, goal, rule
    )


def _status(key: str) -> int:
    """Bytes of a line of this process' status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this kernel does not tell {key}: the benchmark needs Linux")


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # torch warns of Opacus' backward hooks
    lines: list[Line] = []
    notes: list[str] = []
    with _one_thread():
        for case in CASES:
            if options.only in case.name:
                more, spread = measure(case)
                lines, notes = [*lines, *more], [*notes, *spread]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    notes.append(f"Medians of processor time, one thread, torch {torch.__version__}. Load of the machine: {load}")
    show("dp", "A step with every patient's gradient clipped", lines, notes)


if __name__ == "__main__":
    main()
