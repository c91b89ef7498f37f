"""What does privacy cost in the running federation? 200 private secure steps on real X-rays over five hospitals.

`make bench-at_work` deals the chest X-rays out by patient to five hospitals, each a node of its own with connector and
agent, behind one coordinator over TLS on loopback; every optimiser step is one secure sum with each hospital's share of
the noise. Half way one agent is killed with signal 9. The same study then runs in one process without sockets
(`server.simulation`), and the two times per step stand beside each other. Both run on the same processors, so five
hospitals' work is done one after the other in either case.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from client import dealing
from client.agent_client import Local
from client.home import SiteHome
from deploy.federation import Federation
from privacy.budget import epsilon, plan
from privacy.grants import Allowance, Claims, Grant
from privacy.identity import Identity
from privacy.study import Study
from server.commands.signing import sign_study
from server.home import CoordinatorHome
from server.records import SlotState, State
from server.registry import Registry
from server.simulation import Simulation
from tests.bench.learning_sets import DATA
from tests.bench.table import Line, show

SITES = ("centre", "east", "north", "south", "west")
SET = DATA / "chest_xray_pneumonia"
FOREVER = "2099-01-01T00:00:00Z"
PLAN = """
sites = ["centre", "east", "north", "south", "west"]
[study]
name = "at-work"
title = "Pneumonia in chest X-rays, with patient-level privacy"
purpose = "Measure what a private step costs in the running federation."
[task]
classes = ["normal", "pneumonia"]
[network]
name = "resnet-small"
[input]
size = [48, 48]
transforms = [{{ name = "normalise", parameters = {{ mean = "0.5", std = "0.25" }} }}]
[optimiser]
name = "sgd"
learning_rate = 1
batch_size = 32
[rounds]
count = {steps}
local_steps = 1
reserve = 20
deadline_seconds = 300
[split]
validation = 0.1
test = 0.2
[aggregation]
weights = "equal"
minimum_sites = 4
[privacy]
mode = "shared"
noise_multiplier = 1.2
sampling_rate = 0.05
expected_patients = 100
images_per_patient = 1
patients_bound = 5000
site_patients_bound = 800
delta = 0.0001
evaluation_noise = 2
[secagg]
mode = "on"
"""


def deployed(draft: Study, data: Path) -> tuple[list[float], str, str, int]:
    """Seconds of each step, ε claimed at T_max, ε of the slots used, and how many slots those were."""
    root = Path(tempfile.mkdtemp(prefix="wrk-"))
    dealing.deal(data, root / "images", SITES)
    try:
        with Federation(root, SITES, env={"OMP_NUM_THREADS": "1"}) as federation:
            federation.create("bench")
            federation.serve()
            federation.start()
            home, officer = CoordinatorHome(federation.coordinator_home), Identity.generate()
            with Registry(home) as registry:
                record = sign_study(registry, home.identity(), draft, None)
                claims = Claims.of(record.study)
                registry.launch("at-work")
                for site in SITES:
                    file = str(root / "images" / site / "images.npz")
                    federation.site(site, "data", "connect", "archive", file)
                    _grant(federation, registry, site, officer, claims)
                times = _watch(federation, registry, record.hash)
                used = [s for s in registry.course(record.hash).slots() if s.kind == "train"]
                part = plan(record.study)["train"]
                spent = epsilon(part.of(len(used)), record.study.privacy.delta)
        return times, f"{claims.epsilon:f}", f"{spent:f}", len(used)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _grant(federation: Federation, registry: Registry, site: str, officer: Identity, claims: Claims) -> None:
    def asked() -> bool:
        with Local(SiteHome(federation.site_home(site)).local_socket) as door:
            return any(line.study == claims.study for line in door.status().studies)

    federation.until(asked, f"the study to reach {site}")
    lifetime = Allowance(site=site, serial=1, epsilon="100", delta=f"{claims.delta:f}", order=4)
    grant = Grant(
        site=site, serial=1, delta=f"{claims.delta:f}", study=claims.study, slots=claims.slots,
        epsilon=f"{claims.epsilon:f}", cap=f"{claims.cap:f}", expires=FOREVER,
    )  # fmt: skip
    with Local(SiteHome(federation.site_home(site)).local_socket) as door:
        door.trust(officer.public)
        door.take_grant(lifetime.signed(officer).encode())
        door.take_grant(grant.signed(officer).encode())
        door.decide(claims.study, "approve", "archive")


def _watch(federation: Federation, registry: Registry, study: str) -> list[float]:
    """Wait for the end; half way, kill an agent with signal 9."""
    course, count, killed = registry.course(study), registry.study(study).study.rounds.count, False
    while (state := registry.study(study).state) not in {State.FINISHED, State.FAILED, State.PAUSED}:
        done = sum(slot.kind == "train" and slot.state is SlotState.DONE for slot in course.slots())
        if not killed and done >= count // 2:
            federation.kill("west", "agent")
            killed = True
        time.sleep(0.5)
    if state is not State.FINISHED or not killed:
        raise SystemExit(f"the study is {state.value}: {registry.study(study).reason}\n{federation.logs()}")
    return [float(e.data["metrics"]["seconds"]) for e in registry.events(study, limit=10_000) if e.kind == "round"]


def in_process(draft: Study, data: Path) -> float:
    """Seconds of a step of the same study in one process."""
    with Simulation(data, SITES, threads=1) as simulation:
        stamps: list[float] = []
        done = simulation.run(draft, lambda site: stamps.append(time.monotonic()))
        events = simulation.registry.events(done.record.hash, limit=10_000)
        rounds = sum(event.kind == "round" for event in events)
        return (stamps[-1] - stamps[0]) / max(1, rounds)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps (200 takes about ten minutes)")
    steps = parser.parse_args().steps
    if not SET.exists():
        raise SystemExit(f"The chest X-rays are not there ({SET}); set CONSILIUM_DATA to the folder of image sets.")
    draft = Study.from_toml(PLAN.format(steps=steps))
    times, claimed, spent, used = deployed(draft, SET)
    alone = in_process(draft, SET)
    middle = statistics.median(times)
    show(
        "at_work",
        f"{steps} private secure steps, five hospitals, one killed half way",
        [
            Line(
                "a step", "s", middle, {"in one process": alone, "slowest": max(times)}, 1.3 * alone + 2,
                "1.3 × in one process + 2 s",
            ),
            Line(
                f"ε at the end, of {used} slots", "", float(spent), {"claimed at T_max": float(claimed)},
                float(claimed), "what was claimed",
            ),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
