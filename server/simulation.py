"""How is a consortium run on one machine without a network? The real round loop, over a pipe to one child process.

The child (`client.simulation`) holds an agent for every hospital. Between it and the loop there is no carrier at all:
`Hospitals` is a `Link` whose messages are answered in the order in which they were sent. Time stands still while a
hospital works, so no deadline can make two runs differ; it moves only when the loop waits for its own sake.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from models import tasks
from privacy.errors import ConsiliumError
from privacy.identity import Document, Identity
from privacy.roster import Consortium, Enrolment, Roster, RosterSite
from privacy.study import Study
from server import tls
from server.arms import DEAL_SEED
from server.flower import Outgoing, Reply
from server.home import CoordinatorConfig, CoordinatorHome
from server.outputs import MODEL, export, publisher
from server.records import Evaluation, State, StudyRecord
from server.registry import Registry
from server.rounds import Loop

POOLED = "all-together"
"""The hospital that holds everything, for a pooled baseline."""
Sums = npt.NDArray[np.float64]
Heard = Callable[[str], None]


class StillClock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self._time = 0.0

    def now(self) -> float:
        """Seconds slept so far."""
        return self._time

    def sleep(self, seconds: float) -> None:
        """Let time pass, at once."""
        self._time += seconds


class Hospitals:
    """The child process and, as `server.desk.Link`, the way to its agents. From one thread."""

    def __init__(self, folder: Path) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "client.simulation", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._numbers = itertools.count(1)
        self._waiting: list[tuple[str, int, str]] = []
        self._dropped: set[str] = set()
        self._nodes: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self.heard: Heard = lambda site: None

    def close(self) -> None:
        """End the child: its input ends."""
        assert self._child.stdin is not None
        with self._child:
            self._child.stdin.close()

    def know(self, enrolments: Mapping[str, Enrolment]) -> None:
        """These are the sites, by name."""
        self._names = dict(enumerate(enrolments, 1))
        self._nodes = {enrolments[name].node_key: number for number, name in self._names.items()}

    def call(self, op: str, **values: Any) -> dict[str, Any]:
        """Ask the child itself, not an agent.

        Raises:
            ConsiliumError: as the child says, or it is gone.
        """
        self._write({"op": op, **values})
        return self._read()[0]

    # ---- the carrier -----------------------------------------------------------------------------------------

    def nodes(self) -> dict[str, int]:
        """Every site is connected."""
        return dict(self._nodes)

    def send(self, requests: Iterable[Outgoing], ttl: float) -> dict[str, int]:
        """Hand requests to the child, which serves them one after the other."""
        sent = {}
        for request in requests:
            name, data = f"m{next(self._numbers)}", request.payload
            path, hex_ = (str(data), "") if isinstance(data, Path) else ("", (data or b"").hex())
            site, document = self._names[request.node_id], request.document.hex()
            self._write({"op": "ask", "id": name, "site": site, "document": document, "payload": path, "data": hex_})
            self._waiting.append((name, request.node_id, request.kind))
            sent[name] = request.node_id
        return sent

    def poll(self, message_ids: Collection[str], wait: float = 1.0) -> Iterator[Reply]:
        """The next answer, as soon as it is there."""
        while self._waiting:
            name, node, kind = self._waiting.pop(0)
            answer, data = self._read()
            if name in self._dropped:
                self._dropped.discard(name)
                continue
            if kind in {"train", "validate", "test"}:
                self.heard(self._names[node])
            yield Reply(name, node, bytes.fromhex(answer["document"]), len(data), "", partial(iter, [data]))
            return

    def drop(self, message_ids: Collection[str]) -> None:
        """Whoever still works on these does so in vain."""
        self._dropped |= set(message_ids) & {name for name, _, _ in self._waiting}

    def _write(self, request: dict[str, Any]) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise self._gone() from error

    def _read(self) -> tuple[dict[str, Any], bytes]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._gone()
        answer = json.loads(line)
        data = self._child.stdout.read(answer.pop("bytes"))
        if "error" in answer:
            raise ConsiliumError(**answer["error"])
        return answer, data

    def _gone(self) -> ConsiliumError:
        return ConsiliumError(
            "The simulated hospitals ended before their work was done",
            f"exit status {self._child.poll()}",
            "What they wrote above says why; too little memory is the usual reason: simulate fewer sites.",
        )


@dataclass(frozen=True)
class Finished:
    """One study that was run: its record, the published round, its test over the sites that took part, its files."""

    record: StudyRecord
    round: int
    test: Evaluation | None
    folder: Path

    @property
    def model(self) -> Path:
        """The published model."""
        return self.folder / MODEL


class Simulation:
    """A consortium of simulated hospitals in a folder of its own, which is removed in the end. Use it in a `with`.

    Any number of studies may be run in it; images are prepared once. `note` says, where the set leaves it open, who
    counts as a patient.
    """

    def __init__(
        self,
        data: Path,
        sites: Sequence[str],
        *,
        seed: int = DEAL_SEED,
        pooled: bool = False,
        threads: int = 0,
        initial: Path | None = None,
    ) -> None:
        """Plan a simulation.

        Args:
            data: what `client.dealing.deal` takes.
            sites: the hospitals' names.
            seed: deals patients out to hospitals, and to the sides of the split where the images bring none.
            pooled: also make the hospital that holds everything.
            threads: for computing; 0 leaves torch's own choice. Results repeat for the same number only.
            initial: weights that every study starts from (safetensors); None makes fresh ones from its seed.
        """
        self._data, self._seed, self._pooled, self._threads = data, seed, pooled, threads
        self._initial = initial
        self.sites = tuple(sites)
        self.classes: tuple[str, ...] = ()
        self.images: dict[str, int] = {}
        self.note = ""

    def __enter__(self) -> Self:
        """Start the hospitals and enrol them.

        Raises:
            ConsiliumError: the images cannot be dealt out.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="consilium-"))
        self.home = CoordinatorHome(self._folder / "coordinator")
        self.hospitals = Hospitals(self._folder)
        try:
            dealt = self.hospitals.call("deal", data=str(self._data.resolve()), sites=self.sites, seed=self._seed)
            self.classes = tuple(dealt["classes"])
            self.images = {name: counts[0] for name, counts in dealt["sites"].items()}
            self.note = dealt["note"]
            self._found()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.hospitals.close()
        if hasattr(self, "registry"):
            self.registry.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, draft: Study, heard: Heard = lambda site: None) -> Finished:
        """Sign a study, let its sites approve it, and run it to its end.

        Args:
            draft: names sites of this simulation.
            heard: called with a site's name after each of its answers.

        Raises:
            ConsiliumError: the study cannot be built, too few sites have images for it, or it did not come to an end.
        """
        from server.commands.signing import sign_study

        record = sign_study(self.registry, self.identity, draft, self._initial)
        roster, _ = self.registry.roster()
        documents = {"study": record.document.encode().hex(), "roster": roster.encode().hex()}
        self.hospitals.call("approve", **documents, sites=record.study.sites)
        self.registry.launch(record.hash)
        self.hospitals.heard = heard
        publish = publisher(self.home, self.registry)
        loop = Loop(
            self.registry, self.registry.study(record.hash), self.identity, self.hospitals, publish, StillClock()
        )
        state = loop.run()
        record = self.registry.study(record.hash)
        if state is not State.FINISHED:
            raise ConsiliumError(
                f"The simulated study is {state.value}", f"{record.name} ({record.reason})", "Correct the study."
            )
        round_ = next(model.round for model in self.registry.models() if model.study == record.hash)
        test = self.registry.course(record.hash).evaluations("test").get(round_)
        return Finished(record, round_, test, self.home.study(record.hash))

    def measure(self, finished: Finished, sites: Sequence[str], side: str = "test") -> dict[str, Sums]:
        """The sums of a published model over the images of any hospitals, whether they took part or not, by site."""
        answer = self.hospitals.call(
            "measure", study=finished.record.hash, model=str(finished.model), sites=list(sites), side=side
        )
        return {name: np.array(sums) for name, sums in answer["sums"].items()}

    def export(self, finished: Finished, folder: Path) -> None:
        """Copy everything a study left behind to a new or empty folder."""
        export(self.home, self.registry, finished.record, folder)

    def _found(self) -> None:
        """Found the consortium and enrol every hospital."""
        self.home.make_folders()
        self.identity = Identity.create(self.home.identity_key)
        tls.create_ca(self.home.tls, "simulation")
        address = CoordinatorConfig(name="simulation")
        consortium = Consortium(
            name=address.name,
            coordinator=self.identity.public,
            superlink=address.superlink,
            ca=self.home.ca.read_text(encoding="ascii"),
        )
        consortium.signed(self.identity).write(self.home.consortium_file)
        self.home.write_config(address)
        made = self.hospitals.call(
            "enrol",
            consortium=str(self.home.consortium_file),
            pooled=POOLED if self._pooled else "",
            seed=self._seed,
            threads=self._threads,
        )
        documents = {
            name: Document.decode(bytes.fromhex(text), Enrolment.KIND) for name, text in made["enrolments"].items()
        }
        enrolments = {name: Enrolment.verified(document) for name, document in documents.items()}
        lines = tuple(
            RosterSite(name=name, identity=e.identity, node_key=e.node_key, not_after=e.not_after)
            for name, e in sorted(enrolments.items())
        )
        self.registry = Registry(self.home)
        roster = Roster(consortium=address.name, version=1, coordinator=self.identity.public, sites=lines)
        self.registry.save_roster(roster.signed(self.identity))
        self.hospitals.know(enrolments)


def metrics(draft: Study, sums: Mapping[str, Sums]) -> dict[str, float]:
    """The figures of several hospitals' sums together; empty when they have none."""
    total = np.sum(list(sums.values()), axis=0)
    return tasks.get(draft.spec()).metrics(total)


def names(draft: Study, count: int) -> tuple[str, ...]:
    """The study's own site names when they are `count`, else made ones."""
    return draft.sites if len(draft.sites) == count else tuple(f"site-{number:03d}" for number in range(1, count + 1))
