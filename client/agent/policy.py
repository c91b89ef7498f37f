"""May this request be served at all? Decisions over values; nothing here reads a file or starts work.

Everything a coordinator sends is untrusted until it has passed these questions, in this order: is it well formed and
signed by the pinned coordinator, does the site know and approve the study, is the site still enrolled, is it in the
cohort. How large a payload may be follows from the study, never from the message.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from client.agent.rows import State, StudyRow
from privacy.canonical import parse
from privacy.errors import Refusal, RefusalCode
from privacy.identity import DOCUMENT_LIMIT, Document
from privacy.messages import PROTOCOL, Header, Kind, Request
from privacy.proposal import PROPOSAL_LIMIT
from privacy.roster import Roster
from privacy.study import KIND, Study, read_signed

OFFER_LIMIT = 8 << 20
PAGES_LIMIT = 16 << 20
HEADER_ROOM = 1 << 20

_DECIDED = {
    State.PENDING: RefusalCode.NOT_APPROVED,
    State.DECLINED: RefusalCode.DECLINED,
    State.WITHDRAWN: RefusalCode.WITHDRAWN,
}


@dataclass(frozen=True)
class Site:
    """Who we are: our name and identity key, and the coordinator's key we enrolled with."""

    name: str
    identity: str
    consortium: str
    coordinator: str


@dataclass(frozen=True)
class Sizes:
    """What a study implies.

    `trainable`: d; `state`: bytes of a whole saved state at most; `statistics`: m; `beside`: how many more vectors of
    d travel with a training request and its answer.
    """

    trainable: int
    state: int
    statistics: int
    beside: int = 0

    def received(self, kind: Kind) -> int:
        """How many numbers a request of this kind carries."""
        return self.trainable * (1 + (self.beside if kind == "train" else 0))


@dataclass(frozen=True)
class Offer:
    """A verified study with the roster that came along."""

    study: Study
    study_document: bytes
    roster: Roster
    roster_document: bytes


def read_request(document: bytes, coordinator: str) -> Request:
    """The request, if the pinned coordinator signed it.

    Raises:
        Refusal: TOO_LARGE, VERSION, MALFORMED or BAD_SIGNATURE.
    """
    body = parse(document, DOCUMENT_LIMIT).get("body")
    if isinstance(body, dict) and type(body.get("protocol")) is int and body["protocol"] != PROTOCOL:
        raise Refusal(RefusalCode.VERSION)
    return Request.decode(document, coordinator)


def read_offer(payload: bytes, header: Header, site: Site) -> Offer:
    """The study and roster of an offer's payload.

    Raises:
        Refusal: MALFORMED, BAD_SIGNATURE, WRONG_COORDINATOR, or NOT_IN_STUDY when the study does not name this site.
    """
    parts = parse(payload, OFFER_LIMIT)
    if set(parts) != {"study", "roster"}:
        raise Refusal(RefusalCode.MALFORMED)
    study_document = Document.of_plain(parts["study"], KIND)
    study = read_study(study_document, site)
    if study.hash != header.study:
        raise Refusal(RefusalCode.MALFORMED)
    roster_document = Document.of_plain(parts["roster"], Roster.KIND)
    roster = read_roster(roster_document, site)
    return Offer(study, study_document.encode(), roster, roster_document.encode())


def read_study(document: Document, site: Site) -> Study:
    """A signed study that is for this site.

    Raises:
        Refusal: BAD_SIGNATURE, MALFORMED, NOT_IN_STUDY.
    """
    study = read_signed(document, site.coordinator)
    if not study.initial.sha256:
        raise Refusal(RefusalCode.MALFORMED, KIND)
    if site.name not in study.sites:
        raise Refusal(RefusalCode.NOT_IN_STUDY, study.hash)
    return study


def read_roster(document: Document, site: Site) -> Roster:
    """A signed roster of our own consortium.

    Raises:
        Refusal: MALFORMED, BAD_SIGNATURE, WRONG_COORDINATOR.
    """
    roster = Roster.verified(document, site.coordinator)
    if roster.consortium != site.consortium:
        raise Refusal(RefusalCode.WRONG_COORDINATOR)
    return roster


def admit(
    header: Header, row: StudyRow | None, study: Study | None, roster: Roster | None, site: Site, now: datetime
) -> None:
    """Everything that must hold before a request of an approved study is looked at further.

    Raises:
        Refusal: UNKNOWN_STUDY, NOT_APPROVED, DECLINED, WITHDRAWN, SESSION_CLOSED (finished), REVOKED, NOT_IN_STUDY,
            MALFORMED for a round that the study does not have.
    """
    if row is None or study is None:
        raise Refusal(RefusalCode.UNKNOWN_STUDY, header.study)
    decided(row, allow_finished=header.kind == "deliver")
    if roster is None:
        raise Refusal(RefusalCode.NOT_IN_STUDY, site.name)
    line = roster.site(site.name)
    if line.identity != site.identity or not line.active(now):
        raise Refusal(RefusalCode.REVOKED, site.name)
    if site.name not in header.cohort or not set(header.cohort) <= set(study.sites):
        raise Refusal(RefusalCode.NOT_IN_STUDY, site.name)
    if not (1 if header.kind == "train" else 0) <= header.round <= study.rounds.count:
        raise Refusal(RefusalCode.MALFORMED, f"round {header.round}")


def decided(row: StudyRow, *, allow_finished: bool) -> None:
    """Whether the operator's decision lets the study go on.

    Raises:
        Refusal: NOT_APPROVED, DECLINED, WITHDRAWN, or SESSION_CLOSED when it is finished.
    """
    if row.state in _DECIDED:
        raise Refusal(_DECIDED[row.state], row.hash)
    if row.state is State.FINISHED and not allow_finished:
        raise Refusal(RefusalCode.SESSION_CLOSED, row.hash)


def check_size(header: Header, sizes: Sizes | None) -> None:
    """Whether the announced payload fits the study's network; `sizes` is None before there is an approved study.

    Raises:
        Refusal: TOO_LARGE or MODEL_SHAPE.
    """
    announced = header.payload_bytes
    if sizes is None:
        if announced > OFFER_LIMIT:
            raise Refusal(RefusalCode.TOO_LARGE)
        return
    if header.kind == "witness":
        if announced > PROPOSAL_LIMIT:
            raise Refusal(RefusalCode.TOO_LARGE)
        return
    expected = 4 * sizes.received(header.kind)
    if header.kind in {"train", "validate", "test"} and announced != expected:
        raise Refusal(RefusalCode.TOO_LARGE if announced > expected else RefusalCode.MODEL_SHAPE)
    if announced > max(expected, sizes.state + (PAGES_LIMIT if header.kind == "deliver" else 0)):
        raise Refusal(RefusalCode.TOO_LARGE)
