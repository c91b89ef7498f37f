"""A ring of sites in memory: what every test of the secure sum starts from. Keys, messages and states are real."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from privacy.canonical import sha256
from privacy.errors import Refusal
from privacy.identity import Document, Identity
from privacy.messages import Answer
from privacy.secagg import site
from privacy.secagg.coordinator import SecureSum
from privacy.secagg.fixed import Opened, encode
from privacy.secagg.messages import Choice
from privacy.secagg.plan import Plan
from privacy.secagg.ring import Ring, accept_keys, accept_shares, place_of
from privacy.secagg.states import Keyed, Place, Ready, Shared
from privacy.study import Study
from privacy.study_text import template

HEADER = "ab" * 32
OTHER = "cd" * 32


def names(count: int) -> list[str]:
    return [f"site-{index:02}" for index in range(count)]


def study(sites: int = 4, minimum: int | None = None, weights: str = "examples", **entries: object) -> Study:
    """A study with secure aggregation switched on; n_min is the smallest that may stand."""
    body = Study.from_toml(template("chest", names(sites))).body()
    colluding = int(str(entries.get("colluding", 1)))
    threshold = int(str(entries.get("threshold", 0))) or (sites + colluding) // 2 + 1
    body["aggregation"]["minimum_sites"] = minimum or max(threshold, colluding + 2)
    body["aggregation"]["weights"] = weights
    body["secagg"] = {"mode": "on", **entries}
    return Study.model_validate(body)


def plan(sites: int = 4, size: int = 20, statistics: int = 3, **entries: object) -> Plan:
    return Plan.of(study(sites, **entries), size, statistics)  # type: ignore[arg-type]


@dataclass
class Hospital:
    """One site: its identity, its newest state, and its store of choices."""

    name: str
    identity: Identity
    keyed: Keyed | None = None
    shared: Shared | None = None
    state: Ready | None = None
    choices: dict[int, Choice] = field(default_factory=dict)

    @property
    def ready(self) -> Ready:
        assert self.state is not None
        return self.state

    def restart(self) -> None:
        """What is left after kill -9: only the bytes."""
        self.state = Ready.from_bytes(self.ready.to_bytes())
        self.choices = {slot: Choice.from_body(choice.body()) for slot, choice in self.choices.items()}

    def answer(self, slot: int, header: str, vector: np.ndarray, session: int = 1, **changes: object) -> Document:
        """The signed answer that goes with a vector."""
        values = {
            "study": self.ready.place.plan.study,
            "session": session,
            "slot": slot,
            "site": self.name,
            "request": header,
            "status": "done",
            "payload_sha256": sha256(vector.data.cast("B")),
            "payload_bytes": vector.nbytes,
            "statistics": self.ready.place.plan.statistics,
        }
        return Answer(**{**values, **changes}).signed(self.identity)  # type: ignore[arg-type]

    def mask(self, slot: int, header: str, cohort: Iterable[str], vector: np.ndarray) -> tuple[Document, np.ndarray]:
        """A masked copy and its answer."""
        masked = vector.copy()
        site.mask(self.ready, slot, header, tuple(cohort), masked)
        return self.answer(slot, header, masked), masked

    def survive(self, slot: int, header: str, cohort: Iterable[str], survivors: Iterable[str]) -> Document:
        choice, document = site.survive(
            self.ready, slot, header, tuple(cohort), tuple(survivors), self.choices, self.identity
        )
        self.choices[slot] = choice
        return document

    def open(
        self, slot: int, header: str, cohort: Iterable[str], survivors: Iterable[str], proof: Mapping[str, Document]
    ) -> Document:
        choice, document = site.open_(
            self.ready, slot, header, tuple(cohort), tuple(survivors), proof, self.choices, self.identity
        )
        self.choices[slot] = choice
        return document


class World:
    """All sites of one study after the set-up of session 1, slots 1..`slots`."""

    def __init__(self, plan: Plan, slots: int = 3, absent: Iterable[str] = (), silent: Iterable[str] = ()) -> None:
        """`absent` bring no keys; `silent` bring keys and deal no shares."""
        self.plan, self.slots = plan, slots
        self.hospitals = {name: Hospital(name, Identity.generate()) for name in plan.sites}
        self.roster = {name: hospital.identity.public for name, hospital in self.hospitals.items()}
        self.place: Place = place_of(plan, 1, 1, slots, self.roster)
        self.keys = self.exchange_keys(absent)
        self.shares, self.parcels = self.deal(silent)
        self.ring: Ring = accept_shares(self.place, self.keys, self.shares, self.parcels)[0]
        for name in self.ring.sites:
            hospital = self.hospitals[name]
            assert hospital.shared is not None
            hospital.state = site.receive(hospital.shared, self.ring.shares, self.ring.bundles(name))

    def exchange_keys(self, absent: Iterable[str]) -> dict[str, Document]:
        documents = {}
        for name, hospital in self.hospitals.items():
            hospital.keyed, documents[name] = site.begin(
                self.plan, 1, 1, self.slots, name, hospital.identity, self.roster
            )
        return accept_keys(self.place, {k: v for k, v in documents.items() if k not in set(absent)})[0]

    def deal(self, silent: Iterable[str]) -> tuple[dict[str, Document], dict[str, dict[str, bytes]]]:
        shares, parcels = {}, {}
        for name in self.keys:
            hospital = self.hospitals[name]
            assert hospital.keyed is not None
            hospital.shared, document, sent = site.share(hospital.keyed, self.keys, hospital.identity)
            if name not in set(silent):
                shares[name], parcels[name] = document, sent
        return shares, parcels

    def __getitem__(self, name: str) -> Hospital:
        return self.hospitals[name]

    def vectors(self, seed: int = 0, update: bool = True) -> dict[str, np.ndarray]:
        """An encoded vector for each site of the ring."""
        generator = np.random.default_rng(seed)
        return {
            name: encode(
                self.plan,
                generator.normal(size=self.plan.size).astype(np.float32) * 0.1 if update else None,
                np.array([100 + index, *generator.normal(size=self.plan.statistics - 1)], np.float32),
            )
            for index, name in enumerate(self.ring.sites)
        }

    def masked(
        self,
        slot: int = 1,
        header: str = HEADER,
        cohort: Iterable[str] | None = None,
        lost: Iterable[str] = (),
        vectors: Mapping[str, np.ndarray] | None = None,
    ) -> SecureSum:
        """A slot up to the point where the sum is closed; `lost` never answer."""
        group = tuple(cohort or self.ring.sites)
        vectors = vectors or self.vectors()
        total = SecureSum(self.ring, slot, header, group, len(next(iter(vectors.values()))))
        for name in group:
            if name not in set(lost):
                document, masked = self[name].mask(slot, header, group, vectors[name])
                total.add(name, document, masked)
        return total

    def opened(self, total: SecureSum, gone: Iterable[str] = ()) -> Opened:
        """The rest of a slot; `gone` never open."""
        survivors = total.close()
        proof: Mapping[str, Document] = total.submissions
        if not total.complete:
            signed = {name: self[name].survive(total.slot, total.header, total.cohort, survivors) for name in survivors}
            proof, _ = total.accept_survivors(signed)
        openings = {
            name: self[name].open(total.slot, total.header, total.cohort, survivors, proof)
            for name in survivors
            if name not in set(gone)
        }
        return total.open(openings, {} if total.complete else proof)[0]


def refused(call: Callable[[], object]) -> str:
    """The code of the refusal that a call must end in."""
    try:
        call()
    except Refusal as refusal:
        return refusal.code.value
    raise AssertionError("nothing was refused")


def summed(vectors: Mapping[str, np.ndarray], sites: Iterable[str]) -> np.ndarray:
    """What must come out, modulo 2^32."""
    return np.sum([vectors[name] for name in sites], axis=0, dtype=np.uint32)
