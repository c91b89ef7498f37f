"""How does the SuperLink run? As its own process, with two ports over one state: `python -m server.superlink HOME`.

The public port (TLS) serves the few paths a node needs; the private one (loopback) serves the coordinator's own
processes, with tokens. Between them stands Flower's SuperLink, unchanged but for its state (`server.carrier`), with
process isolation, nothing installed at run time, no telemetry and no update check. All state is in memory: who may
connect is read every second from `run/nodes.json`, which the registry writes, and rounds resume from checkpoints.

Files in HOME: `tls/server.pem`, `tls/server.key` and `run/nodes.json` are read; `run/superlink.json`,
`run/control.token`, `run/runtime.secret` and `audit.jsonl` are written.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import gc
import json
import logging
import os
import secrets as randomness
import signal
import socket
import ssl
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives import serialization

from privacy.errors import ConsiliumError
from privacy.files import write_atomically
from server import gate, tls
from server.audit import Audit

if TYPE_CHECKING:
    import uvicorn

    from server.carrier import Carrier

READY, NODES, TOKEN, SECRET = "superlink.json", "nodes.json", "control.token", "runtime.secret"
QUIET = {  # Flower sends nothing about itself, asks for no update, installs nothing at run time
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_INTERNAL_GRPC_FLEET_API": "0",
    "FLWR_INTERNAL_GRPC_CONTROL_API": "0",
    "FLWR_OIDC_ENABLED": "0",
}
HEAD_LIMIT, HEAD_SECONDS = 1 << 16, 20.0
_START_AGAIN = "See that the SuperLink runs (`consilium-coordinator serve`), then try again."


@dataclass(frozen=True)
class Secrets:
    """What the coordinator's own processes show at the private port."""

    control: str
    runtime: bytes


def secrets(home: Path) -> Secrets:
    """Read the two secrets in HOME/run, making them (0600) when they are not there yet."""
    run = home / "run"
    run.mkdir(parents=True, exist_ok=True, mode=0o700)
    control, runtime = (_secret(run / name) for name in (TOKEN, SECRET))
    return Secrets(control, runtime.encode())


def private_url(home: Path) -> str:
    """Where the running SuperLink's private port is, as "127.0.0.1:port".

    Raises:
        ConsiliumError: no SuperLink runs in this home.
    """
    path = home / "run" / READY
    try:
        return f"127.0.0.1:{int(json.loads(path.read_bytes())['private_port'])}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConsiliumError("No SuperLink is running", str(path), _START_AGAIN) from error


def write_nodes(home: Path, nodes: Mapping[str, str]) -> None:
    """Tell the SuperLink who may connect: site name -> node public key (PEM). Takes effect within a second."""
    _write(home / "run" / NODES, json.dumps(dict(nodes), sort_keys=True).encode())


def serve(home: Path, host: str, port: int, private_port: int = 0) -> None:
    """Run the SuperLink until SIGTERM or SIGINT. Port 0 takes a free one; see run/superlink.json.

    Raises:
        ConsiliumError: the certificate is no good, a port is taken, or the audit log was changed.
    """
    os.environ.update(QUIET)
    os.environ["FLWR_HOME"] = str(home / "run" / "flwr")
    folder = home / "tls"
    tls.check(folder / tls.SERVER, folder / tls.SERVER_KEY)
    audit = Audit(home / "audit.jsonl")
    try:
        with contextlib.ExitStack() as stack:
            public = stack.enter_context(_listen(host, port))
            private = stack.enter_context(_listen("127.0.0.1", private_port))
            _loop_runner()(_serve(home, audit, public, private))
    finally:
        audit.close()


async def _serve(home: Path, audit: Audit, public: socket.socket, private: socket.socket) -> None:
    from server.carrier import build, gates

    logging.getLogger("flwr").setLevel(logging.WARNING)
    ready = home / "run" / READY
    ready.unlink(missing_ok=True)
    shared, waiting = secrets(home), gate.Waiting()
    waiting.bind(asyncio.get_running_loop())
    app, carrier = build(shared.runtime, audit.record, waiting)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    certificate = _Certificate(home / "tls", context)
    outer, inner = gates(app, carrier, shared.control, audit, waiting)
    servers = [_server(outer, context), _server(inner, None)]
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    nodes = _Nodes(home / "run" / NODES, carrier, audit)
    nodes.sync()
    memory = _Memory(carrier)
    async with app.router.lifespan_context(app):
        tasks = [asyncio.create_task(s.serve([x])) for s, x in zip(servers, (public, private), strict=True)]
        while not all(server.started for server in servers):
            await asyncio.sleep(0.01)
        facts = {"pid": os.getpid(), "port": _port(public), "private_port": _port(private)}
        _write(ready, json.dumps(facts).encode())
        audit.record("superlink-started", port=facts["port"])
        gc.collect()
        gc.freeze()
        try:
            while not stop.is_set() and not any(task.done() for task in tasks):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), 1.0)
                nodes.sync()
                carrier.tidy()
                audit.settle()
                memory.settle()
                certificate.refresh(audit)
        finally:
            ready.unlink(missing_ok=True)
            for server in servers:
                server.should_exit = True
            waiting.release_all()
            await asyncio.gather(*tasks)
            audit.record("superlink-stopped")


class _Nodes:
    """Keeps the link's nodes equal to the registry's file."""

    def __init__(self, path: Path, carrier: Carrier, audit: Audit) -> None:
        self._path, self._carrier, self._audit = path, carrier, audit
        self._seen: bytes | None = None

    def sync(self) -> None:
        try:
            data = self._path.read_bytes()
        except OSError:
            data = b"{}"
        if data == self._seen:
            return
        self._seen = data
        try:
            listed = json.loads(data)
            nodes = {_pem(key): str(site) for site, key in listed.items()}
        except (ValueError, TypeError, AttributeError) as error:
            print(f"{self._path} cannot be read ({error}); the nodes stay as they were.", file=sys.stderr)
            self._audit.record("nodes-unreadable", path=str(self._path))
            return
        self._carrier.enrol(nodes)


class _Certificate:
    """Loads the server certificate into the TLS context, and again when it was renewed on disk."""

    def __init__(self, folder: Path, context: ssl.SSLContext) -> None:
        self._certificate, self._key, self._context = folder / tls.SERVER, folder / tls.SERVER_KEY, context
        self._stamp = self._now()
        context.load_cert_chain(self._certificate, self._key)

    def refresh(self, audit: Audit) -> None:
        stamp = self._now()
        if stamp == self._stamp:
            return
        try:
            tls.check(self._certificate, self._key)
            self._context.load_cert_chain(self._certificate, self._key)
        except (ConsiliumError, OSError, ssl.SSLError):
            return  # the two files are replaced one after the other: look again in a second
        self._stamp = stamp
        audit.record("certificate-renewed")

    def _now(self) -> tuple[int, ...]:
        with contextlib.suppress(OSError):
            return tuple(path.stat().st_mtime_ns for path in (self._certificate, self._key))
        return self._stamp


def _server(app: gate.Gate, context: ssl.SSLContext | None) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        """Leaves signals to the process, which has two servers to stop."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Server(
        uvicorn.Config(
            app,
            interface="asgi3",
            lifespan="off",
            ws="none",
            log_config=None,
            log_level=logging.ERROR,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=75,
            http=_protocol(),
            timeout_graceful_shutdown=3,
            ssl_context_factory=None if context is None else (lambda _config, _default: context),
        )
    )


def _protocol() -> Any:
    """How uvicorn reads requests: with httptools, whose parser takes headers without end from anybody who sends them.

    This one hangs up on a head larger than `HEAD_LIMIT` bytes or slower than `HEAD_SECONDS`.
    """
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "h11"  # has a limit of its own

    class Protocol(HttpToolsProtocol):
        """One connection."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._head, self._in_head, self._whole = 0, True, False
            self._late = self.loop.call_later(HEAD_SECONDS, transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            self._late.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._in_head and self._late.cancelled():
                self._late = self.loop.call_later(HEAD_SECONDS, self.transport.abort)
            self._whole = False
            super().data_received(data)
            if self._in_head and not self._whole:  # else these bytes were, or ended with, a body
                self._head += len(data)
                if self._head > HEAD_LIMIT:
                    self.transport.abort()

        def on_headers_complete(self) -> None:
            self._head, self._in_head = 0, False
            self._whole = True
            self._late.cancel()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._in_head = self._whole = True
            super().on_message_complete()

    return Protocol


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    with contextlib.closing(listener):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise ConsiliumError(
                "The port is taken" if taken else "The SuperLink cannot listen there",
                f"{host}:{port}" + ("" if taken else f" ({error.strerror})"),
                "Stop the program that uses it, or choose another port." if taken else "Choose another address.",
            ) from error
        yield listener


def _port(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def _pem(key: str) -> bytes:
    """The node key as Flower writes it."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return serialization.load_pem_public_key(key.encode()).public_bytes(serialization.Encoding.PEM, form)


def _secret(path: Path) -> str:
    if not path.exists():
        _write(path, randomness.token_hex(32).encode())
    return path.read_text().strip()


def _write(path: Path, data: bytes) -> None:
    """Replace a file in one step, readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(path, data)


def _loop_runner() -> Any:
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    return uvloop.run


class _Memory:
    """Gives memory back to the system after a round; the C library keeps freed 5 MB buffers otherwise."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier, self._held = carrier, 0

    def settle(self) -> None:
        held, self._held = self._held, len(self._carrier.object_store)
        if self._held < held:
            from server.wire import trim

            trim()


def main(arguments: list[str] | None = None) -> int:
    """Run the SuperLink of one home; the supervisor starts this."""
    parser = argparse.ArgumentParser(prog="python -m server.superlink", description=main.__doc__)
    parser.add_argument("home", type=Path, help="the coordinator's folder")
    parser.add_argument("--host", default="0.0.0.0", help="address of the public port")  # noqa: S104
    parser.add_argument("--port", type=int, default=8443, help="public port (TLS)")
    parser.add_argument("--private-port", type=int, default=0, help="loopback port; 0 takes a free one")
    options = parser.parse_args(arguments)
    try:
        serve(options.home, options.host, options.port, options.private_port)
    except ConsiliumError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
