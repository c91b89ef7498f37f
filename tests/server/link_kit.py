"""A real SuperLink process on the loopback interface, with nodes and runs, for tests."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from client.flower import Incoming, Node, NodeError, create_key
from server import superlink, tls
from server.flower import Exchange, Outgoing, acquire, start_run

STUDY = "5a" * 32
LIVENESS = 60.0
REPOSITORY = Path(__file__).parents[2]


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + LIVENESS
    while not condition():
        assert time.monotonic() < end, f"did not happen: {what}"
        time.sleep(0.05)


class LinkProcess:
    """`python -m server.superlink` in `home`; `sites` are enrolled, each with a key `home/<site>.key`."""

    def __init__(self, home: Path, sites: Sequence[str] = ()) -> None:
        self.home, self.port, self.process = home, 0, None
        tls.create_ca(home / "tls", "lab")
        tls.create_server(home / "tls", ["localhost", "127.0.0.1"])
        self.keys = {site: create_key(self.key(site)) for site in sites}
        superlink.write_nodes(home, self.keys)

    def key(self, site: str) -> Path:
        return self.home / f"{site}.key"

    @property
    def ca(self) -> Path:
        return self.home / "tls" / "ca.pem"

    @property
    def private(self) -> str:
        return superlink.private_url(self.home)

    @property
    def secrets(self) -> superlink.Secrets:
        return superlink.secrets(self.home)

    def start(self) -> None:
        ready = self.home / "run" / superlink.READY
        options = ["--host", "127.0.0.1", "--port", str(self.port)]
        with open(self.home / "log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server.superlink", str(self.home), *options],
                cwd=REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

        def up() -> bool:
            assert self.process.poll() is None, (self.home / "log").read_text()
            return ready.exists() and json.loads(ready.read_text())["pid"] == self.process.pid

        until(up, "the SuperLink is ready")
        self.port = json.loads(ready.read_text())["port"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(30)

    def connect(self, site: str, **options: object) -> Node:
        address = str(options.pop("address", f"127.0.0.1:{self.port}"))
        return Node.connect(address, self.ca, self.key(site), **options)

    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url=f"https://127.0.0.1:{self.port}",
            verify=ssl.create_default_context(cafile=self.ca),
            trust_env=False,
        )

    def audit(self) -> list[dict]:
        return [json.loads(line) for line in (self.home / "audit.jsonl").read_text().splitlines()]

    @contextmanager
    def exchange(self, study: str = STUDY) -> Iterator[Exchange]:
        run_id = start_run(self.private, self.secrets.control, study)
        token, taken = acquire(self.private, self.secrets.runtime, study)
        assert taken == run_id
        with Exchange(self.private, token, study) as exchange:
            yield exchange


class Site:
    """A node in a thread that answers each message with `answer(incoming, payload)` -> (document, payload)."""

    def __init__(self, link: LinkProcess, name: str, answer: Callable[[Incoming, bytes], tuple[bytes, bytes]]) -> None:
        self.node, self._answer = link.connect(name), answer
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                incoming = self.node.receive(0.3)
                if incoming is not None:
                    document, payload = self._answer(incoming, b"".join(incoming.payload()))
                    self.node.reply(incoming, document, len(payload), lambda o, n, data=payload: data[o : o + n])
        except NodeError as error:
            self.error = error

    def close(self) -> None:
        self._stop.set()
        self._thread.join(30)
        self.node.close()


def collect(exchange: Exchange, sent: dict[str, int]) -> dict[int, tuple[bytes, bytes, str]]:
    """Every answer, by node: (document, payload, error)."""
    todo, answers, end = set(sent), {}, time.monotonic() + LIVENESS
    while todo:
        assert time.monotonic() < end, "not every site answered"
        for reply in exchange.poll(todo):
            payload = b"".join(reply.chunks())
            assert len(payload) == reply.payload_bytes
            answers[reply.node_id] = (reply.document, payload, reply.error)
            todo.discard(reply.message_id)
    return answers


def ask(
    exchange: Exchange, kind: str = "train", payload: Path | bytes | None = None, ttl: float = 60
) -> dict[str, int]:
    return exchange.send([Outgoing(node, kind, b'{"r":1}', payload) for node in exchange.nodes().values()], ttl)
