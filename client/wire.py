"""How do 5 MB pieces travel through Flower's HTTP clients without being copied? A layer for those clients.

Flower's client holds each piece several times: as an object, in the request message, as the request's bytes, and
once more in the response it waits for. `Wire` sends a piece's bytes from where they lie and receives into one
buffer. It also does what a client facing a strange network should: no redirects, no retries behind the caller's
back, nothing compressed, no proxy from the environment, and no answer larger than a piece.

`client/wire.py` and `server/wire.py` are the same file; see `objects.py`.
"""

from __future__ import annotations

import ctypes
import ssl
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import httpx
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.supercore.constant import (
    FLWR_COMPONENT_NAME_METADATA_KEY,
    FLWR_PACKAGE_NAME_METADATA_KEY,
    FLWR_PACKAGE_VERSION_METADATA_KEY,
)
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.version import package_name, package_version
from google.protobuf.message import DecodeError, Message

R = TypeVar("R", bound=Message)

WAIT_HEADER = "consilium-wait"
LIMIT = (5 << 20) + (1 << 16)
_SLICE = 1 << 18
_CONTENT_TAG = (PushObjectRequest.OBJECT_CONTENT_FIELD_NUMBER << 3) | 2
_TYPES = {"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE}


class Wire:
    """Mixed in before one of Flower's clients; set up with `_dial` instead of Flower's constructor."""

    _client: httpx.Client
    _base_url: str

    def _dial(
        self,
        url: str,
        component: str,
        verify: ssl.SSLContext | bool = True,
        proxy: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare connections to `url`. Raises ValueError when `proxy` is no usable address."""
        self._base_url = url
        self._client = httpx.Client(
            verify=verify,
            proxy=proxy,
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(60.0, connect=10.0),
            limits=httpx.Limits(max_connections=8, keepalive_expiry=60.0),
            headers={
                "accept-encoding": "identity",
                "user-agent": "consilium",
                FLWR_PACKAGE_NAME_METADATA_KEY: package_name,
                FLWR_PACKAGE_VERSION_METADATA_KEY: package_version,
                FLWR_COMPONENT_NAME_METADATA_KEY: component,
                **(headers or {}),
            },
        )

    def _sign(self, context: ProtobufRequestContext) -> None:
        """Add the headers this request needs."""

    def push_chunk(self, path: str, request: PushObjectRequest, data: bytes) -> bool:
        """Push the chunk object of `data` without copying it. `request` lacks its content. Returns "stored"."""
        head = f"ArrayChunk  {len(data)}".encode() + b"\0"
        front = request.SerializeToString() + bytes([_CONTENT_TAG]) + _varint(len(head) + len(data)) + head
        return self._exchange(path, "PushObject", request, PushObjectResponse, [front, data]).stored

    def _unary_unary(
        self,
        *,
        path: str,
        rpc_method: str,
        request: Message,
        response_type: type[R],
        timeout: float | None = None,
    ) -> R:
        """Flower's clients send everything through here."""
        body = request.SerializeToString(deterministic=True)
        return self._exchange(path, rpc_method, request, response_type, [body], timeout)

    def _exchange(
        self,
        path: str,
        rpc: str,
        message: Message,
        response_type: type[R],
        body: list[bytes],
        timeout: float | None = None,
    ) -> R:
        request = self._client.build_request(
            "POST",
            self._base_url + path,
            content=_slices(body),
            headers={**_TYPES, "content-length": str(sum(map(len, body)))},
            timeout=self._client.timeout if timeout is None else timeout,
        )
        self._sign(ProtobufRequestContext(rpc_method=rpc, message=message, request=request))
        response = self._client.send(request, stream=True)
        try:
            received = bytearray()
            for piece in response.iter_raw():
                received += piece
                if len(received) > LIMIT:
                    raise ValueError("the answer is larger than any the SuperLink gives")
        finally:
            response.close()
        if response.is_error or response.is_redirect:
            answer = httpx.Response(response.status_code, headers=response.headers, request=request)
            answer.extensions["reason"] = bytes(received[:4096]).decode("utf-8", "replace")
            raise httpx.HTTPStatusError(f"HTTP {response.status_code}", request=request, response=answer)
        result: R = response_type()
        try:
            result.ParseFromString(received)
        except DecodeError as error:
            raise ValueError("what answers is not a SuperLink") from error
        return result


def trim() -> None:
    """Give freed memory back to the system, where the C library can (glibc)."""
    if _libc is not None:
        _libc.malloc_trim(0)


def _slices(body: list[bytes]) -> Iterator[bytes]:
    while body:
        view = memoryview(body.pop(0))
        for start in range(0, len(view), _SLICE):
            yield bytes(view[start : start + _SLICE])


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _load_libc() -> Any:
    if sys.platform != "linux":
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if hasattr(libc, "malloc_trim") else None
    except OSError:
        return None


_libc = _load_libc()
