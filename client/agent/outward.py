"""What can the connector, and through it the world, get from the agent? The three calls of `Outward`, nothing else.

Every method has the same response serialiser, made of `privacy.airlock.released_bytes`: a handler that returned
anything but `Released` bytes would send nothing. Errors carry a refusal's code and no text; the code is
in the journal too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from client.agent import agent_pb2 as pb
from client.agent.core import Agent
from privacy.airlock import Released, released_bytes
from privacy.errors import Refusal, RefusalCode
from privacy.messages import PROTOCOL

SERVICE = "consilium.agent.v1.Outward"
THREADS = 8
PIECE = 2 << 20

_STATUS = {
    RefusalCode.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    RefusalCode.TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    RefusalCode.UNKNOWN_STUDY: grpc.StatusCode.NOT_FOUND,
    RefusalCode.DISK_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RefusalCode.INTERNAL: grpc.StatusCode.INTERNAL,
}

log = logging.getLogger("consilium.agent.outward")


def serialise(released: Released) -> bytes:
    """The wire form of what the airlock released, and of nothing else."""
    message: bytes = pb.Released(data=released_bytes(released)).SerializeToString()
    return message


class Outward(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The service, as a table of its methods."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.methods: dict[str, grpc.RpcMethodHandler] = {
            f"/{SERVICE}/Hello": grpc.unary_unary_rpc_method_handler(
                self._guarded(self._hello), pb.HelloRequest.FromString, serialise
            ),
            f"/{SERVICE}/Submit": grpc.stream_unary_rpc_method_handler(
                self._guarded(self._submit), pb.SubmitChunk.FromString, serialise
            ),
            f"/{SERVICE}/Fetch": grpc.unary_stream_rpc_method_handler(
                self._guarded_stream(self._fetch), pb.FetchRequest.FromString, serialise
            ),
        }

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """The handler of a method; None makes gRPC answer UNIMPLEMENTED."""
        return self.methods.get(details.method)

    def _hello(self, request: pb.HelloRequest) -> Released:
        if request.protocol != PROTOCOL:
            raise Refusal(RefusalCode.VERSION)
        return self._agent.hello()

    def _submit(self, chunks: Iterator[pb.SubmitChunk]) -> Released:
        first = next(chunks, None)
        return self._agent.submit(first.document if first is not None else b"", _data(chunks))

    def _fetch(self, request: pb.FetchRequest) -> Iterator[Released]:
        for offset in range(request.offset, request.offset + request.length, PIECE):
            length = min(PIECE, request.offset + request.length - offset)
            yield self._agent.fetch(request.study, request.session, request.slot, request.request, offset, length)

    def _guarded(self, method: Callable[[Any], Released]) -> Callable[[Any, grpc.ServicerContext], Released]:
        def call(request: Any, context: grpc.ServicerContext) -> Released:
            try:
                return method(request)
            except Refusal as refusal:
                code = refusal.code
            except Exception:
                log.exception("an outward call failed")
                code = RefusalCode.INTERNAL
            raise self._refused(context, code)

        return call

    def _guarded_stream(
        self, method: Callable[[Any], Iterator[Released]]
    ) -> Callable[[Any, grpc.ServicerContext], Iterator[Released]]:
        def call(request: Any, context: grpc.ServicerContext) -> Iterator[Released]:
            try:
                yield from method(request)
                return
            except Refusal as refusal:
                code = refusal.code
            except Exception:
                log.exception("an outward call failed")
                code = RefusalCode.INTERNAL
            raise self._refused(context, code)

        return call

    def _refused(self, context: grpc.ServicerContext, code: RefusalCode) -> AssertionError:
        """End a call with a status and the refusal's code, which passes the airlock like everything else.

        When not even the journal can take a line, the one word "disk-full" leaves without one.
        """
        try:
            details = released_bytes(self._agent.refusal(code)).decode()
        except Refusal:
            code = RefusalCode.DISK_FULL
            details = code.value
        context.abort(_STATUS.get(code, grpc.StatusCode.FAILED_PRECONDITION), details)
        return AssertionError("abort does not return")


def _data(chunks: Iterator[pb.SubmitChunk]) -> Iterator[bytes]:
    """The payload of a submission; a stream that breaks off or mixes its parts is malformed."""
    try:
        for chunk in chunks:
            if chunk.WhichOneof("part") != "data":
                raise Refusal(RefusalCode.MALFORMED)
            yield chunk.data
    except grpc.RpcError as error:
        raise Refusal(RefusalCode.MALFORMED) from error
