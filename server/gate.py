"""Which requests get through to Flower at all? An ASGI filter for each of the SuperLink's two ports.

Flower serves all its interfaces on one port and asks nobody's name. The gate stands in front: only the paths a
port is for, only POST, only bodies of a sane size, and only callers who show a credential worth reading a body
for. Everything else gets an empty answer and a line in the audit log. A poll may ask to be held until there is
something to fetch, which saves both sides from asking ten times a second.
"""

from __future__ import annotations

import asyncio
import hmac
from base64 import b64decode
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Protocol

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Headers = Mapping[bytes, bytes]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

WAIT_HEADER = b"consilium-wait"
MAX_WAIT = 20.0
SMALL, LARGE = 1 << 20, (5 << 20) + (1 << 16)

PUBLIC_PATHS: Mapping[str, int] = {
    "/v1/fleet/activate-node": SMALL,
    "/v1/fleet/deactivate-node": SMALL,
    "/v1/fleet/send-node-heartbeat": SMALL,
    "/v1/fleet/pull-messages": SMALL,
    "/v1/fleet/push-messages": SMALL,
    "/v1/fleet/push-object": LARGE,
    "/v1/fleet/pull-object": SMALL,
    "/v1/fleet/confirm-message-received": SMALL,
}
CONTROL_PATHS: Mapping[str, int] = {
    "/v1/control/start-run": SMALL,
    "/v1/control/stop-run": SMALL,
    "/v1/control/list-runs": SMALL,
}
RUNTIME_PATHS: Mapping[str, int] = {
    "/v1/runtime/acquire-task": SMALL,
    "/v1/runtime/send-task-heartbeat": SMALL,
    "/v1/runtime/pull-task-input": SMALL,
    "/v1/runtime/push-task-output": SMALL,
    "/v1/runtime/get-nodes": SMALL,
    "/v1/runtime/push-messages": LARGE,
    "/v1/runtime/pull-messages": SMALL,
    "/v1/runtime/push-object": LARGE,
    "/v1/runtime/pull-object": SMALL,
    "/v1/runtime/confirm-message-received": SMALL,
}


class Refusals(Protocol):
    """Where refusals are written (`server.audit.Audit`)."""

    def refused(self, listener: str, peer: str, reason: str, path: str) -> None:
        """Log or count one refusal."""


class Waiting:
    """Polls that are held until their node or run has something. Lives in one event loop; `wake` from any thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._held: defaultdict[int, set[asyncio.Future[bool]]] = defaultdict(set)

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the loop in which polls are held."""
        self._loop = loop

    def wake(self, key: int) -> None:
        """Something has come for node or run `key`."""
        self._soon(key, True)

    def cut(self, key: int) -> None:
        """Whoever polls for `key` now is a former session's: it must not get what comes next."""
        self._soon(key, False)

    def release_all(self) -> None:
        """Let every held poll go, before shutting down. In the loop's thread."""
        for key in list(self._held):
            self._release(key, True)

    async def hold(self, key: int, ready: Callable[[], bool], receive: Receive, seconds: float) -> bool:
        """Return when `ready()` may be true for `key`, or after `seconds`; False when the caller is gone or cut off."""
        come: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._held[key].add(come)
        gone = asyncio.ensure_future(receive())
        try:
            if not ready():
                both: set[asyncio.Future[Any]] = {come, gone}
                await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            left = gone.done() and gone.result()["type"] == "http.disconnect"
            return not left and (not come.done() or come.result())
        finally:
            gone.cancel()
            self._held[key].discard(come)
            if not self._held[key]:
                del self._held[key]

    def _soon(self, key: int, valid: bool) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._release, key, valid)

    def _release(self, key: int, valid: bool) -> None:
        for come in self._held.get(key, ()):
            if not come.done():
                come.set_result(valid)


Knock = Callable[[str, Headers], str | None]
"""(path, headers) -> why the caller is turned away before its body is read, or None."""
Hold = Callable[[str, Headers], tuple[int, Callable[[], bool]] | None]
"""(path, headers) -> the key to wait on and how to see that there is something, or None."""


class Gate:
    """The filter in front of `app` for one port. `paths` maps each path let through to its largest body in bytes."""

    def __init__(
        self,
        app: ASGIApp,
        name: str,
        paths: Mapping[str, int],
        knock: Knock,
        audit: Refusals,
        waiting: Waiting,
        hold: Hold,
    ) -> None:
        self._app, self._name, self._paths, self._knock = app, name, paths, knock
        self._audit, self._waiting, self._hold = audit, waiting, hold

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        path, headers = scope["path"], dict(scope["headers"])
        if scope["method"] != "POST" or path not in self._paths or scope.get("query_string"):
            await self._turn_away(scope, send, 404, "no such path")
            return
        reason = self._knock(path, headers)
        if reason is not None:
            await self._turn_away(scope, send, 401, reason)
            return
        body = await self._body(headers, receive, self._paths[path])
        if body is None:
            await self._turn_away(scope, send, 413, "body too large")
            return
        if not await self._wait(path, headers, receive):
            await _answer(send, 503)
            return
        whole = [body]
        del body

        async def replay() -> Event:
            if not whole:
                return await receive()
            return {"type": "http.request", "body": whole.pop(), "more_body": False}

        async def watched(event: Event) -> None:
            if event["type"] == "http.response.start" and event["status"] in {401, 403}:
                self._audit.refused(self._name, _peer(scope), "not authenticated", path)
            await send(event)

        await self._app(scope, replay, watched)

    async def _body(self, headers: Headers, receive: Receive, limit: int) -> bytes | None:
        """The whole body, or None when it is larger than `limit` bytes."""
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > limit:
            return None
        pieces, size = [], 0
        while True:
            event = await receive()
            if event["type"] != "http.request":
                return b""
            pieces.append(event.get("body", b""))
            size += len(pieces[-1])
            if size > limit:
                return None
            if not event.get("more_body"):
                return b"".join(pieces)

    async def _wait(self, path: str, headers: Headers, receive: Receive) -> bool:
        try:
            seconds = min(float(headers.get(WAIT_HEADER, b"0")), MAX_WAIT)
        except ValueError:
            seconds = 0.0
        waits_for = self._hold(path, headers) if seconds > 0 else None
        return waits_for is None or await self._waiting.hold(*waits_for, receive, seconds)

    async def _turn_away(self, scope: Scope, send: Send, status: int, reason: str) -> None:
        self._audit.refused(self._name, _peer(scope), reason, scope["path"])
        await _answer(send, status)


async def _answer(send: Send, status: int) -> None:
    headers = [(b"content-length", b"0")]
    if status < 500:  # a stranger's body is not read, and there is no second question on this connection
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def bearer(headers: Headers, token: str) -> bool:
    """Does the request carry `Authorization: Bearer <token>`? Compared in constant time."""
    return hmac.compare_digest(headers.get(b"authorization", b""), f"Bearer {token}".encode())


def shown_key(headers: Headers, name: str) -> bytes:
    """The public key a node shows in header `name`, as PEM bytes, not yet proven; empty when there is none."""
    try:
        return b64decode(headers.get(name.encode(), b""), validate=True)
    except ValueError:
        return b""


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "unknown"
