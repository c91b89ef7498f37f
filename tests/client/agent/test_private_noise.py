"""Is what leaves with noise the airlock's work alone, and is its noise as large as is charged for? All kinds of answer.

A site's answer before it is masked, made for any part of a small cohort, with no purse and with or without the airlock.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from client.agent.bench import Bench
from client.agent.desk import measure
from client.agent.keepsakes import Keepsakes
from client.agent.private import ROLES, SIDES, Private, Produced
from client.agent.purse import Purse
from client.imaging import Cohort, Membership
from models import bounds, tasks, weights
from privacy import mechanisms
from privacy.accounting import Role, events
from privacy.airlock import Airlock
from privacy.charge import Charge
from privacy.identity import Identity
from privacy.journal import Journal
from privacy.mechanisms import Mechanism
from privacy.messages import Header, Kind, Request
from tests import study_kit
from tests.client.agent.bed import SITE

CLIP, EXPECTED, LEARNING_RATE = 0.25, 7, 0.5
OTHERS = ("st-bona", "st-cleo")
PATHS = [(mode, kind) for mode in ("shared", "per-site") for kind in ("train", "test")]
every_path = pytest.mark.parametrize("site", PATHS, indirect=True, ids=[f"{mode} {kind}" for mode, kind in PATHS])


class Paid:
    """A purse from which everything is paid, for patients who are handed to it."""

    def __init__(self, eligible: dict[str, Role]) -> None:
        self._eligible = eligible

    def reserve(self, *_: object) -> None: ...

    def charge(self, study: Any, slot: int, kind: str, round_: int, request: str) -> Charge:
        return Charge(study.hash, slot, kind, round_, paid=slot, counter=slot, fresh=True)

    def eligible(self, study: str) -> dict[str, Role]:
        return self._eligible

    def answered(self, study: str, round_: int) -> bool:
        return False


class Spy:
    """In the airlock's place: remembers what it is given, and gives words that know nothing of it."""

    def __init__(self, largest: int = 0) -> None:
        self.given: list[np.ndarray] = []
        self.mechanisms: list[Mechanism] = []
        self._largest, self._chance = largest, np.random.default_rng(5)

    def noise(self, charge: Charge, mechanism: Mechanism, sums: np.ndarray) -> np.ndarray:
        self.given.append(sums.copy())
        self.mechanisms.append(mechanism)
        words = self._chance.integers(-self._largest, self._largest + 1, mechanism.numbers)
        return (words & 0xFFFFFFFF).astype(np.uint32)


class Site:
    """Six patients on each side with two images each, and a warm bench; `kind` is what is asked of it."""

    def __init__(self, folder: Path, mode: str, kind: Kind) -> None:
        self.mode, self.kind, self._folder, self._slots = mode, kind, folder, count(1)
        self.study = study_kit.study(
            "noisy",
            (SITE, *OTHERS),
            optimiser={"learning_rate": LEARNING_RATE, "batch_size": 8},
            rounds={"count": 4, "local_steps": 1 if mode == "shared" else 3},
            aggregation={"weights": "equal", "minimum_sites": 3},
            privacy={
                "mode": mode, "clip": str(CLIP), "noise_multiplier": "1.5", "sampling_rate": 1, "images_per_patient": 2,
                "expected_patients": EXPECTED, "patients_bound": 400, "site_patients_bound": 10, "delta": 0.001,
                "evaluation_noise": "0.7",
            },
            secagg={"mode": "on"},
        )  # fmt: skip
        spec = self.study.spec()
        initial = folder / "initial.safetensors"
        initial.write_bytes(weights.initial_state(spec, 1))
        sides = [side for side in Membership for _ in range(12)]
        cohort = Cohort(
            images=np.random.default_rng(1).normal(size=(36, 1, 8, 8)).astype(np.float32),
            targets=np.arange(36) // 2 % 2, patients=tuple(f"p{at // 2:02}" for at in range(36)),
            membership=tuple(sides), classes=("normal", "finding"), quarantine=(), scanners=Counter(),
            patient_rule="a test's",
        )  # fmt: skip
        self.patients = list(cohort.groups(SIDES[kind]))
        self.bench = Bench(self.study, cohort, "", initial, Keepsakes(folder / "0"), SITE)
        self.sizes, self._start = measure(self.study), weights.state_vector(initial.read_bytes())
        self._coordinator = Identity.generate()
        task = tasks.get(spec)
        self.caps = bounds.of(task).caps
        self.mechanism = (
            mechanisms.training(self.study, self.sizes.trainable)
            if kind == "train"
            else mechanisms.evaluation(self.study, task.size, bounds.of(task).reach)
        )

    def answer(self, airlock: Spy | Airlock, patients: Iterable[str]) -> Produced:
        """What the site would mask and keep, if only these patients were eligible."""
        slot = next(self._slots)
        self.bench.kept = Keepsakes(self._folder / str(slot))
        header = Header(
            kind=self.kind, study=self.study.hash, session=1, slot=slot, round=1, cohort=(SITE, *OTHERS),
            payload_sha256="0" * 64, payload_bytes=0, deadline_seconds=600,
        )  # fmt: skip
        request = Request.decode(header.signed(self._coordinator).encode(), self._coordinator.public)
        eligible = dict.fromkeys(patients, ROLES[SIDES[self.kind]])
        private = Private(cast(Airlock, airlock), cast(Purse, Paid(eligible)))
        vector = np.concatenate([self._start, np.zeros(self.sizes.statistics, np.float32)])
        return private.produce(request, self.study, self.bench, vector, self.sizes, lambda: None)

    def noise(self, made: Produced) -> np.ndarray:
        """What a number of an answer says of the noise on it, over Δ; of an answer of nobody it is noise alone."""
        numbers = np.empty(0)
        if made.words is not None:
            words = np.delete(made.words, np.s_[self.sizes.trainable :]) if self.kind == "train" else made.words[3:]
            numbers = self.mechanism.read(words)
        elif made.vector is not None and self.kind == "train":
            steps = self.study.rounds.local_steps
            numbers = made.vector[: self.sizes.trainable] * EXPECTED / LEARNING_RATE / math.sqrt(steps)
        elif made.vector is not None:
            numbers = made.vector[3:] / self.caps
        return np.asarray(numbers, np.float64) / float(self.mechanism.sensitivity)


@pytest.fixture
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Site:
    return Site(tmp_path, *request.param)


def leaves(made: Produced) -> bytes:
    found = made.words if made.words is not None else made.vector
    assert found is not None
    return found.tobytes()


@every_path
def test_N2_one_patient_more_changes_what_the_airlock_is_given_by_at_most_C(site: Site) -> None:
    before, after = Spy(), Spy()
    site.answer(before, site.patients[:-1])
    site.answer(after, site.patients)
    assert set(before.mechanisms + after.mechanisms) == {site.mechanism}
    changes = [float(np.linalg.norm(other - one)) for one, other in zip(before.given, after.given, strict=True)]
    assert len(changes) == (site.study.rounds.local_steps if site.kind == "train" else 1)
    assert max(changes) <= float(site.mechanism.clip)
    if site.kind == "train":
        assert max(changes) <= CLIP
        assert min(changes) > 0.99 * CLIP, "who comes is clipped, so that another bound would show"
    else:
        assert min(changes) > 1.0


@every_path
def test_N2_what_leaves_follows_from_what_the_airlock_gave_whoever_is_there(site: Site) -> None:
    spies = [Spy(1 << 20) for _ in range(3)]
    left = [leaves(site.answer(spy, site.patients[:have])) for spy, have in zip(spies, (0, 1, 6), strict=True)]
    assert [bool(spy.given[0].any()) for spy in spies] == [False, True, True]
    assert left[0] == left[1] == left[2]
    assert leaves(site.answer(Spy(1 << 10), site.patients)) != left[0]


@every_path
def test_N2_the_noise_that_leaves_is_as_large_as_is_charged_for(site: Site, tmp_path: Path) -> None:
    """A release of nobody's images is the noise alone: its mean square, within six deviations of its estimate."""
    airlock, found = Airlock(Journal(tmp_path / "journal"), tmp_path / "vectors"), np.empty(0)
    while len(found) < 4000:
        found = np.concatenate([found, site.noise(site.answer(airlock, []))])
    charged = float(events(site.study, 2)[ROLES[SIDES[site.kind]]].noise_multiplier)
    assert np.mean((found / charged) ** 2) == pytest.approx(1, abs=6 * math.sqrt(2 / len(found)))
    assert abs(found.mean()) < 6 * charged / math.sqrt(len(found))
