"""A site with an officer, a grant and a study with per-site noise; and a process that kills itself where it is told."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from privacy.grants import Allowance, Claims, Grant
from privacy.identity import Identity
from privacy.roster import expiry
from tests.client.agent.bed import ROOT, SITE, Bed, make_bed
from tests.client.agent.ring_kit import RingBed, make_ring
from tests.study_kit import Sections

NOISE: Sections = {
    "aggregation": {"weights": "equal"},
    "privacy": {
        "mode": "per-site", "noise_multiplier": 2, "sampling_rate": 0.5, "expected_patients": 12,
        "patients_bound": 1000, "site_patients_bound": 40, "delta": 0.0001, "evaluation_noise": 4,
    },
}  # fmt: skip


def private_bed(folder: Path, steps: int = 2, images: int = 40) -> Bed:
    """A bed whose study has noise; nothing is granted yet."""
    return make_bed(folder, steps=steps, images=images, **NOISE)


def shared_ring(folder: Path, prepare: Callable[[Bed], object] | None = None) -> RingBed:
    """The same with shared noise, in a ring of four that is set up; `prepare` is `granted` or does more."""
    privacy = {**NOISE["privacy"], "mode": "shared"}
    ring = make_ring(folder, prepare or granted, {**NOISE, "privacy": privacy}, steps=1)
    ring.set_up()
    return ring


def paper(officer: Identity, bed: Bed, serial: int = 1, **changes: Any) -> bytes:
    """A grant that covers the bed's study."""
    claims = Claims.of(bed.study)
    values: dict[str, Any] = {
        "site": SITE, "serial": serial, "study": bed.hash, "slots": bed.study.slots, "epsilon": f"{claims.epsilon:f}",
        "cap": f"{claims.cap:f}", "delta": bed.study.privacy.delta, "expires": expiry(datetime.now(UTC)),
    }  # fmt: skip
    return Grant(**{**values, **changes}).signed(officer).encode()


def allow(bed: Bed, epsilon: str = "1000", settles: str = "") -> Identity:
    """Pin an officer who allows much, and grants the study."""
    assert bed.agent is not None
    officer = Identity.generate()
    bed.agent.purse.trust(officer.public)
    lifetime = Allowance(site=SITE, serial=1, epsilon=epsilon, delta=bed.study.privacy.delta, order=4, settles=settles)
    bed.agent.purse.take(lifetime.signed(officer).encode())
    bed.agent.purse.take(paper(officer, bed))
    return officer


def granted(bed: Bed) -> Identity:
    """All the way to an open session of a granted study."""
    bed.start()
    bed.approve()
    officer = allow(bed)
    assert bed.call("open", bed.initial).detail["initial"] == "held"
    return officer


def rows(bed: Bed, query: str, *values: Any) -> list[tuple[Any, ...]]:
    """What the agent's records say, read beside it."""
    with sqlite3.connect(f"file:{bed.home.agent}/agent.db?mode=ro", uri=True, timeout=10) as records:
        return records.execute(query, values).fetchall()


def charges(bed: Bed) -> list[tuple[Any, ...]]:
    """(slot, kind, round, steps, paid, counter) of every charge."""
    return rows(bed, "SELECT slot, kind, round, steps, paid, counter FROM charges ORDER BY counter")


def journal(bed: Bed) -> list[dict[str, Any]]:
    """Everything that left."""
    path = bed.home.agent / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


_SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import client.agent.core, client.agent.keepsakes, client.agent.logbook, client.agent.purse, client.agent.store
import privacy.airlock
from client.agent.core import Agent
from client.home import SiteHome

home, document, payload, where = Path(sys.argv[1]), *(Path(name).read_bytes() for name in sys.argv[2:4]), sys.argv[4]
when, module, kind, method = where.split()
owner = getattr(sys.modules[module], kind)
real = getattr(owner, method)

def deadly(*arguments, **more):
    if when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    found = real(*arguments, **more)
    os.kill(os.getpid(), signal.SIGKILL)
    return found

agent = Agent(SiteHome(home))
setattr(owner, method, deadly)
answer = json.loads(agent.submit(document, payload).data)["body"]
agent.fetch(*(answer[name] for name in ("study", "session", "slot", "request")), 0, answer["payload_bytes"])
print("it lived")
"""


def die_at(bed: Bed, where: str, document: bytes, payload: bytes) -> None:
    """Send a request to an agent in a process of its own, and fetch its answer; it is killed with signal 9 at a point.

    Args:
        where: "before" or "after", module, class and method.
    """
    folder = bed.home.root / "deadly"
    folder.mkdir(exist_ok=True)
    (folder / "document").write_bytes(document)
    (folder / "payload").write_bytes(payload)
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(bed.home.root), str(folder / "document"), str(folder / "payload"), where],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, f"it was not killed at {where}: {done.stdout} {done.stderr}"
