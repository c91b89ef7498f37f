"""The real parts that the site's tests share: a consortium, a SuperLink process, a proxy, and sites of our own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from client import enrolment
from client.home import SiteHome
from privacy.identity import Document, Identity
from privacy.roster import Consortium, Enrolment, Roster, enrol
from server import superlink, tls

LIVENESS = 60.0
REPOSITORY = Path(__file__).parents[2]


def until(condition: Callable[[], bool], what: str, logs: Callable[[], str] = str, seconds: float = LIVENESS) -> None:
    """Wait for something that must happen; `logs` is shown when it does not."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"did not happen within {seconds:.0f} s: {what}\n{logs()}")
        time.sleep(0.05)


@dataclass
class Link:
    """A coordinator's identity, its certificate authority, and its SuperLink as a process of its own."""

    home: Path
    identity: Identity = field(default_factory=Identity.generate)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    @property
    def private(self) -> str:
        return superlink.private_url(self.home)

    def prepare(self, hosts: tuple[str, ...] = ("localhost", "127.0.0.1")) -> None:
        tls.create_ca(self.home / "tls", "heart")
        tls.create_server(self.home / "tls", hosts)
        (self.home / "run").mkdir(exist_ok=True)

    def start(self) -> None:
        arguments = ["--host", "127.0.0.1", "--port", str(self.port), "--private-port", "0"]
        with open(self.home / "log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server.superlink", str(self.home), *arguments],
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
            )
        ready = self.home / "run" / superlink.READY
        until(lambda: self._up(ready), "the SuperLink is ready", (self.home / "log").read_text)

    def _up(self, ready: Path) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.home / "log").read_text()
        if not ready.exists() or (facts := json.loads(ready.read_text()))["pid"] != self.process.pid:
            return False
        self.port = facts["port"]
        return True

    def stop(self, *, kill: bool = False) -> None:
        if self.process is not None:
            self.process.kill() if kill else self.process.terminate()
            self.process.wait(30)
            self.process = None

    def consortium(self, folder: Path, address: str | None = None) -> Path:
        """The document a site joins with."""
        ca = (self.home / "tls" / "ca.pem").read_text()
        body = Consortium(name="heart", coordinator=self.identity.public, superlink=address or self.address, ca=ca)
        path = folder / "consortium.json"
        body.signed(self.identity).write(path)
        return path

    def admit(self, *enrolments: Document) -> Roster:
        """Enrol sites, as the coordinator would; returns the roster."""
        roster = Roster(consortium="heart", version=0, coordinator=self.identity.public, sites=())
        for document in enrolments:
            roster = enrol(roster, Enrolment.verified(document), datetime.now(UTC))
        superlink.write_nodes(self.home, {site.name: site.node_key for site in roster.sites})
        return roster


@contextmanager
def running_link(home: Path) -> Iterator[Link]:
    """A SuperLink that runs for as long as the block."""
    home.mkdir(parents=True, exist_ok=True)
    link = Link(home)
    link.prepare()
    link.start()
    try:
        yield link
    finally:
        link.stop()


def new_site(folder: Path, link: Link, name: str = "st-anna", **options: object) -> SiteHome:
    """A site that has joined, but is not enrolled."""
    folder.mkdir(parents=True, exist_ok=True)
    address = options.pop("address", None)
    home = SiteHome(folder / "site")
    enrolment.create(home, name, link.consortium(folder, address), **options)  # type: ignore[arg-type]
    return home


class Proxy:
    """A small real HTTP proxy on the loopback interface: CONNECT only, with a password when `password` is set.

    With `tls_home` it is an inspecting one: it answers in the server's place with that folder's certificate.
    """

    def __init__(self, password: str = "", inspect: Path | None = None) -> None:
        self.password, self.inspect, self.seen, self.port = password, inspect, [], 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            method, target, _ = head.split(" ", 2)
            self.seen.append(target)
            if method != "CONNECT" or (self.password and f"Basic {self.password}" not in head):
                writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
                await writer.drain()
                return
            url = urlsplit(f"//{target}")
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await writer.drain()
            if self.inspect is not None:
                await writer.start_tls(_context(self.inspect))
            far_reader, far_writer = await asyncio.open_connection(
                url.hostname, url.port, ssl=_blind() if self.inspect is not None else None
            )
            await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))
        except (OSError, ValueError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(1 << 16):
        sink.write(data)
        await sink.drain()
    sink.close()


def _context(folder: Path) -> object:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    return context


def _blind() -> object:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def child_environment() -> dict[str, str]:
    """Small threads for child processes."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
