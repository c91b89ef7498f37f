"""How long does a round take here? A whole federation through the commands a person would type, and its registry.

A round lasts from the moment that the round before was committed to the registry to the moment that it is committed
itself, so that adding up, checkpoint and clearing away are in it. The registry is asked every 20 ms.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from deploy.federation import Federation
from server.home import CoordinatorHome
from server.records import LIVE, State
from server.registry import Registry
from tests.bench import measured
from tests.bench.measured import BATCH, LEARNING_RATE, ONE_IMAGE, SITES, TEST, TRAIN, VALIDATION, Measured, Size
from tests.bench.memory import MIB, Sampler

STUDY = "bench"
ASK_SECONDS = 0.02
QUIET_SECONDS = 3.0
"""How long the ServerApp is left waiting for approvals, so that its idle base can be seen."""
ROLES = {
    "server.superlink": "SuperLink",
    "server.app": "ServerApp",
    "client.agent": "agent",
    "client.connector": "connector",
    "server.cli": "supervisor",
    "client.cli": "supervisor",
}
DRAFT = """schema = 1
sites = [{sites}]
[study]
name = "{study}"
title = "Transport"
purpose = "Measure what a round costs beside the work."
[task]
classes = ["without", "with"]
[network]
name = "plain-cnn"
parameters = {{ width = {width} }}
[input]
size = [{side}, {side}]
[optimiser]
name = "sgd"
learning_rate = {rate}
batch_size = {batch}
[rounds]
count = {rounds}
local_steps = 1
deadline_seconds = 3600
[aggregation]
minimum_sites = {count}
"""


SECURE = '[secagg]\nmode = "on"\n'


def label(line: Sequence[str]) -> str:
    """The role of a process, by its command line; the commands that come and go have none."""
    modules = [after for before, after in itertools.pairwise(line) if before == "-m"]
    role = ROLES.get(modules[0], "") if modules else ""
    return "" if role == "supervisor" and line[-1] not in {"serve", "start"} else role


def measure(
    folder: Path,
    size: Size,
    rounds: int,
    limit: float,
    sites: Sequence[str] = SITES,
    cap: int = 0,
    *,
    secure: bool = False,
) -> Measured:
    """One run.

    Args:
        folder: emptied and used for everything; its path must be short, because Unix sockets have short names.
        limit: seconds after which the run is given up.
        cap: bytes of private writable memory (RLIMIT_DATA) that the first site's agent may have beyond what it has
            when it is idle, set from outside with prlimit; 0 sets none. An agent that is killed by it and started again
            fails the run.
        secure: with secure aggregation; the first round holds the exchange of keys.

    Returns:
        `extra` holds what ServerApp, SuperLink and agent had before the first round ("ServerApp idle", …), what the
        SuperLink had above that ("SuperLink"), and, with a cap, what the capped agent was allowed ("cap"), MiB.

    Raises:
        RuntimeError, ConsiliumError: the run did not get to its end; the message holds the end of the logs.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    with Federation(folder / "f", tuple(sites), env=environment) as federation, Sampler(label) as sampler:
        federation.create()
        federation.serve()
        federation.start()
        for number, site in enumerate(sites):
            images = folder / f"{site}.npz"
            _images(images, number)
            federation.site(site, "data", "connect", "archive", str(images), "--one-image-per-patient")
            federation.site(site, "data", "check", "archive")
        file = folder / f"{STUDY}.toml"
        file.write_text(draft(size, rounds, sites) + (SECURE if secure else ""), encoding="utf-8")
        federation.coordinator("study", "sign", str(file), "--out", str(folder / "study.json"))
        federation.coordinator("study", "launch", STUDY)
        with Registry(CoordinatorHome(federation.coordinator_home)) as registry:
            study = registry.study(STUDY).hash
            federation.until(lambda: all(line.state for line in registry.approvals(study)), "every site to be asked")
            time.sleep(QUIET_SECONDS)
            allowed, agent = _cap(federation, sites[0], cap)
            for site in sites:
                federation.site(site, "study", "approve", STUDY)
            stamps = _watch(federation, registry, study, rounds, limit)
        if agent is not None and not agent.is_running():
            raise RuntimeError(f"the capped agent was ended\n{federation.logs()}")
        found = measured.of(stamps, sampler)
        extra = {f"{role} idle": sampler.before(stamps[0], role) / MIB for role in ("ServerApp", "SuperLink", "agent")}
        extra["SuperLink"] = found.largest["SuperLink"] - extra["SuperLink idle"]
        if allowed:
            extra["cap"] = allowed / MIB
    return Measured(found.seconds, found.first, found.peak, found.largest, found.cpu, extra)


def _watch(federation: Federation, registry: Registry, study: str, rounds: int, limit: float) -> list[float]:
    """When the first round began and when each was committed; waits for the study to finish."""
    stamps: list[float] = []
    last, done, end = 0, False, time.monotonic() + limit
    while not done:
        for event in registry.events(study, after=last):
            last = event.id
            if event.kind == "round" or (event.kind == "slot" and not stamps):
                stamps.append(time.time())
        record = registry.study(study)
        if record.state not in {*LIVE, State.REQUESTED} or time.monotonic() > end:
            if record.state is not State.FINISHED or len(stamps) != rounds + 1:
                raise RuntimeError(f"the study is {record.state} ({record.reason})\n{federation.logs()}")
            done = True
        time.sleep(ASK_SECONDS)
    return stamps


def _cap(federation: Federation, site: str, beyond: int) -> tuple[int, psutil.Process | None]:
    """Limit one agent's private writable memory to what it has now and so much more; returns the limit."""
    agent = federation.process(site, "agent") if beyond else None
    if agent is None:
        return 0, None
    status = Path(f"/proc/{agent.pid}/status").read_text(encoding="ascii").splitlines()
    now = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    agent.rlimit(psutil.RLIMIT_DATA, (now + beyond, now + beyond))
    return now + beyond, agent


def _images(path: Path, seed: int) -> None:
    """A handful of images of noise, with a split of their own."""
    generator = np.random.default_rng(seed)
    arrays: dict[str, NDArray[Any]] = {}
    for side, count in (("train", TRAIN), ("val", VALIDATION), ("test", TEST)):
        arrays[f"{side}_images"] = generator.integers(0, 256, (count, ONE_IMAGE, ONE_IMAGE), dtype=np.uint8)
        arrays[f"{side}_labels"] = np.arange(count) % 2
    with open(path, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())


def draft(size: Size, rounds: int, sites: Sequence[str]) -> str:
    """The study that is measured, as TOML."""
    return DRAFT.format(
        sites=", ".join(f'"{site}"' for site in sites),
        study=STUDY,
        width=size.width,
        side=ONE_IMAGE,
        rate=LEARNING_RATE,
        batch=BATCH,
        rounds=rounds,
        count=len(sites),
    )
