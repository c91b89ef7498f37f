"""How do many hospitals live in one process? `python -m client.simulation FOLDER`, for the coordinator's `simulate`.

Every hospital is the agent that a real one runs, with its keys, its slots, its journal and its airlock; only sockets
and the operator's yes are left out. One request is served after the other, in the order in which they came, so that a
study with a seed gives the same bits in every run, and the same as its real deployment.

A request is a line of JSON on standard input: {"op": …}. Its answer is a line of JSON on standard output, with "bytes"
raw bytes behind it. An error is {"error": {"what", "subject", "remedy"}}. The process ends with its input.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import queue
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np

from client import dealing, enrolment
from client.agent.core import FETCH_LIMIT, Agent
from client.agent.desk import Desk
from client.agent.inspection import require_training_images
from client.agent.rows import SourceRow, State
from client.home import SiteConfig, SiteHome
from client.imaging import Cohort, Membership, Source
from privacy.airlock import released_bytes
from privacy.errors import ConsiliumError
from privacy.grants import Allowance, Claims, Grant
from privacy.identity import Identity
from privacy.messages import Answer
from privacy.roster import expiry
from privacy.study import Study

IMAGES = "images"
LIFETIME = "100000"
"""ε of a simulated patient's lifetime: a simulation asks what a study would cost, and spends nobody's budget."""
SOURCE = {"kind": "npz", "path": "/"}
"""The declaration of the hospital that holds everything: never read, because its desk joins the others' cohorts."""


class Everything(Desk):
    """The desk of one hospital that holds what all the others hold, each image on the side where it is with them."""

    def __init__(self, others: Sequence[Agent], home: SiteHome, **options: Any) -> None:
        self._others = others
        super().__init__(home, **options)

    def cohort(self, study: Study, source: SourceRow, progress: Callable[[int, int], None] | None = None) -> Cohort:
        """The cohorts of all, one after the other."""
        return join([other.desk.cohort(study, other.store.sources()[0], progress) for other in self._others])


def join(cohorts: Sequence[Cohort]) -> Cohort:
    """One cohort of several. Nobody is in two of them: pseudonyms are made with each hospital's own key."""
    parts: dict[str, Any] = {}
    for field in dataclasses.fields(Cohort):
        values = [getattr(cohort, field.name) for cohort in cohorts]
        if any(value is None for value in values):
            parts[field.name] = None
        elif isinstance(values[0], np.ndarray):
            parts[field.name] = np.concatenate(values)
        elif isinstance(values[0], Counter):
            parts[field.name] = sum(values, Counter())
        elif isinstance(values[0], tuple) and field.name != "classes":
            parts[field.name] = tuple(item for value in values for item in value)
        else:
            parts[field.name] = values[0]
    return Cohort(**parts)


class Hospitals:
    """All hospitals of a simulation below one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shares: dict[str, dealing.Share] = {}
        self._agents: dict[str, Agent] = {}
        self._officer, self._serial = Identity.generate(), 0

    def close(self) -> None:
        """Let every home go."""
        for agent in self._agents.values():
            agent.close()

    def serve(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        """One request: its answer, and the bytes behind it."""
        operations: dict[str, Callable[..., tuple[dict[str, Any], bytes]]] = {
            "deal": self._deal,
            "enrol": self._enrol,
            "approve": self._approve,
            "ask": self._ask,
            "measure": self._measure,
        }
        values = dict(request)
        return operations[values.pop("op")](**values)

    def _deal(self, data: str, sites: list[str], seed: int) -> tuple[dict[str, Any], bytes]:
        """Hand out the images; says who has how many, and what the set leaves open."""
        dealt = dealing.deal(Path(data), self._folder / IMAGES, sites, seed)
        self._shares = {share.name: share for share in dealt.shares}
        counts = {share.name: [share.images, share.patients] for share in dealt.shares}
        return {"name": dealt.name, "classes": dealt.classes, "sites": counts, "note": dealt.note}, b""

    def _enrol(self, consortium: str, pooled: str, seed: int, threads: int) -> tuple[dict[str, Any], bytes]:
        """Make every site and, under the name `pooled`, one that holds everything; returns their enrolments."""
        documents = {}
        for name in (*self._shares, *([pooled] if pooled else [])):
            home = SiteHome(self._folder / "sites" / name)
            home.agent.mkdir(parents=True, mode=0o700)
            key = hashlib.sha256(f"consilium/v1/simulation\0{seed}\0{name}".encode()).digest()
            enrolment.pseudonym_key(home).write_bytes(key)  # the split of a simulation repeats itself
            enrolment.create(home, name, Path(consortium))
            home.write_config(SiteConfig(site=name, superlink=home.config().superlink, threads=threads))
            documents[name] = enrolment.enrolment(home).encode().hex()
            if name in self._shares:
                agent = Agent(home)
                source: Source = self._shares[name].source
                agent.store.put_source(IMAGES, source.model_dump_json(exclude_defaults=True))
            else:
                others = list(self._agents.values())
                agent = Agent(home, desk=lambda home, others=others, **more: Everything(others, home, **more))
                one = any(share.source.one_image_per_patient for share in self._shares.values())
                agent.store.put_source(IMAGES, json.dumps({**SOURCE, "one_image_per_patient": one}))
            self._agents[name] = agent
        return {"enrolments": documents}, b""

    def _approve(self, study: str, roster: str, sites: list[str]) -> tuple[dict[str, Any], bytes]:
        """The operators' yes to a signed study, once enough hospitals have images for it.

        As at a real hospital, images are read before the yes. What is wrong with a hospital's images is told here if
        too few are left without it; else the study goes on without that hospital, as it would in a consortium.
        """
        unfit: list[ConsiliumError] = []
        for name in sites:
            agent = self._agents[name]
            agent.import_document(bytes.fromhex(roster))
            _, digest = agent.import_document(bytes.fromhex(study))
            agent.decide(digest, State.APPROVED, IMAGES)
            known = agent.study(digest)
            if known is not None and known.privacy.mode != "none":
                self._grant(agent, known)
            try:
                if known is not None:
                    require_training_images(agent, known, IMAGES)
            except ConsiliumError as error:
                unfit.append(ConsiliumError(error.what, f"{name}, {error.subject}", error.remedy))
            if known is not None and len(sites) - len(unfit) < known.aggregation.minimum_sites:
                raise unfit[0]
        return {}, b""

    def _grant(self, agent: Agent, study: Study) -> None:
        """A simulation's own officer allows whatever a study asks for, and a lifetime that holds a thousand of them."""
        claims, purse, self._serial = Claims.of(study), agent.purse, self._serial + 1
        if not purse.officer():
            purse.trust(self._officer.public)
            allowance = Allowance(
                site=agent.site.name, serial=self._serial, epsilon=LIFETIME, delta=study.privacy.delta, order=4
            )
            purse.take(allowance.signed(self._officer).encode())
        grant = Grant(
            site=agent.site.name, serial=self._serial, delta=study.privacy.delta, study=study.hash, slots=claims.slots,
            epsilon=f"{claims.epsilon:f}", cap=f"{claims.cap:f}", expires=expiry(datetime.now(UTC)),
        )  # fmt: skip
        purse.take(grant.signed(self._officer).encode())

    def _ask(
        self,
        id: str,
        site: str,
        document: str,
        payload: str,
        data: str,
    ) -> tuple[dict[str, Any], bytes]:
        """One message of the coordinator to one agent; the payload is a file, or hex in `data`."""
        agent = self._agents[site]
        released = released_bytes(
            agent.submit(bytes.fromhex(document), Path(payload) if payload else bytes.fromhex(data))
        )
        answer = Answer.verified(released, agent.site.identity)
        pieces = []
        for at in range(0, answer.payload_bytes, FETCH_LIMIT):
            length = min(FETCH_LIMIT, answer.payload_bytes - at)
            fetched = agent.fetch(answer.study, answer.session, answer.slot, answer.request, at, length)
            pieces.append(released_bytes(fetched))
        return {"id": id, "document": released.hex()}, b"".join(pieces)

    def _measure(self, study: str, model: str, sites: list[str], side: str) -> tuple[dict[str, Any], bytes]:
        """The sums of a model file over one side of some hospitals' images, by site.

        The hospitals need not take part in the study. It can be done here because one process stands in for all of
        them; in a real consortium nobody could.
        """
        from client import training
        from client.agent.bench import device
        from client.feed import place
        from models import networks, tasks, weights

        known = next(found for agent in self._agents.values() if (found := agent.study(study)) is not None)
        spec = known.spec()
        network, task = networks.build(spec), tasks.get(spec)
        weights.load_state(network, Path(model))
        network = place(network, device())
        sums = {}
        for name in sites:
            agent = self._agents[name]
            cohort = agent.desk.cohort(known, agent.store.sources()[0])
            sums[name] = training.evaluate(network, task, cohort, Membership(side)).tolist()
        return {"sums": sums}, b""


def main(arguments: Sequence[str]) -> int:
    """The process: FOLDER in, exit status out."""
    if len(arguments) != 1:
        print("usage: python -m client.simulation FOLDER", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's; its end is the end of our input
    answers: IO[bytes] = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not stand among the answers
    hospitals = Hospitals(Path(arguments[0]))
    with closing(hospitals), suppress(BrokenPipeError):  # the coordinator has gone
        for line in _read_ahead(sys.stdin.buffer):
            try:
                answer, data = hospitals.serve(json.loads(line))
            except ConsiliumError as error:
                answer, data = {"error": {"what": error.what, "subject": error.subject, "remedy": error.remedy}}, b""
            answers.write(json.dumps({**answer, "bytes": len(data)}).encode() + b"\n" + data)
            answers.flush()
    return 0


def _read_ahead(requests: IO[bytes]) -> Iterator[bytes]:
    """The lines of a stream, taken from it as they come: who sends many before reading an answer must not wait for us
    while we wait for room in the pipe of answers.
    """
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        for line in requests:
            lines.put(line)
        lines.put(b"")

    threading.Thread(target=read, name="requests", daemon=True).start()
    return iter(lines.get, b"")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
