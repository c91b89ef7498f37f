"""Who carries messages between the consortium and the agent? This process: the only one at a hospital with a network.

It takes messages from the SuperLink over an outbound connection, hands each to the agent's `outward` socket and brings
back what the airlock released. It sees no image, holds no key but its Flower node key, and runs nothing that came over
the network: a message is bytes to pass on. No model is ever held whole: pieces are pulled, passed, and forgotten.

Whatever goes away comes back: the SuperLink by reconnecting for ever, the agent by waiting until the message is of no
use any more. Both sides are idempotent, so doing something twice costs nothing.

Run as `python -m client.connector HOME`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from client import link_state
from client.agent_client import AgentDown, AgentLate, Outward
from client.enrolment import adopt_node_key, following
from client.flower import Incoming, Node, NodeError
from client.home import SiteHome
from client.link_state import LinkState, Phase, Trouble, connector_lock, moment
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.identity import Document
from privacy.messages import Answer

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 5.0
AGENT_PAUSE = 0.5
HELD = 5.0
AT_ONCE = 4
PASSING = frozenset({RefusalCode.DISK_FULL, RefusalCode.BUSY})
Link = tuple[Node, Incoming]
log = logging.getLogger("consilium.connector")


class _Stop(BaseException):
    """SIGTERM or SIGINT arrived."""


class Backoff:
    """Seconds to wait before the next try: doubling from 0.5 to 5, each between half and whole of that."""

    def __init__(self) -> None:
        self._next = FIRST_PAUSE
        self._dice = random.SystemRandom()

    def pause(self) -> float:
        """The next wait."""
        wait, self._next = self._next, min(self._next * 2, LONGEST_PAUSE)
        return wait * self._dice.uniform(0.5, 1.0)

    def reset(self) -> None:
        """It worked: start small again."""
        self._next = FIRST_PAUSE


class Board:
    """The connector's `state.json`, kept up to date from several threads."""

    def __init__(self, home: SiteHome, superlink: str) -> None:
        self._home, self._lock = home, threading.Lock()
        self._state = LinkState(superlink=superlink, since=moment(), pid=os.getpid())
        link_state.write(home, self._state)

    def phase(self, phase: Phase, node_id: str = "", trouble: ConsiliumError | None = None) -> None:
        """The connection to the SuperLink changed."""
        network = Trouble.of(trouble) if trouble is not None else None
        with self._lock:
            since = self._state.since if self._state.phase == phase else moment()
            self._put(phase=phase, since=since, node_id=node_id, network=network)

    def agent(self, trouble: ConsiliumError | None) -> bool:
        """The agent answers again, or what is wrong with it; whether that is news."""
        with self._lock:
            known = self._state.agent
            news = (known is None) != (trouble is None) or (
                known is not None and trouble is not None and known.what != trouble.what
            )
            if news:
                self._put(agent=Trouble.of(trouble) if trouble is not None else None)
        return news

    def arrived(self, kind: str) -> None:
        """A message came."""
        with self._lock:
            self._put(last_kind=kind, last_at=moment(), working=(*self._state.working, kind))

    def done(self, kind: str, answered: bool) -> None:
        """A message left our hands."""
        with self._lock:
            working = list(self._state.working)
            working.remove(kind)
            self._put(working=tuple(working), answered=self._state.answered + int(answered))

    def _put(self, **changes: object) -> None:
        self._state = self._state.model_copy(update=changes)
        link_state.write(self._home, self._state)


class Connector:
    """The node loop. `connect` opens a connection to the SuperLink; `door` is the agent's outward socket."""

    def __init__(self, connect: Callable[[], Node], door: Outward, board: Board) -> None:
        self._connect, self._door, self._board = connect, door, board
        self._lock = threading.Lock()
        self._open: dict[str, Link] = {}
        self._room = threading.BoundedSemaphore(AT_ONCE)
        self._greeted = threading.Event()
        self._stopping = threading.Event()

    def run(self) -> NoReturn:
        """Serve for ever; only a signal ends it."""
        backoff = Backoff()
        while True:
            try:
                with self._connect() as node:
                    self._board.phase("connected", str(node.node_id))
                    log.info("connected as node %s", node.node_id)
                    self._greet()
                    backoff.reset()
                    self._serve(node)
            except ConsiliumError as error:
                self._board.phase("waiting", trouble=error)
                wait = backoff.pause()
                log.warning("%s Next try in %.1f s.", error, wait)
                self._stopping.wait(wait)

    def stop(self) -> None:
        """Let waiting threads go."""
        self._stopping.set()

    def _serve(self, node: Node) -> NoReturn:
        while True:
            try:
                incoming = node.receive(HELD)
            except NodeError as error:
                if error.kind != "gone":
                    raise
                log.warning("a message was dropped. %s", error)
                continue
            if not self._greeted.is_set():
                self._greet()
            if incoming is not None:
                self._take(node, incoming)

    def _take(self, node: Node, incoming: Incoming) -> None:
        """Give a message a thread of its own; one that the agent has in hand already only gets a newer way back."""
        key = f"{incoming.kind} {hashlib.sha256(incoming.document).hexdigest()}"
        with self._lock:
            known = key in self._open
            self._open[key] = (node, incoming)
        if known:
            log.info("%s: delivered again while the agent has it in hand", incoming.kind)
            return
        self._room.acquire()
        self._board.arrived(incoming.kind)
        threading.Thread(target=self._work, args=(key, incoming.kind), name=incoming.kind, daemon=True).start()

    def _work(self, key: str, kind: str) -> None:
        """Carry a message until it is answered or of no use, by the newest way back there is."""
        answered = False
        try:
            while True:
                used, went = self._attempt(key)
                answered = answered or went
                with self._lock:
                    if self._open[key] is used:
                        del self._open[key]
                        return
        finally:
            self._room.release()
            self._board.done(kind, answered)

    def _attempt(self, key: str) -> tuple[Link, bool]:
        """Submit to the agent, then answer: the way that was used, and whether an answer went out."""
        link = self._current(key)
        kind = link[1].kind
        try:
            answer = self._submit(link[1])
            link = self._current(key)
            if answer is not None:
                self._reply(link, answer)
                return link, True
            log.warning("%s: no answer before the deadline", kind)
            self._dismiss(link)
        except NodeError as error:
            log.warning("%s: not carried over. %s", kind, error)
        except ConsiliumError as error:
            log.warning("%s: %s", kind, error)
            self._board.agent(error)
            self._dismiss(link)
        except Exception:
            log.exception("%s: an error of the connector's own", kind)
            self._dismiss(link)
        return link, False

    def _submit(self, incoming: Incoming) -> bytes | None:
        """The agent's answer document; None once the message is of no use any more."""
        while (left := incoming.ttl_left) > 0 and not self._stopping.is_set():
            try:
                self._greet_once()
                answer = self._door.submit(incoming.document, incoming.payload(), left)
            except (AgentDown, AgentLate) as error:
                self._greeted.clear()
                self._pause(error)
            except Refusal as error:
                if error.code not in PASSING:
                    raise
                self._pause(error)
            else:
                self._board.agent(None)
                return answer
        return None

    def _reply(self, link: Link, answer: bytes) -> None:
        node, incoming = link
        body = Answer.read(Document.decode(answer, "answer").body)

        def read(offset: int, length: int) -> bytes:
            return self._patiently(
                lambda: self._door.fetch(body.study, body.session, body.slot, body.request, offset, length), incoming
            )

        node.reply(incoming, answer, body.payload_bytes, read if body.payload_bytes else None)
        log.info("%s: answered, %s, %d bytes", incoming.kind, body.code or body.status, body.payload_bytes)

    def _pause(self, error: ConsiliumError) -> None:
        self._board.agent(error)
        self._stopping.wait(AGENT_PAUSE)

    def _patiently(self, ask: Callable[[], bytes], incoming: Incoming) -> bytes:
        """Ask the agent, waiting out its restarts and its busy moments for as long as the message lives."""
        while True:
            try:
                return ask()
            except (AgentDown, Refusal) as error:
                busy = isinstance(error, Refusal) and error.code is RefusalCode.BUSY
                if incoming.ttl_left <= 0 or self._stopping.is_set() or (isinstance(error, Refusal) and not busy):
                    raise
                if not busy:
                    self._greeted.clear()
                self._pause(error)

    def _greet(self) -> None:
        try:
            self._greet_once()
        except ConsiliumError as error:
            if self._board.agent(error):
                log.warning("%s", error)

    def _greet_once(self) -> None:
        if not self._greeted.is_set():
            greeting = self._door.hello()
            self._greeted.set()
            self._board.agent(None)
            log.info("the agent of %s answers, release %s", greeting.site, greeting.version)

    def _current(self, key: str) -> Link:
        with self._lock:
            return self._open[key]

    @staticmethod
    def _dismiss(link: Link) -> None:
        node, incoming = link
        try:
            node.dismiss(incoming)
        except NodeError as error:
            log.info("%s: %s", incoming.kind, error)


def connect(home: SiteHome) -> Node:
    """Open a connection with the node key; with the renewed one that waits beside it, once the old is refused.

    Raises:
        NodeError: why not.
    """
    config = home.config()
    extra_ca = home.root / config.extra_ca if config.extra_ca else None

    def opened(key: Path) -> Node:
        return Node.connect(config.superlink, home.ca, key, proxy=config.proxy or None, extra_ca=extra_ca)

    try:
        return opened(home.node_key)
    except NodeError as error:
        if error.kind != "refused" or not following(home.node_key).exists():
            raise
    node = opened(following(home.node_key))
    adopt_node_key(home)
    return node


def _on_signal(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise _Stop


def main() -> None:
    """The process. Exit code 0 after a signal, 2 for a home that cannot be served."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m client.connector HOME")
    home = SiteHome(Path(sys.argv[1]).absolute())
    try:
        config = home.config()
        home.check_sockets()
        lock = connector_lock(home)
        if not lock.acquire(patience=2):
            raise ConsiliumError(
                "A connector is running already", str(home.root), "One is enough: see `consilium-site status`."
            )
        board = Board(home, config.superlink)
    except (ConsiliumError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGINT, _on_signal)
    door = Outward(home.outward_socket)
    connector = Connector(lambda: connect(home), door, board)
    try:
        connector.run()
    except _Stop:
        log.info("stopping")
    finally:
        connector.stop()
        board.phase("stopped")
        door.close()
    raise SystemExit(0)


if __name__ == "__main__":
    main()
