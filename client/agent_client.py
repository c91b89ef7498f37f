"""How do our own programs speak to the agent? Thin callers of its two doors, over Unix sockets.

`Outward` is the connector's, `Local` the operator's. A gRPC status comes back as a `ConsiliumError`; an agent that is
not there as `AgentDown`, so that a caller can wait for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc

from client.agent import agent_pb2 as pb
from client.agent import agent_pb2_grpc as stubs
from privacy.errors import REFUSALS, ConsiliumError, Refusal, RefusalCode
from privacy.messages import PROTOCOL

PIECE = 1 << 20
MESSAGE_LIMIT = 16 << 20
QUICK = 20.0
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT),
    ("grpc.max_send_message_length", MESSAGE_LIMIT),
)
T = TypeVar("T")


class AgentDown(ConsiliumError):
    """Nobody answers at the socket: not started, or just restarting."""


class AgentLate(ConsiliumError):
    """The agent did not answer in the time given."""


@dataclass(frozen=True)
class Greeting:
    """What the agent said of itself."""

    site: str
    version: str


def our_version() -> str:
    """The installed release."""
    return version("consilium")


class _Door:
    """One socket. A context manager; safe to use from several threads."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._channel = grpc.insecure_channel(f"unix:{socket.resolve()}", options=_OPTIONS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; calls under way are cancelled."""
        self._channel.close()

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise _translated(error, self.socket) from error


class Outward(_Door):
    """The connector's door: requests in, released bytes out."""

    def __init__(self, socket: Path) -> None:
        super().__init__(socket)
        self._stub = stubs.OutwardStub(self._channel)  # type: ignore[no-untyped-call]

    def hello(self) -> Greeting:
        """Greet, and compare protocol versions (the agent compares too).

        Raises:
            ConsiliumError: another protocol version, or no agent.
        """
        with self._speaking():
            reply = self._stub.Hello(pb.HelloRequest(protocol=PROTOCOL, version=our_version()), timeout=QUICK)
        try:
            value = json.loads(reply.data)
            protocol, greeting = value["protocol"], Greeting(str(value["site"]), str(value["version"]))
        except (ValueError, KeyError, TypeError) as error:
            raise _version("unreadable greeting") from error
        if protocol != PROTOCOL:
            raise _version(f"agent {greeting.version}, connector {our_version()}")
        return greeting

    def submit(self, document: bytes, payload: Iterable[bytes], timeout: float) -> bytes:
        """Hand a request and its payload over, piece by piece, and return the signed answer document.

        Args:
            document: the signed request.
            payload: its bytes in order; pieces of any size.
            timeout: seconds until the message is of no use any more.

        Raises:
            AgentDown: the agent is not there, or went away meanwhile; submitting again is safe.
            AgentLate: no answer within `timeout`.
            ConsiliumError: the agent declined to read the message.
            Exception: whatever `payload` raised.
        """
        failure: list[BaseException] = []

        def chunks() -> Iterator[pb.SubmitChunk]:
            yield pb.SubmitChunk(document=document)
            try:
                for piece in payload:
                    view = memoryview(piece)
                    for start in range(0, len(view), PIECE):
                        yield pb.SubmitChunk(data=bytes(view[start : start + PIECE]))
            except Exception as error:
                failure.append(error)
                raise

        try:
            with self._speaking():
                reply = self._stub.Submit(chunks(), timeout=timeout)
        except ConsiliumError:
            if failure:
                raise failure[0] from None
            raise
        return bytes(reply.data)

    def fetch(self, study: str, session: int, slot: int, request: str, offset: int, length: int) -> bytes:
        """A range of a stored answer's payload.

        Raises:
            AgentDown: the agent is not there; asking again is safe.
            ConsiliumError: the bytes are gone, or the range is outside them.
        """
        asked = pb.FetchRequest(study=study, session=session, slot=slot, request=request, offset=offset, length=length)
        with self._speaking():
            data = b"".join(piece.data for piece in self._stub.Fetch(asked, timeout=QUICK * 6))
        if len(data) != length:
            raise ConsiliumError(
                "The agent handed over fewer bytes than its answer names",
                f"{len(data)} of {length}",
                "Look into log/agent.log at the site.",
            )
        return data


class Local(_Door):
    """The operator's door: every method of the service `Local`, with plain arguments."""

    def __init__(self, socket: Path) -> None:
        super().__init__(socket)
        self._stub = stubs.LocalStub(self._channel)  # type: ignore[no-untyped-call]

    def hello(self) -> Greeting:
        """Greet and compare protocol versions."""
        reply = self._call(self._stub.Hello, pb.Empty(), pb.LocalHello)
        if reply.protocol != PROTOCOL:
            raise _version(f"agent {reply.version}, this command {our_version()}")
        return Greeting(reply.site, reply.version)

    def status(self) -> pb.StatusReply:
        """Everything `status` shows of the agent."""
        return self._call(self._stub.Status, pb.Empty(), pb.StatusReply)

    def hand_in(self, document: bytes) -> pb.Imported:
        """Give the agent a signed study or roster that came as a file."""
        return self._call(self._stub.Import, pb.DocumentMessage(document=document), pb.Imported)

    def study(self, name: str) -> pb.StudyDetail:
        """One study, by name or by the beginning of its hash."""
        return self._call(self._stub.ShowStudy, pb.StudyName(study=name), pb.StudyDetail)

    def decide(self, study: str, decision: str, data: str = "") -> pb.Decided:
        """`decision`: approve, decline or withdraw. Approving may read the images, which takes as long as it takes."""
        asked = pb.Decision(study=study, decision=decision, data=data)
        return self._call(self._stub.Decide, asked, pb.Decided, timeout=None)

    def connect(self, name: str, source: str) -> pb.DataLine:
        """Connect a data source; `source` is its JSON."""
        return self._call(self._stub.Connect, pb.ConnectData(name=name, source=source), pb.DataLine)

    def disconnect(self, name: str) -> None:
        """Forget a data source; no image is touched."""
        self._call(self._stub.Disconnect, pb.DataName(name=name), pb.Empty)

    def check(self, name: str, study: str = "") -> Iterator[pb.CheckEvent]:
        """Read every image of a source once, for a study if one is named; progress, then the summary."""
        with self._speaking():
            yield from self._stub.Check(pb.CheckData(name=name, study=study))

    def preflight(self) -> list[pb.Finding]:
        """The agent's own checks: device, disk, a sample of images."""
        return list(self._call(self._stub.Preflight, pb.Empty(), pb.Findings, timeout=QUICK * 15).findings)

    def models(self) -> list[pb.ModelLine]:
        """Models that studies delivered."""
        return list(self._call(self._stub.Models, pb.Empty(), pb.ModelList).models)

    def compare(self, study: str) -> Iterator[pb.CheckEvent]:
        """Train alone and measure beside a delivered model; progress, then the report."""
        with self._speaking():
            yield from self._stub.Compare(pb.StudyName(study=study))

    def trust(self, key: str, *, replace: bool = False) -> None:
        """Pin the privacy officer's public key, 64 hex digits."""
        self._call(self._stub.Trust, pb.OfficerKey(key=key, replace=replace), pb.Empty)

    def take_grant(self, document: bytes) -> pb.Imported:
        """Give the agent an allowance or a grant that the privacy officer signed."""
        return self._call(self._stub.TakeGrant, pb.DocumentMessage(document=document), pb.Imported)

    def revoke_grant(self, study: str) -> str:
        """End a study's grant, by the study's name or the beginning of its hash; returns the hash."""
        return str(self._call(self._stub.RevokeGrant, pb.StudyName(study=study), pb.Imported).subject)

    def budget(self) -> dict[str, Any]:
        """Grants, studies, and how far patients' lifetimes are spent (`Purse.report`)."""
        report = json.loads(self._call(self._stub.Budget, pb.Empty(), pb.BudgetReply, timeout=QUICK * 3).report)
        return report if isinstance(report, dict) else {}

    def _call(self, method: Callable[..., Any], message: Any, reply: type[T], timeout: float | None = QUICK) -> T:
        with self._speaking():
            answer = method(message, timeout=timeout)
        if not isinstance(answer, reply):
            raise _version("unreadable answer")
        return answer


def _version(subject: str) -> ConsiliumError:
    what, remedy = REFUSALS[RefusalCode.VERSION]
    return ConsiliumError(what, subject, remedy)


def _translated(error: grpc.RpcError, socket: Path) -> ConsiliumError:
    code, details = error.code(), error.details() or ""
    if code == grpc.StatusCode.UNAVAILABLE:
        if socket.exists() and "ermission denied" in details:
            return ConsiliumError(
                "This user may not speak to the agent",
                str(socket),
                "Join the group that site.toml names (operator_group or outward_group), or run as the agent's user.",
            )
        return AgentDown("The agent does not answer", str(socket), "Start the site's node: `consilium-site start`.")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return AgentLate("The agent did not answer in time", str(socket), "Look into log/agent.log at the site.")
    if details in set(RefusalCode):
        return Refusal(RefusalCode(details))
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "oncurrent" in details:  # all of its threads are taken
        return Refusal(RefusalCode.BUSY)
    try:
        value = json.loads(details)
        return ConsiliumError(str(value["what"]), str(value["subject"]), str(value["remedy"]))
    except (ValueError, KeyError, TypeError):
        return ConsiliumError("The agent met an error of its own", code.name, "Look into log/agent.log at the site.")
