"""How does a hospital talk to Flower? The site's whole contact with Flower's internals is in this file.

A `Node` is what Flower calls a SuperNode, without what we do not want of one: nothing that came over the network is
run, no bundle is fetched, no process is started per message. It signs its requests with the node key, takes one
message at a time, and streams payloads in pieces of 5 MB both ways, so its memory does not grow with the model.

On the wire every message is ordinary Flower content: a `RecordDict` with a `ConfigRecord` ("document": the signed
document, the payload's size, and the order of its pieces) and, when there is a payload, an `ArrayRecord` with one
flat array. Objects are named by their SHA-256, and each is checked against its name when it arrives.
"""

from __future__ import annotations

import hashlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Message,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.proto.recorddict_pb2 import RecordDict
from flwr.supercore.constant import (
    VERSION_INCOMPATIBILITY_MESSAGE_METADATA_KEY,
)
from flwr.supercore.date import now
from google.protobuf.message import DecodeError

from client import objects
from client.fleet import Fleet, create_key, load_key, public_pem
from client.objects import KINDS
from client.reach import NodeError, denied, explain
from client.wire import trim
from privacy.errors import ConsiliumError

__all__ = ["KINDS", "Incoming", "Node", "NodeError", "create_key", "public_pem"]

Q = TypeVar("Q")
A = TypeVar("A")

_PUSH = "/v1/fleet/push-object"
_ARRIVES_WITHIN = 180.0
_PUSHES = 2
_AGAIN = "It is tried again by itself."


class Incoming:
    """One message from the coordinator: its document is here, its payload still at the SuperLink."""

    def __init__(self, node: Node, metadata: Metadata, opened: objects.Opened) -> None:
        self.kind, self.document, self.payload_bytes = opened.kind, opened.document, opened.size
        self.run_id, self.message_id = metadata.run_id, metadata.message_id
        self._node, self._pieces = node, opened.pieces
        self._ends = metadata.created_at + metadata.ttl

    @property
    def ttl_left(self) -> float:
        """Seconds until the deadline, by this machine's clock; negative when it is over."""
        return self._ends - now().timestamp()

    def payload(self) -> Iterator[bytes]:
        """The payload in order, in pieces of at most 5 MB; may be called again until the message is answered.

        Raises:
            NodeError: the link failed, or ("gone") the coordinator stopped sending.
        """
        left = self.payload_bytes
        for object_id in self._pieces:
            chunk = self._node._pull(self.run_id, object_id, self._ends)
            try:
                data = objects.body(chunk, "ArrayChunk")
            except ValueError as error:
                raise _gone("The payload is not well formed", self.message_id) from error
            del chunk
            left -= len(data)
            if left < 0:
                raise _gone("The payload is longer than announced", self.message_id)
            yield data
            del data
        trim()
        if left:
            raise _gone("The payload is shorter than announced", self.message_id)


class Node:
    """One signed-in connection to the SuperLink, which sends its own heartbeat. May be used from several threads."""

    def __init__(self, client: Fleet, address: str, ca: Path, proxy: str | None) -> None:
        self._client = client
        self._address, self._ca, self._proxy = address, ca, proxy
        self._stop = threading.Event()
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._heartbeats, name="heartbeat", daemon=True)
        self._node = NodeProto()

    @classmethod
    def connect(
        cls,
        address: str,
        ca_path: Path,
        node_key_path: Path,
        proxy: str | None = None,
        extra_ca: Path | None = None,
    ) -> Self:
        """Sign in. A session of this node that never ended (kill -9) is taken over at once.

        Args:
            address: "host:port" of the SuperLink.
            ca_path: PEM file; only certificates of this authority are accepted.
            node_key_path: the node key, PEM, P-384.
            proxy: "http://[user:password@]host:port"; the environment's proxy settings are not used.
            extra_ca: PEM file of a further authority, for a firewall the hospital trusts to inspect.

        Raises:
            NodeError: no connection; the text says why and what to do.
            ConsiliumError: the key or a CA file cannot be read.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        for path in (ca_path, *([extra_ca] if extra_ca else [])):
            try:
                context.load_verify_locations(path)
            except (OSError, ssl.SSLError) as error:
                raise ConsiliumError(
                    "The CA file cannot be read", str(path), "Enrol again, or restore the file."
                ) from error
        key = load_key(node_key_path)
        try:
            client = Fleet(address, context, key, proxy)
        except (ValueError, httpx.InvalidURL) as error:
            raise NodeError(
                "proxy", "The proxy's address is not usable", str(proxy), "Write it as http://host:port."
            ) from error
        node = cls(client, address, ca_path, proxy)
        try:
            answer = node._call(
                client.ActivateNode,
                ActivateNodeRequest(public_key=client.public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL),
            )
            if not answer.node_id:
                raise node._stranger("an empty answer")
        except BaseException:
            client.close()
            raise
        node._node = NodeProto(node_id=answer.node_id)
        node._thread.start()
        return node

    @property
    def node_id(self) -> int:
        """The number Flower gave this node for as long as the SuperLink lives."""
        return self._node.node_id

    @property
    def alive(self) -> bool:
        """Has the SuperLink heard from this node within the last minute?"""
        return time.monotonic() - self._beat < 2 * HEARTBEAT_DEFAULT_INTERVAL

    def receive(self, wait: float = 5.0) -> Incoming | None:
        """Ask once for a message; the SuperLink holds the question up to `wait` seconds. None when there is none.

        Raises:
            NodeError: the connection is lost, or ("gone") a message was not usable and was dismissed.
        """
        began = time.monotonic()
        self._client.wait = wait
        answer = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        self._beat = time.monotonic()
        if not answer.messages_list:
            if time.monotonic() - began < wait / 2:
                self._stop.wait(0.1)  # a proxy took the header that asks to wait: do not ask in a tight loop
            return None
        metadata, tree = answer.messages_list[0].metadata, answer.message_object_trees[0]
        try:
            return self._open(metadata, tree)
        except (ValueError, DecodeError) as error:
            self._confirm(metadata.run_id, metadata.message_id)
            raise _gone("The coordinator's message is not well formed", metadata.message_id) from error

    def reply(
        self,
        incoming: Incoming,
        document: bytes,
        payload_size: int = 0,
        read: Callable[[int, int], bytes] | None = None,
    ) -> None:
        """Answer `incoming` with a document and `payload_size` bytes, which are read twice and never held whole.

        Args:
            incoming: the message answered; its payload cannot be fetched afterwards.
            document: the signed answer.
            payload_size: bytes of payload.
            read: `read(offset, length)` returns exactly these bytes, the same each time.

        Raises:
            NodeError: the connection is lost, or ("gone") the deadline is over or the run has ended.
        """
        pieces = []
        if read is not None:
            pieces = [objects.piece_id(read(*span)) for span in objects.spans(payload_size)]
        metadata = Metadata(
            run_id=incoming.run_id,
            src_node_id=self._node.node_id,
            dst_node_id=SUPERLINK_NODE_ID,
            reply_to_message_id=incoming.message_id,
            message_type=f"query.{incoming.kind}",
            created_at=now().timestamp(),
        )
        metadata.ttl = incoming._ends - metadata.created_at
        if metadata.ttl <= 0:
            self.dismiss(incoming)
            raise _gone("The deadline is over", incoming.kind)
        inside = objects.content(document, payload_size, pieces)
        metadata.message_id, whole, tree = objects.message(metadata, inside)
        answer = self._call(
            self._client.PushMessages,
            PushMessagesRequest(
                node=self._node,
                messages_list=[Message(metadata=metadata, content=RecordDict())],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            ),
        )
        missing = set(answer.objects_to_push)
        if not missing:
            self.dismiss(incoming)
            raise _gone("The coordinator no longer waits for this answer", incoming.kind)

        def request(object_id: str, data: bytes = b"") -> PushObjectRequest:
            return PushObjectRequest(
                node=self._node,
                run_id=incoming.run_id,
                object_id=object_id,
                object_content=data,
                session_id=answer.session_id,
            )

        def push(object_id: str, data: bytes) -> None:
            if not self._call(self._client.PushObject, request(object_id, data)).stored:
                raise _gone("The SuperLink no longer takes this answer", incoming.kind)

        def push_chunk(object_id: str, data: bytes) -> None:
            if not self._call(lambda r: self._client.push_chunk(_PUSH, r, data), request(object_id)):
                raise _gone("The SuperLink no longer takes this answer", incoming.kind)

        for object_id, data in inside.small:
            if object_id in missing:
                push(object_id, data)
        if read is not None:
            self._push_pieces(read, payload_size, pieces, missing, push_chunk)
        push(metadata.message_id, whole)
        self._beat = time.monotonic()
        trim()
        self._confirm(incoming.run_id, incoming.message_id)

    def dismiss(self, incoming: Incoming) -> None:
        """Forget a message without an answer."""
        self._confirm(incoming.run_id, incoming.message_id)

    def close(self) -> None:
        """Sign off, if the SuperLink can still be reached, and close the connection."""
        self._stop.set()
        with suppress(NodeError):
            self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self._node.node_id))
        self._client.close()
        if self._thread.is_alive():
            self._thread.join(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, metadata: Metadata, tree: ObjectTree) -> Incoming:
        head = self._pull(metadata.run_id, objects.document_name(tree), metadata.created_at + metadata.ttl)
        return Incoming(self, metadata, objects.opened(metadata.message_type, tree, head))

    def _pull(self, run_id: int, object_id: str, ends: float) -> bytes:
        """One object, waiting for it as long as the coordinator may still be sending it."""
        request = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
        patience, pause = time.monotonic() + _ARRIVES_WITHIN, 0.02
        while True:
            answer = self._call(self._client.PullObject, request)
            if answer.object_available:
                break
            if not answer.object_found or time.monotonic() > patience or now().timestamp() > ends:
                raise _gone("The coordinator withdrew the message", object_id[:16])
            self._stop.wait(pause)
            pause = min(0.1, pause * 2)
        content: bytes = answer.object_content
        del answer
        if hashlib.sha256(content).hexdigest() != object_id:
            raise _gone("A piece does not have the hash it is named by", object_id[:16])
        return content

    def _push_pieces(
        self,
        read: Callable[[int, int], bytes],
        size: int,
        pieces: list[str],
        missing: set[str],
        push: Callable[[str, bytes], None],
    ) -> None:
        todo = iter(list(zip(pieces, objects.spans(size), strict=True)))
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    entry = next(todo, None)
                    if entry is None:
                        return
                    object_id, span = entry
                    if object_id not in missing:
                        continue
                    missing.discard(object_id)
                    data = read(*span)
                push(object_id, data)
                del data

        if len(pieces) == 1:
            work()
            return
        with ThreadPoolExecutor(_PUSHES) as pool:
            for future in [pool.submit(work) for _ in range(_PUSHES)]:
                future.result()

    def _confirm(self, run_id: int, message_id: str) -> None:
        with suppress(NodeError):
            request = ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=message_id)
            self._call(self._client.ConfirmMessageReceived, request)

    def _heartbeats(self) -> None:
        pause = 0.7 * HEARTBEAT_DEFAULT_INTERVAL
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        while not self._stop.wait(pause):
            with suppress(NodeError):
                if self._call(self._client.SendNodeHeartbeat, request).success:
                    self._beat = time.monotonic()

    def _call(self, method: Callable[[Q], A], request: Q) -> A:
        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            raise self._rejected(error.response) from error
        except (httpx.HTTPError, ValueError, OSError, RuntimeError) as error:
            raise explain(error, self._address, self._ca, self._proxy) from error

    def _rejected(self, response: httpx.Response) -> NodeError:
        status = response.status_code
        if status in {401, 412}:
            return denied(response.headers.get("date"), self._address)
        if status == 403:
            return _gone("The run has ended", self._address)
        if note := response.headers.get(VERSION_INCOMPATIBILITY_MESSAGE_METADATA_KEY):
            return NodeError(
                "version",
                "The two sides run different Flower releases",
                note[:200],
                "Install the same release of Consilium on both sides.",
            )
        if status >= 500:
            return NodeError("unreachable", "The SuperLink has an error", f"HTTP {status}", _AGAIN)
        return self._stranger(f"HTTP {status}")

    def _stranger(self, sign: str) -> NodeError:
        return NodeError(
            "refused",
            "What answers there is not the consortium's SuperLink",
            f"{self._address} ({sign})",
            "Check host, port and proxy.",
        )


def _gone(what: str, subject: str) -> NodeError:
    return NodeError("gone", what, subject, "Nothing to do: the coordinator asks again when it needs to.")
