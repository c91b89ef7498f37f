"""A small federation of real processes for the fault tests, and questions about what it did, on both sides."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from client.agent_client import Local
from client.home import SiteHome
from deploy.federation import Federation
from privacy.study import Study
from server.commands.signing import sign_study
from server.home import CoordinatorHome
from server.records import Delivery, Outcome, OutcomeState, SlotRecord, SlotState, State, StudyRecord
from server.registry import Registry
from tests import study_kit
from tests.client.agent.bed import with_sides
from tests.study_kit import Sections, merged

SITES = ("north", "south", "west")
LIVENESS = 180.0
HOSPITAL_RETURNS = 75.0


def draft(name: str, *, sites: Sequence[str] = SITES, extra: Sections | None = None, **changes: int) -> str:
    """A study in TOML: rounds of a fraction of a second unless `steps` and `batch` say otherwise; `extra` sections."""
    values = {"rounds": 3, "steps": 1, "batch": 4, "deadline": 150, "minimum": 2, "reserve": 5, **changes}
    rounds = {
        "count": values["rounds"], "local_steps": values["steps"], "deadline_seconds": values["deadline"],
        "reserve": values["reserve"],
    }  # fmt: skip
    usual: Sections = {
        "input": {"size": [28, 28]},
        "optimiser": {"learning_rate": 0.01, "batch_size": values["batch"]},
        "rounds": rounds,
        "aggregation": {"minimum_sites": values["minimum"]},
    }
    return study_kit.draft(name, sites, **merged(usual, extra or {}))


def images(path: Path, seed: int, count: int = 40) -> Path:
    """Grey squares, brighter ones with the finding."""
    dice = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    pixels = dice.integers(0, 120, (count, 28, 28)) + 100 * labels[:, None, None]
    np.savez(path, **with_sides({"images": pixels.astype(np.uint8), "labels": labels}))
    return path


@dataclass
class Lab:
    """A federation that is up, its registry, and its studies."""

    federation: Federation
    registry: Registry = field(init=False)

    def __post_init__(self) -> None:
        self.home = CoordinatorHome(self.federation.coordinator_home)
        self.registry = Registry(self.home)

    # ---- studies ---------------------------------------------------------------------------------------------

    def sign(self, name: str, **changes: object) -> StudyRecord:
        """Sign a study."""
        return sign_study(self.registry, self.home.identity(), Study.from_toml(draft(name, **changes)), None)

    def launch(self, name: str, **changes: object) -> StudyRecord:
        """Sign and launch a study, and let every site approve it."""
        record = self.sign(name, **changes)
        self.registry.launch(name)
        self.approve(record)
        return record

    def approve(self, record: StudyRecord, *sites: str) -> None:
        """Every site (or these) says yes, as soon as the study has reached it."""
        for site in sites or record.study.sites:
            self.until(lambda site=site: self.asked(record, site), f"{record.name} to reach {site}")
            with Local(SiteHome(self.federation.site_home(site)).local_socket) as door:
                door.decide(record.hash, "approve", "archive")

    def asked(self, record: StudyRecord, site: str) -> bool:
        """Whether the site's agent knows the study."""
        return bool(self.agent(site, "SELECT 1 FROM studies WHERE hash = ?", record.hash))

    def now(self, record: StudyRecord) -> StudyRecord:
        """The study as it stands."""
        return self.registry.study(record.hash)

    def reaches(self, record: StudyRecord, *states: State, seconds: float = LIVENESS) -> StudyRecord:
        """Wait for a state; another one that a study stays in is a failure."""
        resting = {State.PAUSED, State.STOPPED, State.INTERRUPTED, State.FINISHED, State.FAILED} - set(states)
        self.until(
            lambda: self.now(record).state in {*states, *resting}, f"{record.name} to be {', '.join(states)}", seconds
        )
        found = self.now(record)
        assert found.state in states, f"{found.state}: {found.reason}\n{self.story(record)}\n{self.federation.logs()}"
        return found

    def finishes(self, record: StudyRecord) -> None:
        """Wait until the study is finished, and its model is with every site that approves it."""
        self.reaches(record, State.FINISHED)

    def delivered(self, record: StudyRecord) -> dict[str, Delivery]:
        """Who has the model, by site."""
        return {line.site: line for line in self.registry.course(record.hash).deliveries()}

    def story(self, record: StudyRecord) -> str:
        """Everything that happened, for a failure's message."""
        return "\n".join(f"{event.at} {event.text}" for event in self.registry.events(record.hash))

    # ---- rounds ----------------------------------------------------------------------------------------------

    def slots(self, record: StudyRecord) -> list[SlotRecord]:
        """All slots of a study."""
        return self.registry.course(record.hash).slots()

    def open_slot(self, record: StudyRecord) -> SlotRecord | None:
        """The training slot that is open now."""
        slots = self.slots(record)
        return slots[-1] if slots and (slots[-1].state, slots[-1].kind) == (SlotState.OPEN, "train") else None

    def outcomes(self, record: StudyRecord, slot: int) -> dict[str, Outcome]:
        """What became of each site of a slot."""
        return {o.site: o for o in self.registry.course(record.hash).outcomes(slot)}

    def mid_round(self, record: StudyRecord, held: str = "", after: int = 0) -> SlotRecord:
        """Wait for an open training slot of a round above `after` in which answers are awaited.

        Args:
            held: a site that must be the only one awaited.
        """
        found: list[SlotRecord] = []

        def there() -> bool:
            slot = self.open_slot(record)
            if slot is None or slot.round <= after:
                return False
            states = {site: o.state for site, o in self.outcomes(record, slot.slot).items()}
            waiting = {site for site, state in states.items() if state is OutcomeState.WAITING}
            if not (waiting == {held} if held else waiting):
                return False
            found.append(slot)
            return True

        self.until(there, f"the middle of a round of {record.name}")
        return found[-1]

    def computing(self, record: StudyRecord, site: str) -> int:
        """Wait until a site's agent computes for a slot, and return which."""
        query = "SELECT slot FROM slots WHERE study = ? AND state = 'bound' AND kind = 'train'"
        self.until(lambda: bool(self.agent(site, query, record.hash)), f"{site} to compute")
        return int(self.agent(site, query, record.hash)[0][0])

    # ---- sites -----------------------------------------------------------------------------------------------

    def agent(self, site: str, query: str, *values: object) -> list[tuple[object, ...]]:
        """What a site's agent remembers."""
        path = SiteHome(self.federation.site_home(site)).agent / "agent.db"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as db:
            return db.execute(query, values).fetchall()

    def left(self, site: str, record: StudyRecord, slot: int) -> dict[str, Counter[str]]:
        """What left a site for a slot, by its journal: kind of bytes -> SHA-256 -> how often."""
        found: dict[str, Counter[str]] = {}
        path = SiteHome(self.federation.site_home(site)).agent / "journal.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if (entry["study"], entry["slot"]) == (record.hash, slot) and entry["what"] != "refusal":
                found.setdefault(entry["what"], Counter())[entry["sha256"]] += 1
        return found

    @contextmanager
    def held(self, site: str) -> Iterator[None]:
        """Stop a site's agent in its tracks (SIGSTOP) for as long as the block."""
        agent = self.federation.process(site, "agent")
        assert agent is not None
        agent.suspend()
        try:
            yield
        finally:
            if agent.is_running():
                agent.resume()

    def status(self, site: str) -> str:
        """What `consilium-site status` prints, on one line."""
        return flat(self.federation.site(site, "status"))

    def connected(self, site: str) -> bool:
        """Whether the site's connector says that it is connected."""
        path = SiteHome(self.federation.site_home(site)).connector / "state.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))["phase"] == "connected"
        except (OSError, ValueError):
            return False

    # ---- the coordinator -------------------------------------------------------------------------------------

    def shown(self, record: StudyRecord) -> str:
        """What `consilium-coordinator study status NAME --rounds` prints, on one line."""
        return flat(self.federation.coordinator("study", "status", record.name, "--rounds"))

    def resume(self, record: StudyRecord) -> None:
        """What a person types."""
        self.federation.coordinator("study", "resume", record.name)

    def until(self, condition: Callable[[], bool], what: str, seconds: float = LIVENESS) -> None:
        """Wait for something that must happen."""
        self.federation.until(condition, what, seconds)

    def close(self) -> None:
        """End everything."""
        self.registry.close()
        self.federation.stop()


def flat(done: subprocess.CompletedProcess[str]) -> str:
    """A command's output without the line breaks that the width of a terminal asks for."""
    return " ".join(done.stdout.split())


@contextmanager
def running_lab(root: Path, sites: Sequence[str] = SITES) -> Iterator[Lab]:
    """A federation that is up, with images connected at every site."""
    federation = Federation(root, sites, env={"OMP_NUM_THREADS": "1", "COLUMNS": "400"})
    with federation:
        federation.create("alps")
        federation.serve()
        federation.start()
        for number, site in enumerate(sites):
            connect_images(federation, site, number)
        lab = Lab(federation)
        try:
            yield lab
        finally:
            lab.close()


def connect_images(federation: Federation, site: str, seed: int) -> None:
    """Give a site its images."""
    file = images(federation.root / f"{site}.npz", seed)
    federation.site(site, "data", "connect", "archive", str(file), "--one-image-per-patient")
