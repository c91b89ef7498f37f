"""A coordinator's keys, a study and a site's home, small enough that a round takes a fraction of a second."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.agent.core import Agent
from client.agent.rows import State
from client.home import SiteConfig, SiteHome
from models import weights
from privacy.airlock import Released, released_bytes
from privacy.canonical import canonical, sha256
from privacy.identity import Document, Identity
from privacy.messages import Answer, Header
from privacy.roster import Consortium, Roster, RosterSite, expiry
from privacy.study import Study
from tests import study_kit
from tests.study_kit import Sections, merged

SITE = "st-anna"
ROOT = Path(__file__).resolve().parents[3]

torch.set_num_threads(1)


def node_key() -> str:
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return public.public_bytes(serialization.Encoding.PEM, form).decode()


@dataclass(repr=False)
class Bed:
    """One coordinator's keys, one study, one site's home: everything a test needs to speak to an agent."""

    home: SiteHome
    coordinator: Identity
    identity: Identity
    study: Study
    initial: bytes
    roster: Roster
    agent: Agent | None = None
    received: list[bytes] = field(default_factory=list)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints of it: not its megabytes."""
        printer.text("bed")

    @property
    def hash(self) -> str:
        return self.study.hash

    @property
    def signed_study(self) -> bytes:
        return self.study.document().signed_by(self.coordinator).encode()

    @property
    def vector(self) -> bytes:
        return weights.state_vector(self.initial).tobytes()

    def offer_payload(self, roster: Roster | None = None) -> bytes:
        def plain(document: Document) -> dict[str, Any]:
            signatures = [{"key": s.key, "value": s.value} for s in document.signatures]
            return {"kind": document.kind, "body": document.body, "signatures": signatures}

        study = self.study.document().signed_by(self.coordinator)
        return canonical({"study": plain(study), "roster": plain((roster or self.roster).signed(self.coordinator))})

    def request(
        self, kind: str, payload: bytes = b"", *, signer: Identity | None = None, slot: int = 0, session: int = 1,
        **changes: Any,
    ) -> bytes:  # fmt: skip
        values: dict[str, Any] = {
            "kind": kind, "study": self.hash, "session": session, "slot": slot, "round": 1,
            "cohort": (SITE, "st-bona"), "payload_sha256": sha256(payload), "payload_bytes": len(payload),
            "deadline_seconds": 600,
        }  # fmt: skip
        return Header(**{**values, **changes}).signed(signer or self.coordinator).encode()

    def read(self, data: bytes) -> Answer:
        return Answer.verified(data, self.identity.public)

    def take(self, released: Released) -> bytes:
        data = released_bytes(released)
        self.received.append(data)
        return data

    def call(self, kind: str, payload: bytes = b"", **changes: Any) -> Answer:
        """One signed request to the agent in this process."""
        assert self.agent is not None
        return self.read(self.take(self.agent.submit(self.request(kind, payload, **changes), payload)))

    def fetch(self, answer: Answer, offset: int = 0, length: int | None = None) -> bytes:
        assert self.agent is not None
        size = answer.payload_bytes if length is None else length
        return self.take(self.agent.fetch(answer.study, answer.session, answer.slot, answer.request, offset, size))

    def start(self) -> Agent:
        self.agent = Agent(self.home)
        return self.agent

    def stop(self) -> None:
        if self.agent is not None:
            self.agent.close()
            self.agent = None

    def connect_data(self) -> None:
        assert self.agent is not None
        source = f'{{"kind":"npz","path":"{self.home.root / "images.npz"}","one_image_per_patient":true}}'
        self.agent.store.put_source("archive", source)

    def approve(self) -> None:
        """Offer the study, connect the images, approve."""
        assert self.agent is not None
        assert self.call("offer", self.offer_payload(), session=0).status == "done"
        self.connect_data()
        self.agent.decide(self.hash, State.APPROVED, "archive")

    def ready(self) -> None:
        """All the way to an open session with the initial weights held."""
        self.approve()
        assert self.call("open", self.initial).detail == {"initial": "held"}

    def parcel(self, **entries: bytes) -> bytes:
        buffer = io.BytesIO()
        named = {"model.safetensors": self.initial, **{name.replace("__", "."): data for name, data in entries.items()}}
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, data in named.items():
                archive.writestr(name, data)
        return buffer.getvalue()


def with_sides(arrays: dict[str, Any]) -> dict[str, Any]:
    """Arrays that bring their own split, six tenths to train, so that no key decides which classes a side has."""
    count = len(arrays["images"])
    first, second = 6 * count // 10, 8 * count // 10
    bounds = {"train": (0, first), "val": (first, second), "test": (second, count)}
    return {f"{side}_{name}": data[slice(*span)] for name, data in arrays.items() for side, span in bounds.items()}


def make_bed(
    folder: Path,
    steps: int = 3,
    images: int = 40,
    others: Mapping[str, Identity] | None = None,
    **sections: Mapping[str, Any],
) -> Bed:
    """A site's home; `others` are the rest of the roster, by default one that nobody plays."""
    others = others or {"st-bona": Identity.generate()}
    coordinator, identity = Identity.generate(), None
    home = SiteHome(folder)
    home.agent.mkdir(parents=True)
    home.write_config(SiteConfig(site=SITE, superlink="fl.example.org:8443", threads=1))
    consortium = Consortium(name="trio", coordinator=coordinator.public, superlink="fl.example.org:8443", ca="none")
    consortium.signed(coordinator).write(home.consortium_file)
    identity = Identity.create(home.identity_key)
    tiny: Sections = {
        "optimiser": {"learning_rate": 0.05, "batch_size": 8},
        "rounds": {"count": 4, "local_steps": steps, "reserve": 2},
    }
    draft = study_kit.study("tiny", (SITE, *others), **merged(tiny, sections))
    initial = weights.initial_state(draft.spec(), 1)
    study = draft.model_copy(update={"initial": draft.initial.model_copy(update={"sha256": sha256(initial)})})
    not_after = expiry(datetime.now(UTC))
    sites = tuple(
        RosterSite(name=name, identity=known.public, node_key=node_key(), not_after=not_after)
        for name, known in {SITE: identity, **others}.items()
    )
    roster = Roster(consortium="trio", version=3, coordinator=coordinator.public, sites=sites)
    generator = np.random.default_rng(7)
    labels = np.arange(images) % 2
    pixels = generator.normal(size=(images, 8, 8)) + labels[:, None, None]
    np.savez(folder / "images.npz", **with_sides({"images": pixels.astype(np.float32), "labels": labels}))
    return Bed(home, coordinator, identity, study, initial, roster)


class Process:
    """`python -m client.agent` as a hospital runs it."""

    def __init__(self, bed: Bed, *prefix: str) -> None:
        self.bed, self.log = bed, bed.home.root / "agent.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.log, "ab") as log:
            start = log.tell()
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "client.agent", str(bed.home.root)],
                cwd=ROOT, env=environment, stderr=log, stdout=log,
            )  # fmt: skip
        self._start = start
        wait_for(lambda: b"ready:" in self.log.read_bytes()[start:] or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Poll until it is so; a generous bound that only a hang reaches."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.02)
