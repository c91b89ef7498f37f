"""How do messages go from a round to the sites and back? The coordinator's exchange with Flower.

A study is run by a process of ours that is, to Flower, the process of a ServerApp: it starts a run (`start_run`),
takes the run's task with the secret (`acquire`), and works through an `Exchange` until it reports the outcome.

An `Exchange` keeps no model in memory: payloads go out from a file and come in as pieces of 5 MB, and a payload for
several sites is sent to the SuperLink once.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, SUPERLINK_NODE_ID, SubStatus
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Message,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.recorddict_pb2 import RecordDict
from flwr.proto.runtime_pb2 import (
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.date import now
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError

from privacy.errors import ConsiliumError
from server import objects
from server.runs import (
    LinkLost,
    RunInfo,
    Runtime,
    acquire,
    bundle,
    bundle_hash,
    runs,
    runtime,
    start_run,
    stop_run,
)
from server.wire import trim

if TYPE_CHECKING:
    from flwr.serverapp import ServerApp

__all__ = [
    "Exchange",
    "LinkLost",
    "Outgoing",
    "Reply",
    "RunInfo",
    "acquire",
    "bundle",
    "bundle_hash",
    "run_serverapp",
    "runs",
    "start_run",
    "stop_run",
]

Q = TypeVar("Q")
A = TypeVar("A")

_PUSH = "/v1/runtime/push-object"
_PUSHES = 2
_SELF = Node(node_id=SUPERLINK_NODE_ID)


@dataclass(frozen=True)
class Outgoing:
    """One message to send. Equal `payload` objects in one call are read and sent once."""

    node_id: int
    kind: str
    document: bytes
    payload: Path | bytes | None = None


@dataclass(frozen=True)
class Reply:
    """One answer, or (`error` not empty) the reason why there will be none."""

    message_id: str
    node_id: int
    document: bytes = b""
    payload_bytes: int = 0
    error: str = ""
    _pieces: Callable[[], Iterator[bytes]] = field(default=lambda: iter(()), repr=False, compare=False)

    def chunks(self) -> Iterator[bytes]:
        """The payload in order, in pieces of at most 5 MB, each checked against its hash.

        Raises:
            LinkLost: the SuperLink is gone.
            ValueError: the site sent something else than it announced.
        """
        return self._pieces()


def run_serverapp(app: ServerApp, private: str, token: str, study: str) -> None:
    """Run `app` as the ServerApp of the task `token`, as Flower would, but with nothing taken from the bundle.

    The app's main function gets the `Exchange` in place of the grid.

    Raises:
        LinkLost: the SuperLink is gone.
        ConsiliumError: the task is not of this study.
    """
    from flwr.common.serde import context_from_proto

    with Exchange(private, token, study) as exchange:
        context = context_from_proto(exchange.context)
        context.run_config = {"study": study}
        app(exchange, context)  # type: ignore[arg-type]


class Exchange:
    """Messages between one run and the sites. Use as a context manager, from one thread.

    Entering takes the task and starts its heartbeat; leaving reports the outcome.
    """

    def __init__(self, private: str, token: str, study: str) -> None:
        self._private, self._study = private, study
        self._client = Runtime(private, token)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._heartbeats, name="heartbeat", daemon=True)
        self._finished = False
        self._sent: dict[str, int] = {}
        self.run_id = self.task_id = 0
        self.context: Any = None

    def __enter__(self) -> Self:
        """Take the task.

        Raises:
            LinkLost: the SuperLink is gone or the token is not good.
            ConsiliumError: the task's bundle is not this study's.
        """
        task = self._call(self._client.PullTaskInput, PullTaskInputRequest())
        self.run_id, self.task_id, self.context = task.run.run_id, task.task_id, task.context
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        self._thread.start()
        if task.fab.hash_str != bundle_hash(self._study) or task.fab.content != bundle(self._study):
            self.finish(False, "The task's bundle is not this study's.")
            raise ConsiliumError(
                "The run belongs to another study", self._study[:16], "Launch the study again with this release."
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(LinkLost):
            self.finish(error is None, "" if error is None else f"{type(error).__name__}: {error}"[:500])
        self._client.close()

    def nodes(self) -> dict[str, int]:
        """The sites that are connected now: node public key (PEM) -> node number."""
        found = self._call(self._client.GetNodes, GetNodesRequest()).nodes
        return {node.public_key.decode(): node.node_id for node in found}

    def send(self, requests: Iterable[Outgoing], ttl: float) -> dict[str, int]:
        """Send messages that are void after `ttl` seconds, and return message id -> node number.

        A node that is not known (any more) is missing in the result.

        Raises:
            LinkLost: the SuperLink is gone.
            OSError: a payload cannot be read.
        """
        known: dict[object, objects.Content] = {}
        chunks: dict[str, Callable[[], bytes]] = {}
        small: dict[str, bytes] = {}
        whole: list[tuple[str, bytes, ObjectTree, Metadata]] = []
        created = now().timestamp()
        for request in requests:
            source = request.payload if isinstance(request.payload, Path) else id(request.payload)
            key = (request.document, source)
            if key not in known:
                known[key] = _content(request, chunks)
                small.update(known[key].small)
            metadata = Metadata(
                run_id=self.run_id,
                src_node_id=SUPERLINK_NODE_ID,
                dst_node_id=request.node_id,
                ttl=ttl,
                message_type=f"query.{request.kind}",
                created_at=created,
            )
            name, data, tree = objects.message(metadata, known[key])
            metadata.message_id = name
            whole.append((name, data, tree, metadata))
        if not whole:
            return {}
        answer = self._call(
            self._client.PushMessages,
            PushAppMessagesRequest(
                messages_list=[Message(metadata=metadata, content=RecordDict()) for *_, metadata in whole],
                message_object_trees=[tree for _, _, tree, _ in whole],
            ),
        )
        missing = set(answer.objects_to_push)
        sent = {m.message_id: m.dst_node_id for *_, m in whole if m.message_id in set(answer.message_ids)}
        small.update({name: data for name, data, _, _ in whole})
        for name, data in small.items():
            if name in missing:
                self._push(answer.session_id, name, data)
        self._push_chunks(answer.session_id, [(n, read) for n, read in chunks.items() if n in missing])
        self._sent.update(sent)
        return sent

    def poll(self, message_ids: Collection[str], wait: float = 1.0) -> Iterator[Reply]:
        """The answers to these messages that have arrived whole, each once; asks once, held up to `wait` seconds.

        Read a reply's `chunks` before taking the next: the SuperLink frees an answer when the iterator goes on.

        Raises:
            LinkLost: the SuperLink is gone.
        """
        asked = [m for m in message_ids if m in self._sent]
        if not asked:
            return
        began = time.monotonic()
        self._client.wait = wait
        answer = self._call(self._client.PullMessages, PullAppMessagesRequest(message_ids=asked))
        if not answer.messages_list and time.monotonic() - began < min(0.05, wait):
            self._stop.wait(0.05)
        for proto, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            message_id = proto.metadata.reply_to_message_id
            node_id = self._sent.pop(message_id, proto.metadata.src_node_id)
            try:
                yield self._reply(message_id, node_id, proto, tree)
            finally:
                self._confirm(proto.metadata.message_id)
                self._confirm(message_id)

    def drop(self, message_ids: Collection[str]) -> None:
        """Give up these messages: what is unanswered or unread at the SuperLink is freed."""
        mine = [m for m in message_ids if m in self._sent]
        if not mine:
            return
        answer = self._call(self._client.PullMessages, PullAppMessagesRequest(message_ids=mine))
        for proto in answer.messages_list:
            self._confirm(proto.metadata.message_id)
        for message_id in mine:
            self._confirm(message_id)
            del self._sent[message_id]

    def finish(self, ok: bool, details: str = "") -> None:
        """Report the outcome to Flower; the run ends. Later calls do nothing.

        Raises:
            LinkLost: the SuperLink is gone.
        """
        if self._finished:
            return
        self._finished = True
        self._stop.set()
        outcome = SubStatus.COMPLETED if ok else SubStatus.FAILED
        self._call(self._client.PushTaskOutput, PushTaskOutputRequest(sub_status=outcome, details=details))

    def _reply(self, message_id: str, node_id: int, proto: Message, tree: ObjectTree) -> Reply:
        if proto.HasField("error"):
            return Reply(message_id, node_id, error=f"{proto.error.reason} (Flower error {proto.error.code})")
        try:
            head = self._pull(objects.document_name(tree))
            inside = objects.opened(proto.metadata.message_type, tree, head)
        except (ValueError, DecodeError) as error:
            return Reply(message_id, node_id, error=f"The answer is not well formed: {error}")

        def pieces() -> Iterator[bytes]:
            left = inside.size
            for name in inside.pieces:
                data = objects.body(self._pull(name), "ArrayChunk")
                left -= len(data)
                if left < 0:
                    break
                yield data
                del data
            trim()
            if left:
                raise ValueError("the payload has another length than announced")

        return Reply(message_id, node_id, inside.document, inside.size, "", pieces)

    def _pull(self, name: str) -> bytes:
        request = PullObjectRequest(node=_SELF, run_id=self.run_id, object_id=name)
        content: bytes = self._call(self._client.PullObject, request).object_content
        if hashlib.sha256(content).hexdigest() != name:
            raise ValueError("a piece is missing or does not have the hash it is named by")
        return content

    def _push(self, session: str, name: str, content: bytes) -> None:
        """Send one object. The SuperLink may decline it: all it was for have answered without reading it.

        So do agents that send a stored answer again, or refuse. A run that is forgotten fails the call itself.
        """
        request = PushObjectRequest(
            node=_SELF, run_id=self.run_id, object_id=name, object_content=content, session_id=session
        )
        self._call(self._client.PushObject, request)

    def _push_chunks(self, session: str, todo: list[tuple[str, Callable[[], bytes]]]) -> None:
        def work(entry: tuple[str, Callable[[], bytes]]) -> None:
            name, data = entry[0], entry[1]()
            request = PushObjectRequest(node=_SELF, run_id=self.run_id, object_id=name, session_id=session)
            self._call(lambda r: self._client.push_chunk(_PUSH, r, data), request)  # as `_push`

        if len(todo) < 2:
            for entry in todo:
                work(entry)
            return
        with ThreadPoolExecutor(_PUSHES) as pool:
            for _ in pool.map(work, todo):
                pass
        trim()

    def _confirm(self, name: str) -> None:
        request = ConfirmMessageReceivedRequest(node=_SELF, run_id=self.run_id, message_object_id=name)
        self._call(self._client.ConfirmMessageReceived, request)

    def _heartbeats(self) -> None:
        while not self._stop.wait(0.5 * HEARTBEAT_DEFAULT_INTERVAL):
            with suppress(LinkLost, ConsiliumError):
                self._call(self._client.SendTaskHeartbeat, SendTaskHeartbeatRequest())

    def _call(self, method: Callable[[Q], A], request: Q) -> A:
        return runtime(method, request, self._private)


def _content(request: Outgoing, chunks: dict[str, Callable[[], bytes]]) -> objects.Content:
    """Name a request's pieces, reading the payload once, and note in `chunks` how to read each again."""
    payload = request.payload
    if payload is None:
        return objects.content(request.document, 0, [])
    if isinstance(payload, Path):
        size = payload.stat().st_size

        def read(offset: int, length: int) -> bytes:
            with open(payload, "rb") as file:
                return os.pread(file.fileno(), length, offset)
    else:
        size, view = len(payload), payload

        def read(offset: int, length: int) -> bytes:
            return view[offset : offset + length]

    names = []
    for offset, length in objects.spans(size):
        names.append(objects.piece_id(read(offset, length)))
        chunks[names[-1]] = lambda o=offset, n=length: read(o, n)  # type: ignore[misc]
    return objects.content(request.document, size, names)
