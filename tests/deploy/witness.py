"""What did each hospital compute? Its own side of a masked slot, kept while a study runs, and what that adds up to.

A slot's stored vector lies in the agent's folder until the next slot; the session's secrets lie in its records until
the session ends. Whoever has both, as only the hospital does, can take its masks off again.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from client.home import SiteHome
from privacy.secagg import site as protocol
from privacy.secagg.fixed import Opened
from privacy.secagg.states import Ready
from server.records import StudyRecord
from tests.deploy.lab import Lab

PAUSE = 0.02


class Witness:
    """Watches the agents' folders from the side for as long as the block."""

    def __init__(self, lab: Lab, record: StudyRecord) -> None:
        self._lab, self._record = lab, record
        self._folder = lab.federation.root / f"witness-{record.name}"
        self._folder.mkdir()
        self._rings: dict[tuple[str, int], bytes] = {}
        self._slots: dict[tuple[str, int], tuple[int, str, tuple[str, ...]]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(10)

    def words(self, site: str, slot: int) -> np.ndarray:
        """What a site would have sent without masks: uint32 [d + m] or [m]."""
        session, request, cohort = self._slots[site, slot]
        masked = np.fromfile(self._folder / site / f"{self._record.hash}-{slot:06d}.f32", "<u4")
        masks = np.zeros_like(masked)
        protocol.mask(self._ready(site, session), slot, request, cohort, masks)
        return masked - masks

    def model(self, slot: int, sites: Iterable[str], start: np.ndarray) -> np.ndarray:
        """The model after a training slot over these sites, from the model before it: float32 [d]."""
        names = sorted(sites)
        plan = self._ready(names[0], self._slots[names[0], slot][0]).place.plan
        total = np.zeros(plan.size + plan.statistics, np.uint32)
        for name in names:
            total += self.words(name, slot)
        return (start + Opened(plan, total, len(names)).mean(0, plan.size)).astype(np.float32)

    def _ready(self, site: str, session: int) -> Ready:
        return Ready.from_bytes(self._rings[site, session])

    def _watch(self) -> None:
        while not self._stop.wait(PAUSE):
            for site in self._lab.federation.sites:
                with suppress(OSError, sqlite3.Error):
                    self._look(site, SiteHome(self._lab.federation.site_home(site)).agent)

    def _look(self, site: str, home: Path) -> None:
        target = self._folder / site
        target.mkdir(exist_ok=True)
        for path in (home / "answers").glob(f"{self._record.hash}-*.f32"):
            with suppress(FileExistsError, FileNotFoundError):
                os.link(path, target / path.name)
        with closing(sqlite3.connect(f"file:{home}/agent.db?mode=ro", uri=True, timeout=1)) as db:
            for session, state in db.execute("SELECT session, state FROM rings WHERE study = ?", (self._record.hash,)):
                if b'"state": "ready"' in bytes(state):
                    self._rings[site, session] = bytes(state)
            query = "SELECT slot, session, request, cohort FROM slots WHERE study = ?"
            for slot, session, request, cohort in db.execute(query, (self._record.hash,)):
                self._slots[site, slot] = (session, request, tuple(cohort.split()))
