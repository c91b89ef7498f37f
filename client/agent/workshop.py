"""Who computes, and in which order? One thread, one work per study; the newest slot wins, equal requests wait together.

The order of a work is bind, compute, keep (fsync), record, and only then is there an answer to hand over (RULES S2,
S3). A crash at any point leaves either nothing (compute again under the same binding) or the recorded bytes.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from client.agent.bench import Bench
from client.agent.desk import Desk
from client.agent.logbook import STEPS, Logbook
from client.agent.private import Private
from client.agent.rows import SourceRow, State, StudyRow
from client.agent.secure import Secure
from client.agent.spool import discard, vector_name
from client.agent.store import Store
from client.agent.voice import Voice
from client.agent.work import Work
from privacy.airlock import Airlock, Numbers, Stored
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.messages import Request, Vector, all_finite
from privacy.study import Study

log = logging.getLogger("consilium.agent")


class Workshop:
    """The computing side of one agent.

    Args:
        answers: the airlock's folder of stored vectors.
        voice: signs answers.
        secure: masks what a study with secure aggregation asks for.
        private: answers for studies with noise.
        logbook: signs what they release.
    """

    def __init__(
        self,
        store: Store,
        airlock: Airlock,
        desk: Desk,
        answers: Path,
        voice: Voice,
        secure: Secure,
        private: Private,
        logbook: Logbook,
    ) -> None:
        self._store, self._airlock, self._desk, self._answers, self._voice = store, airlock, desk, answers, voice
        self._secure, self._private, self._logbook = secure, private, logbook
        self._lock = threading.Lock()
        self._works: dict[str, Work] = {}
        self._worker = ThreadPoolExecutor(1, "training")
        self._stopping = threading.Event()
        self.discard_spent()

    def running(self, request: Request) -> Work | None:
        """The work on this very request, if it is under way."""
        with self._lock:
            work = self._works.get(request.header.study)
        return work if work is not None and work.request == request.hash else None

    def begin(self, request: Request, study: Study, vector: Vector, deadline: float) -> Work | bytes:
        """Bind the slot and start, or join what runs already; a stored answer comes back at once.

        Args:
            vector: float32 [d + m]: the received parameters, and room for the statistics. Handed over for good.
            deadline: on the monotonic clock.

        Raises:
            Refusal: as `Store.bind`; BUSY when the agent is stopping.
        """
        header = request.header
        with self._lock:
            self._go_on()
            running = self._works.get(header.study)
            if running is not None and running.request == request.hash:
                return running
            row = self._store.bind(
                header.study, header.session, header.slot, request.hash, header.kind, study.slots,
                round_=header.round, cohort=header.cohort,
            )  # fmt: skip
            if row.state == "stored":
                return row.answer
            if running is not None:
                running.cancel(RefusalCode.SLOT_SPENT)
            work = Work(request, deadline)
            self._works[header.study] = work
            self._worker.submit(self._run, work, request, study, [vector])
        self.discard_spent()
        return work

    def cancel(self, study: str, code: RefusalCode, older_than: int | None = None) -> None:
        """Stop a study's work (of sessions before `older_than`), and delete what is spent."""
        with self._lock:
            work = self._works.get(study)
            if work is not None and (older_than is None or work.session < older_than):
                work.cancel(code)
        self.discard_spent()

    def discard_spent(self) -> None:
        """Delete the stored vectors of spent slots."""
        with self._lock:
            keep = self._store.stored() | {(work.study, work.slot) for work in self._works.values()}
            discard(self._answers, keep)

    def words(self) -> str:
        """What is being computed now; empty when nothing."""
        with self._lock:
            return ", ".join(f"{work.kind}, slot {work.slot}" for work in self._works.values())

    def prepare(self, study: Study) -> None:
        """Load libraries, network and images in the background."""
        with self._lock:
            if not self._stopping.is_set():
                self._worker.submit(self._prepare, study)

    def load_libraries(self) -> None:
        """Load what computing needs in the background."""
        self._worker.submit(self._desk.libraries)

    def stop(self) -> None:
        """Stop everything; slots stay bound, and the same requests are computed again later."""
        with self._lock:
            self._stopping.set()
            for work in self._works.values():
                work.cancel(RefusalCode.BUSY)

    def close(self) -> None:
        """Stop, and wait for the computing thread."""
        self.stop()
        self._worker.shutdown(wait=True)

    # ---- on the computing thread -----------------------------------------------------------------------------

    def _run(self, work: Work, request: Request, study: Study, held: list[Vector]) -> None:
        answer, refused = b"", Refusal(RefusalCode.INTERNAL)
        try:
            work.check()
            answer = self._produce(work, request, study, held.pop())
        except Refusal as error:
            refused = error if work.stopped is None else Refusal(work.stopped, str(work.slot))
        except ConsiliumError as error:
            log.warning("study %s: %s", work.study, error)
            refused = Refusal(RefusalCode.NO_DATA)
        except BaseException:
            if work.stopped is not None:  # its files were swept while it wrote them
                refused = Refusal(work.stopped, str(work.slot))
            else:
                log.exception("computing %s of study %s failed", work.kind, work.study)
            self._desk.forget(work.study)
        with self._lock:
            if self._works.get(work.study) is work:
                del self._works[work.study]
        if answer:
            work.finish(answer)
        else:
            work.fail(refused)
        if work.stopped is not None:  # what it stored meanwhile is spent
            self.discard_spent()

    def _produce(self, work: Work, request: Request, study: Study, vector: Vector) -> bytes:
        header, sizes = request.header, self._desk.sizes(study)
        bench = self._desk.bench(study, self._source(self._store.study(header.study)), work.check)
        try:
            leaving, own = self._compute(work, request, study, bench, vector)
        except Refusal as refusal:
            if refusal.code is not RefusalCode.NON_FINITE:
                raise
            answer = self._voice.refused(request, RefusalCode.NON_FINITE)
            self._store.keep_answer(header.study, header.slot, request.hash, answer, "", 0)
            return answer
        work.check()
        stored = self._airlock.keep(vector_name(header.study, header.slot), leaving)
        try:
            answer = self._keep(request, study, stored, sizes.statistics)
        except BaseException:
            self._airlock.discard(stored)
            raise
        if own:
            self._store.keep_result(header.study, own)
        return answer

    def _keep(self, request: Request, study: Study, stored: Stored, statistics: int) -> bytes:
        """Record the answer, with the signed release where there is noise (RULES B7), and return it."""
        header = request.header

        def keep(detail: dict[str, str], witness: bytes = b"") -> bytes:
            answer = self._voice.done(request, detail, sha256=stored.sha256, size=stored.size, statistics=statistics)
            self._store.keep_answer(
                header.study, header.slot, request.hash, answer, stored.sha256, stored.size, witness
            )
            return answer

        if study.privacy.mode == "none":
            return keep({})
        with self._logbook.turn:
            witness, steps = self._logbook.released(header.study, header.slot, request.hash, stored.sha256)
            return keep({STEPS: steps}, witness)

    def _compute(self, work: Work, request: Request, study: Study, bench: Bench, vector: Vector) -> tuple[Numbers, str]:
        """What leaves, and of a test the site's own figures."""
        header, sizes, masked = request.header, self._desk.sizes(study), study.secagg.mode == "on"
        if bench.private is not None:
            produced = self._private.produce(request, study, bench, vector, sizes, work.check)
            if produced.words is not None:
                self._secure.hide(request, study, produced.words)
                return produced.words, produced.own
            assert produced.vector is not None
            result, own = produced.vector, produced.own
        else:
            result = bench.work(header.kind, header.round, vector, sizes, work.check, header.parameters)
            own = bench.result(result) if header.kind == "test" else ""
        if not all_finite(result):
            raise Refusal(RefusalCode.NON_FINITE)
        return (self._secure.mask(request, study, result) if masked else result), own

    def _prepare(self, study: Study) -> None:
        row = self._store.study(study.hash)
        if row is None or row.state is not State.APPROVED or self._stopping.is_set():
            return
        try:
            self._desk.bench(study, self._source(row), self._go_on)
        except ConsiliumError as error:
            log.warning("preparing study %s: %s", study.hash, error)
        except Exception:
            log.exception("preparing study %s failed", study.hash)

    def _source(self, row: StudyRow | None) -> SourceRow:
        for source in self._store.sources():
            if row is not None and source.name == row.data:
                return source
        raise Refusal(RefusalCode.NO_DATA)

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise Refusal(RefusalCode.BUSY)
