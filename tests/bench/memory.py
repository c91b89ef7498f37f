"""How much memory and processor time does a whole federation take? PSS and CPU seconds of a process tree, sampled.

PSS counts a page that k processes share as 1/k in each, so that the sum over processes is what the machine has to
hold; a sum of resident sizes would count torch's libraries once for every process. A sample reads one small file of
the kernel for each process; the pause between two samples is never shorter than ten times what a sample took, so
that measuring costs at most a tenth of one core. CPU seconds count processes that ended, through the parent that
waited for them; they say what a round costs also on a machine where others work.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import psutil

PAUSE_SECONDS = 0.3
MIB = 1 << 20
ENDED = "ended"
"""The role of CPU seconds of processes that ended; they have no memory."""
Label = Callable[[Sequence[str]], str]
"""From a process's command line to its role; "" leaves the process out."""


@dataclass(frozen=True)
class Sample:
    """One look: when (seconds since the epoch), bytes of PSS by role (summed; of the largest process), CPU seconds."""

    at: float
    total: Mapping[str, int]
    largest: Mapping[str, int]
    cpu: Mapping[str, float]


class Sampler:
    """Samples every descendant of this process that `label` gives a role, from enter to exit."""

    def __init__(self, label: Label) -> None:
        self._label = label
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self._roles: dict[tuple[int, float], str] = {}
        self.samples: list[Sample] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def peak(self, role: str | None = None) -> int:
        """The most bytes that everything, or all processes of one role, held at one time."""
        return max((s.total.get(role, 0) if role else sum(s.total.values()) for s in self.samples), default=0)

    def largest(self, role: str) -> int:
        """The most bytes that one process of a role held."""
        return max((s.largest.get(role, 0) for s in self.samples), default=0)

    def cpu(self, role: str, since: float, until: float) -> float:
        """CPU seconds that one role took between two moments (seconds since the epoch)."""
        return self._cpu_at(role, until) - self._cpu_at(role, since)

    def before(self, moment: float, role: str) -> int:
        """The most bytes that one process of a role held before a moment."""
        return max((s.largest.get(role, 0) for s in self.samples if s.at < moment), default=0)

    def roles(self) -> list[str]:
        """Every role that was seen."""
        return sorted({role for sample in self.samples for role in sample.total})

    def _cpu_at(self, role: str, moment: float) -> float:
        """Linear between the samples around that moment; a role that has ended keeps what it had."""
        known = [(s.at, s.cpu[role]) for s in self.samples if role in s.cpu]
        for (start, before), (end, after) in itertools.pairwise(known):
            if start <= moment <= end:
                return before + (after - before) * (moment - start) / (end - start)
        return 0.0 if not known or moment < known[0][0] else known[-1][1]

    def _run(self) -> None:
        parent = psutil.Process()
        while not self._end.is_set():
            began = time.monotonic()
            self.samples.append(self._look(parent))
            self._end.wait(max(PAUSE_SECONDS, 10 * (time.monotonic() - began)))

    def _look(self, parent: psutil.Process) -> Sample:
        total, largest, cpu = Counter[str](), Counter[str](), defaultdict[str, float](float)
        for process in parent.children(recursive=True):
            try:
                role = self._role(process)
                if not role:
                    continue
                size, times = int(process.memory_full_info().pss), process.cpu_times()
            except psutil.Error:
                continue  # it ended meanwhile
            total[role] += size
            largest[role] = max(largest[role], size)
            cpu[role] += times.user + times.system
            cpu[ENDED] += times.children_user + times.children_system
        return Sample(time.time(), total, largest, cpu)

    def _role(self, process: psutil.Process) -> str:
        """The role; asked once a process, but again while it still has its parent's command line."""
        key = (process.pid, process.create_time())
        role = self._roles.get(key, "")
        if not role:
            role = self._roles[key] = self._label(process.cmdline())
        return role
