"""What can the operator ask of the agent? The service `Local`, for the hospital's own commands.

Nothing here is reachable from the network, so answers may speak of images. An error carries JSON with what happened,
to what, and what to do; anything unforeseen goes to the agent's log and is only named here.
"""

# ruff: noqa: N802  gRPC methods are named as in the .proto
from __future__ import annotations

import functools
import json
import logging
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, NoReturn

import grpc

from client.agent import agent_pb2 as pb
from client.agent import agent_pb2_grpc as stubs
from client.agent import benefit, inspection
from client.agent.core import Agent
from client.agent.rows import SourceRow, State, StudyRow
from client.agent.seal import networked
from client.imaging import Source
from client.imaging.labels import check_table
from models import validate
from privacy.errors import ConsiliumError, Refusal
from privacy.identity import Document
from privacy.messages import PROTOCOL
from privacy.roster import NAME
from privacy.study import APPROVAL, read_approval

THREADS = 6
DETAIL_LIMIT = 2000
SHORTEST_PREFIX = 4

log = logging.getLogger("consilium.agent.local")


def register(server: grpc.Server, agent: Agent) -> None:
    """Add the service to a server."""
    stubs.add_LocalServicer_to_server(Local(agent), server)  # type: ignore[no-untyped-call]


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Local, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(self, request, context)
        except ConsiliumError as error:
            refused = error
        except Exception:
            log.exception("%s failed", method.__name__)
            refused = ConsiliumError("The agent met an error of its own", method.__name__, "Look into log/agent.log.")
        _refuse(context, refused)

    return call


class Local(stubs.LocalServicer):
    """One agent's operator door."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    @_guarded
    def Hello(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.LocalHello:
        """Who is here."""
        return pb.LocalHello(protocol=PROTOCOL, version=version("consilium"), site=self._agent.site.name)

    @_guarded
    def Status(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.StatusReply:
        """Everything at a glance."""
        agent, roster = self._agent, self._agent.roster()
        return pb.StatusReply(
            site=agent.site.name,
            version=version("consilium"),
            identity=agent.site.identity,
            device=agent.desk.device(),
            network=networked(),
            disk_free_bytes=shutil.disk_usage(agent.home.agent).free,
            journal_entries=agent.journal.count,
            journal_head=agent.journal.head,
            working=agent.working(),
            roster_version=roster.version if roster is not None else 0,
            studies=[self._line(row) for row in agent.store.studies()],
            data=[pb.DataLine(name=row.name, source=row.source, summary=row.summary) for row in agent.store.sources()],
        )

    @_guarded
    def Import(self, request: pb.DocumentMessage, context: grpc.ServicerContext) -> pb.Imported:
        """A signed study or roster handed over as a file."""
        kind, subject = self._agent.import_document(request.document)
        return pb.Imported(kind=kind, subject=subject)

    @_guarded
    def ShowStudy(self, request: pb.StudyName, context: grpc.ServicerContext) -> pb.StudyDetail:
        """One study, for review."""
        row = self._find(request.study)
        return pb.StudyDetail(document=row.document, line=self._line(row))

    @_guarded
    def Decide(self, request: pb.Decision, context: grpc.ServicerContext) -> pb.Decided:
        """Approve, decline or withdraw. Approving reads the images if no check of them is on record."""
        states = {"approve": State.APPROVED, "decline": State.DECLINED, "withdraw": State.WITHDRAWN}
        row = self._find(request.study)
        state = states.get(request.decision)
        if state is None:
            raise ConsiliumError("There is no such decision", request.decision, f"Known: {', '.join(states)}.")
        if state is State.WITHDRAWN and row.state is not State.APPROVED:
            raise ConsiliumError("The study is not approved here", row.name, "Only an approval can be withdrawn.")
        data, cautions = "", list[str]()
        if state is State.APPROVED:
            data, cautions = self._usable(row, request.data)
            study = self._agent.study(row.hash)
            if study is not None and study.privacy.mode != "none":
                cautions += [f"{text} Until then nothing is computed." for text in self._agent.purse.lacking(study)]
        approval = self._agent.decide(row.hash, state, data)
        return pb.Decided(approval=approval, line=self._line(self._find(row.hash)), cautions=cautions)

    @_guarded
    def Connect(self, request: pb.ConnectData, context: grpc.ServicerContext) -> pb.DataLine:
        """Declare a data source."""
        if not NAME.match(request.name):
            raise ConsiliumError(
                "This cannot be a data source's name", request.name, "Use 2 to 40 small letters, digits and hyphens."
            )
        try:
            fields = json.loads(request.source)
        except ValueError as error:
            raise ConsiliumError(
                "The source is not JSON", request.name, "Use `consilium-site data connect`."
            ) from error
        source = Source.from_fields(fields if isinstance(fields, dict) else {}, request.name)
        source.check()
        check_table(source)
        text = source.model_dump_json(exclude_defaults=True)
        self._keeps_its_word(SourceRow(request.name, text, ""))
        self._agent.store.put_source(request.name, text)
        return pb.DataLine(name=request.name, source=text)

    @_guarded
    def Disconnect(self, request: pb.DataName, context: grpc.ServicerContext) -> pb.Empty:
        """Forget a data source; no image is touched."""
        inspection.source(self._agent, request.name)
        self._agent.store.remove_source(request.name)
        return pb.Empty()

    def Check(self, request: pb.CheckData, context: grpc.ServicerContext) -> Iterator[pb.CheckEvent]:
        """Read every image once, with progress; the last event carries the summary."""

        def work(progress: inspection.Progress) -> str:
            study = self._agent.study(self._find(request.study).hash) if request.study else None
            return inspection.check(self._agent, request.name, progress, study)

        return _streamed(context, request.name, "data check", work)

    def Compare(self, request: pb.StudyName, context: grpc.ServicerContext) -> Iterator[pb.CheckEvent]:
        """Train alone and measure beside a delivered model, with progress; the last event carries the report."""

        def work(progress: inspection.Progress) -> str:
            return benefit.compare(self._agent, self._find(request.study), progress)

        return _streamed(context, request.study, "models compare", work)

    @_guarded
    def Preflight(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.Findings:
        """The agent's own checks."""
        return pb.Findings(findings=inspection.preflight(self._agent))

    @_guarded
    def Models(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.ModelList:
        """Delivered models."""
        lines = []
        for row in self._agent.store.studies():
            folder, study = self._agent.models() / row.hash, self._agent.study(row.hash)
            if folder.is_dir() and study is not None:
                lines.append(
                    pb.ModelLine(study=row.hash, title=study.study.title, folder=str(folder), result=row.result)
                )
        return pb.ModelList(models=lines)

    @_guarded
    def Trust(self, request: pb.OfficerKey, context: grpc.ServicerContext) -> pb.Empty:
        """Pin the privacy officer's key."""
        self._agent.purse.trust(request.key, replace=request.replace)
        return pb.Empty()

    @_guarded
    def TakeGrant(self, request: pb.DocumentMessage, context: grpc.ServicerContext) -> pb.Imported:
        """The officer's allowance or grant, handed over as a file."""
        kind, subject = self._agent.purse.take(request.document)
        return pb.Imported(kind=kind, subject=subject)

    @_guarded
    def RevokeGrant(self, request: pb.StudyName, context: grpc.ServicerContext) -> pb.Imported:
        """End a study's grant; a grant may name a study that the site has not seen yet."""
        hashes = [grant["study"] for grant in self._agent.purse.report()["grants"]]
        named = {study for study in hashes if len(request.study) >= SHORTEST_PREFIX and study.startswith(request.study)}
        try:
            study = named.pop() if len(named) == 1 else self._find(request.study).hash
        except ConsiliumError as error:
            raise ConsiliumError(
                error.what,
                error.subject,
                f"{error.remedy} A study that was not offered here yet has no name here: give its hash, in full or its "
                "beginning; `consilium-site budget` lists the grants by it.",
            ) from error
        self._agent.gate.revoke(study)
        return pb.Imported(kind="grant", subject=study)

    @_guarded
    def Budget(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.BudgetReply:
        """Grants, studies, and how far patients' lifetimes are spent."""
        return pb.BudgetReply(report=json.dumps(self._agent.purse.report()))

    def _keeps_its_word(self, source: SourceRow) -> None:
        """A signed approval says what was declared of its source: that stands until the study is over.

        Raises:
            ConsiliumError: it would not.
        """
        for row in self._agent.store.studies():
            if row.state is State.APPROVED and row.data == source.name:
                said = read_approval(Document.decode(row.approval, APPROVAL))
                if said["one_image_per_patient"] != source.one_image_per_patient:
                    raise ConsiliumError(
                        "The study was approved with another declaration of who a patient is in this source",
                        f"{source.name}, {row.name}",
                        "Connect the images under another name, or withdraw from the study and approve it again.",
                    )

    def _find(self, name: str) -> StudyRow:
        rows = self._agent.store.studies()
        found = [row for row in rows if name in (row.hash, row.name)] or [
            row for row in rows if len(name) >= SHORTEST_PREFIX and row.hash.startswith(name)
        ]
        if len(found) == 1:
            return found[0]
        if not found:
            known = ", ".join(row.name for row in rows) or "none yet"
            raise ConsiliumError("There is no such study", name, f"Known at this site: {known}.")
        hashes = ", ".join(row.hash[:12] for row in found)
        raise ConsiliumError("Several studies fit", name, f"Name one by the beginning of its hash: {hashes}.")

    def _line(self, row: StudyRow) -> pb.StudyLine:
        study = self._agent.study(row.hash)
        return pb.StudyLine(
            study=row.hash,
            name=row.name,
            title=study.study.title if study is not None else "",
            state=row.state.value,
            data=row.data,
            slot=row.highest,
            slots=study.slots if study is not None else 0,
            last=row.last,
            at=row.at,
        )

    def _usable(self, row: StudyRow, data: str) -> tuple[str, list[str]]:
        """The data source an approval names, once network and images are known to be usable; and cautions."""
        study = self._agent.study(row.hash)
        assert study is not None
        problems = validate(study.spec())
        if problems:
            raise ConsiliumError("This release cannot train the study", row.name, " ".join(map(str, problems)))
        sources = self._agent.store.sources()
        if not data and len(sources) > 1:
            names = ", ".join(source.name for source in sources)
            raise ConsiliumError("Several data sources are connected", names, "Name one with `--data NAME`.")
        name = data or (sources[0].name if sources else "")
        if not name:
            raise ConsiliumError("No images are connected", row.name, "First: `consilium-site data connect NAME PATH`.")
        cautions = inspection.require_training_images(self._agent, study, name)
        return name, cautions + (self._agent.desk.changes(study) if study.privacy.mode != "none" else [])


def _streamed(
    context: grpc.ServicerContext, name: str, command: str, work: Callable[[inspection.Progress], str]
) -> Iterator[pb.CheckEvent]:
    """The progress of some work in a thread of its own, then what it returns; it ends when nobody listens."""
    gone = threading.Event()
    context.add_callback(gone.set)
    events: queue.SimpleQueue[pb.CheckEvent | ConsiliumError] = queue.SimpleQueue()
    percent = -1

    def progress(done: int, total: int) -> None:
        nonlocal percent
        if gone.is_set():
            raise ConsiliumError("The work was broken off", name, f"Start it again: `consilium-site {command}`.")
        if total and 100 * done // total != percent:
            percent = 100 * done // total
            events.put(pb.CheckEvent(done=done, total=total))

    def run() -> None:
        try:
            events.put(pb.CheckEvent(done=1, total=1, summary=work(progress)))
        except ConsiliumError as error:
            events.put(error)
        except Exception:
            log.exception("%s failed", command)
            events.put(ConsiliumError("The agent met an error of its own", name, "Look into log/agent.log."))

    threading.Thread(target=run, daemon=True).start()
    while True:
        event = events.get()
        if isinstance(event, ConsiliumError):
            _refuse(context, event)
        yield event
        if event.summary:
            return


def _refuse(context: grpc.ServicerContext, error: ConsiliumError) -> NoReturn:
    code = grpc.StatusCode.FAILED_PRECONDITION if isinstance(error, Refusal) else grpc.StatusCode.INVALID_ARGUMENT
    parts = {"what": error.what, "subject": error.subject, "remedy": error.remedy}
    context.abort(code, json.dumps({key: text[:DETAIL_LIMIT] for key, text in parts.items()}))
    raise AssertionError("abort does not return")
