"""What is measured of one run, ours or another's? Seconds of each round, and peak memory by role."""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.bench.memory import ENDED, MIB, Sampler

ONE_IMAGE = 16
"""Side of the images in pixels: the smallest that `plain-cnn` takes, so that work is next to nothing."""
BATCH = 2
TRAIN, VALIDATION, TEST = 8, 2, 2
"""Images at each site."""
LEARNING_RATE = 0.001
SITES = ("north", "east", "south")


@dataclass(frozen=True)
class Size:
    """A size of model. `width` multiplies the channels of plain-cnn; about 1 M x width² parameters."""

    name: str
    width: int
    rounds: int


SIZES = {
    "4mb": Size("4 MB", 1, 10),
    "100mb": Size("100 MB", 5, 6),
    "1gb": Size("1 GB", 16, 2),
}


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        seconds: of each round but the first, from the moment that one was done to the moment that the next was.
        first: seconds of the first round where the run tells them, else 0; it holds what is loaded once.
        peak: most memory of everything at one time, MiB (PSS).
        largest: most memory of one process, by role, MiB (PSS).
        cpu: CPU seconds of a round, by role, the first round left out.
        extra: other figures, by name.
    """

    seconds: Sequence[float]
    first: float
    peak: float
    largest: Mapping[str, float]
    cpu: Mapping[str, float]
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median seconds of a round."""
        return statistics.median(self.seconds)

    def words(self) -> str:
        """For the notes under the table."""
        sizes = ", ".join(f"{role} {size:,.0f}" for role, size in sorted(self.largest.items()))
        cpu = ", ".join(f"{role} {seconds:.2f}" for role, seconds in sorted(self.cpu.items()) if seconds >= 0.005)
        spread = f"{min(self.seconds):.2f} to {max(self.seconds):.2f} s over {len(self.seconds)} rounds"
        return f"{spread}, first {self.first:.1f} s; MiB of the largest process: {sizes}; CPU-s a round: {cpu}"


def of(stamps: Sequence[float], sampler: Sampler) -> Measured:
    """From the moment the first round began and those at which each was done (seconds), and the memory."""
    spans = [later - earlier for earlier, later in itertools.pairwise(stamps)]
    largest = {role: sampler.largest(role) / MIB for role in sampler.roles()}
    cpu = {role: sampler.cpu(role, stamps[1], stamps[-1]) / len(spans[1:]) for role in [*sampler.roles(), ENDED]}
    return Measured(spans[1:], spans[0], sampler.peak() / MIB, largest, cpu)


def pooled(runs: Sequence[Measured]) -> Measured:
    """Several runs as one: all rounds, and the median of each figure of memory."""
    seconds = [value for run in runs for value in run.seconds]
    roles = sorted({role for run in runs for role in run.cpu})
    largest = {role: statistics.median(run.largest.get(role, 0.0) for run in runs) for role in runs[0].largest}
    names = sorted({name for run in runs for name in run.extra})
    extra = {name: statistics.median(run.extra.get(name, 0.0) for run in runs) for name in names}
    cpu = {role: statistics.median(run.cpu.get(role, 0.0) for run in runs) for role in roles}
    first, peak = (statistics.median(getattr(run, name) for run in runs) for name in ("first", "peak"))
    return Measured(seconds, first, peak, largest, cpu, extra)


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes that we started, politely at first, with everything below each."""
    import psutil

    family: list[psutil.Process] = []
    for process in processes:
        try:
            family += psutil.Process(process.pid).children(recursive=True)
        except psutil.Error:
            continue
    for process in processes:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
    for process in processes:
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for child in family:
        try:
            if child.is_running():
                child.kill()
        except psutil.Error:
            continue
