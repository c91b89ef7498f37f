"""Whom do we ask, and which answers count? Sending signed requests, and believing only what is signed in return.

The SuperLink is a carrier: it may lose, repeat, or make up messages. An answer counts when the site's pinned key
signed it for this very request; everything else is a reason beside the site's name. A site is `lost` once it has been
away for `GRACE` seconds, so that a connection that is only being renewed does not end its round.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from privacy.canonical import canonical, sha256
from privacy.errors import REFUSALS, Refusal, RefusalCode
from privacy.identity import Document, Identity
from privacy.messages import Answer, Header, Kind
from privacy.roster import Roster
from server.flower import Outgoing, Reply
from server.records import StudyRecord
from server.registry import Registry

GRACE = 10.0
LOOK_AROUND = 1.0
HELD = 0.5
Data = bytes
UNREAD = "0" * 64
"""The study an agent names when it could not read the request."""


class Link(Protocol):
    """The carrier: `server.flower.Exchange`."""

    def nodes(self) -> dict[str, int]:
        """Node public key (PEM) -> node number of the sites that are connected."""
        ...

    def send(self, requests: Iterable[Outgoing], ttl: float) -> dict[str, int]:
        """Send, and return message id -> node number."""
        ...

    def poll(self, message_ids: Collection[str], wait: float = 1.0) -> Iterator[Reply]:
        """Answers that have arrived whole, each once."""
        ...

    def drop(self, message_ids: Collection[str]) -> None:
        """Give messages up."""
        ...


class Clock(Protocol):
    """Where time comes from."""

    def now(self) -> float:
        """Seconds, never going back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        ...


@dataclass(frozen=True)
class Call:
    """One signed request, the same bytes for every site. `hash` is what answers must name."""

    header: Header
    document: bytes
    hash: str
    payload: Path | bytes

    @classmethod
    def of(cls, document: Document, payload: Path | bytes) -> Call:
        """A call from its signed document."""
        return cls(Header.read(document.body), document.encode(), document.digest, payload)


@dataclass(frozen=True)
class Said:
    """What came back from one site for one call.

    `answer` is verified, or None: then `code` says what was wrong with it, or `lost` that nothing came at all.
    `chunks` gives the payload's bytes; read them before the next `Said`. `document` is the answer as it was signed.
    """

    site: str
    call: Call
    answer: Answer | None
    chunks: Callable[[], Iterator[bytes]]
    bytes: int
    seconds: float
    code: str = ""
    reason: str = ""
    lost: bool = False
    document: Data = b""

    def statement(self, name: str, kind: str) -> Document:
        """The signed document that a done answer carries under `name`; its signature is not checked here.

        Raises:
            Refusal: MALFORMED or TOO_LARGE.
        """
        return Document.decode((self.answer.detail if self.answer else {}).get(name, "").encode(), kind)

    def payload(self, limit: int) -> Data:
        """The payload, whole and as its signed hash says; for the small ones of a secure sum's stages.

        Raises:
            Refusal: TOO_LARGE or MODEL_HASH.
        """
        if self.bytes > limit:
            raise Refusal(RefusalCode.TOO_LARGE)
        try:
            data = b"".join(self.chunks())
        except ValueError as error:
            raise Refusal(RefusalCode.MODEL_HASH) from error
        if self.answer is None or sha256(data) != self.answer.payload_sha256:
            raise Refusal(RefusalCode.MODEL_HASH)
        return data


class Desk:
    """The sites of one study, as far as they can be reached now.

    Attributes:
        record: the study, in the session that runs now. Nobody else keeps the session: what is asked belongs to this.
    """

    def __init__(self, registry: Registry, record: StudyRecord, identity: Identity, link: Link, clock: Clock) -> None:
        self._registry, self.record, self._identity = registry, record, identity
        self._link, self._clock = link, clock
        self._sent: dict[str, tuple[str, Call, float]] = {}
        self._seen: dict[str, float] = {}
        self._begun = clock.now()
        self._quiet: dict[str, float] = {}
        self._looked = float("-inf")
        self._node: dict[str, int] = {}
        self.roster_document: Document
        self.roster: Roster
        self.look_around()

    # ---- who is there ----------------------------------------------------------------------------------------

    def look_around(self) -> None:
        """Read the roster and who is connected; at most once a second."""
        now = self._clock.now()
        if now - self._looked < LOOK_AROUND:
            return
        self._looked = now
        self.roster_document, self.roster = self._registry.roster()
        online = {key.strip(): node for key, node in self._link.nodes().items()}
        lines = {site.name: site for site in self.roster.sites}
        self._node = {
            name: online[lines[name].node_key.strip()]
            for name in self.record.study.sites
            if name in lines and lines[name].active(self._registry.now()) and lines[name].node_key.strip() in online
        }
        self._seen |= dict.fromkeys(self._node, now)

    def online(self, site: str) -> bool:
        """Whether a site is enrolled and connected."""
        return site in self._node

    def lost(self, site: str) -> bool:
        """Whether a site has been away for longer than the grace period, which begins with us: after a crash of the
        coordinator the sites are on their way back.
        """
        return site not in self._node and self._clock.now() - self._seen.get(site, self._begun) >= GRACE

    def enrolled(self, site: str) -> bool:
        """Whether the roster names the site, neither revoked nor expired."""
        return any(line.name == site and line.active(self._registry.now()) for line in self.roster.sites)

    def renew(self) -> None:
        """Begin a new session of the study."""
        self._registry.renew_session(self.record.hash)
        self.record = self._registry.study(self.record.hash)

    # ---- requests --------------------------------------------------------------------------------------------

    def sign(
        self,
        kind: Kind,
        *,
        cohort: Collection[str],
        payload: Path | bytes,
        payload_sha256: str,
        seconds: int,
        slot: int = 0,
        round_: int = 0,
        parameters: Mapping[str, str] | None = None,
    ) -> Document:
        """A signed request of the session that runs now; the same arguments give the same bytes (Ed25519 is
        deterministic). An offer belongs to no session.
        """
        size = payload.stat().st_size if isinstance(payload, Path) else len(payload)
        header = Header(
            kind=kind,
            study=self.record.hash,
            session=0 if kind == "offer" else self.record.session,
            slot=slot,
            round=round_,
            cohort=tuple(sorted(cohort)),
            payload_sha256=payload_sha256,
            payload_bytes=size,
            deadline_seconds=seconds,
            parameters=dict(parameters or {}),
        )
        return header.signed(self._identity)

    def offer(self, seconds: int) -> Call:
        """The study and the newest roster, for a site to decide on."""
        documents = {"study": self.record.document, "roster": self.roster_document}
        payload = canonical({name: document.plain() for name, document in documents.items()})
        cohort = self.record.study.sites
        return Call.of(
            self.sign("offer", cohort=cohort, payload=payload, payload_sha256=sha256(payload), seconds=seconds),
            payload,
        )

    # ---- asking ----------------------------------------------------------------------------------------------

    def canvass(
        self,
        wanted: Callable[[], dict[str, Call]],
        hear: Callable[[Said], float],
        done: Callable[[], bool],
        seconds: float,
        obey: Callable[[], None],
    ) -> None:
        """Ask, and listen, until `done` or the time is over; then give up what is unanswered.

        Args:
            wanted: what to ask of whom now, as site -> call; who is away or being asked already is skipped.
            hear: takes what a site said, and returns how many seconds not to ask that site again.
            done: whether there is no use in going on.
            seconds: how long at most.
            obey: called about once a second; may raise to end everything.
        """
        end = self._clock.now() + seconds
        heard = float("-inf")
        self._quiet.clear()
        try:
            while not done() and (left := end - self._clock.now()) > 0:
                if self._clock.now() - heard >= LOOK_AROUND / 2:
                    heard = self._clock.now()
                    obey()
                self.look_around()
                self._ask(wanted(), left)
                if not self._sent:
                    self._clock.sleep(min(0.1, left))
                    continue
                for said in self._listen(min(HELD, left)):
                    self._quiet[said.site] = self._clock.now() + hear(said)
        finally:
            pending, self._sent = list(self._sent), {}
            self._link.drop(pending)

    def _ask(self, calls: dict[str, Call], ttl: float) -> None:
        busy, now = {site for site, _, _ in self._sent.values()}, self._clock.now()
        free = {
            self._node[site]: (site, call)
            for site, call in sorted(calls.items())
            if site in self._node and site not in busy and self._quiet.get(site, now) <= now
        }
        if free:
            requests = [Outgoing(n, call.header.kind, call.document, call.payload) for n, (_, call) in free.items()]
            lifetime = min(ttl, *(call.header.deadline_seconds for _, call in free.values()))
            for message, node in self._link.send(requests, lifetime).items():
                self._sent[message] = (*free[node], now)

    def _listen(self, wait: float) -> Iterator[Said]:
        for reply in self._link.poll(list(self._sent), wait):
            if reply.message_id in self._sent:
                site, call, since = self._sent.pop(reply.message_id)
                yield self._judge(reply, site, call, self._clock.now() - since)

    def _judge(self, reply: Reply, site: str, call: Call, seconds: float) -> Said:
        def said(answer: Answer | None, code: str = "", reason: str = "", *, lost: bool = False) -> Said:
            return Said(
                site, call, answer, reply.chunks, reply.payload_bytes, seconds, code, reason, lost, reply.document
            )

        if reply.error:
            return said(None, reason=reply.error[:200], lost=True)
        try:
            answer = Answer.verified(reply.document, self.roster.site(site).identity)
        except Refusal as refusal:
            return said(None, refusal.code.value, f"its answer was turned away: {refusal.what.lower()}")
        header = call.header
        unread = answer.study == UNREAD and answer.request == sha256(call.document) and answer.status == "refused"
        right = (header.study, header.session, header.slot, call.hash)
        if answer.site != site or (not unread and (answer.study, answer.session, answer.slot, answer.request) != right):
            return said(None, RefusalCode.MALFORMED.value, "its answer was turned away: it belongs to another request")
        if answer.status == "done" and reply.payload_bytes != answer.payload_bytes:
            return said(
                None, RefusalCode.MODEL_SHAPE.value, "its answer was turned away: bytes are missing or too many"
            )
        return said(answer, answer.code, words(answer.code) if answer.status == "refused" else "")


def words(code: str) -> str:
    """A refusal code that came over the wire, in words."""
    try:
        return REFUSALS[RefusalCode(code)][0]
    except ValueError:
        return "The site refused for a reason this release does not know"
