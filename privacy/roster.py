"""Which hospitals are in the consortium, and with which keys? The signed files of enrolment.

A coordinator hands out its `Consortium`; a site answers with its `Enrolment`; the coordinator publishes a `Roster`
whose version only goes up. The identity key says who a hospital is; the node key (an EC key, as Flower wants it)
only opens the wire and is vouched for by the identity.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, ClassVar, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError

from privacy.canonical import canonical
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.identity import Document, Identity

VALID_DAYS = 397
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,38}[a-z0-9]\Z")

KeyHex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _name(value: str) -> str:
    if not NAME.match(value):
        raise ValueError("a name is 2 to 40 small letters, digits and hyphens, such as `st-anna`")
    return value


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("an address is host:port, such as `fl.example.org:8443`")
    return value


def _node_key(value: str) -> str:
    try:
        key = serialization.load_pem_public_key(value.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError("the node key is not a public key in PEM form") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise ValueError("the node key is not on the curve P-384")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    if key.public_bytes(serialization.Encoding.PEM, form).decode() != value:
        raise ValueError("the node key is not in its one plain form")  # or one key could stand in two lines
    return value


def _timestamp(value: str) -> str:
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", value):
        raise ValueError("a time is written as 2030-01-31T12:00:00Z")
    datetime.strptime(value, "%Y-%m-%dT%H:%M:%S%z")
    return value


SiteName = Annotated[str, AfterValidator(_name)]
Address = Annotated[str, AfterValidator(_address)]
NodeKey = Annotated[str, AfterValidator(_node_key)]
Timestamp = Annotated[str, AfterValidator(_timestamp)]


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC, whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_timestamp(text: str) -> datetime:
    """The moment a `Timestamp` names."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z")


def expiry(now: datetime, days: int = VALID_DAYS) -> str:
    """When an enrolment made now ends."""
    return timestamp(now + timedelta(days=days))


class _Signed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    KIND: ClassVar[str]

    def body(self) -> dict[str, Any]:
        """The JSON body that is signed."""
        return self.model_dump(mode="json")

    @classmethod
    def of(cls, document: Document) -> Self:
        """Read a document's body.

        Raises:
            Refusal: MALFORMED.
        """
        try:
            return cls.model_validate_json(canonical(document.body), strict=True)
        except ValidationError as error:
            raise Refusal(RefusalCode.MALFORMED, document.kind) from error


class Consortium(_Signed):
    """What a site must know to join: kind "consortium", signed by the coordinator."""

    KIND: ClassVar[str] = "consortium"
    name: SiteName
    coordinator: KeyHex
    superlink: Address
    ca: str

    def signed(self, identity: Identity) -> Document:
        """The document to hand out."""
        return Document(self.KIND, self.body()).signed_by(identity)

    @classmethod
    def verified(cls, document: Document) -> Consortium:
        """Read it; it must be signed by the key it names (whom to trust is decided by the fingerprint)."""
        consortium = cls.of(document)
        document.verify(consortium.coordinator)
        return consortium


class Enrolment(_Signed):
    """A site's keys: kind "enrolment", signed by its identity, and by `previous` when the identity changes."""

    KIND: ClassVar[str] = "enrolment"
    consortium: SiteName
    site: SiteName
    identity: KeyHex
    node_key: NodeKey
    not_after: Timestamp
    previous: KeyHex | None = None

    def signed(self, identity: Identity, previous: Identity | None = None) -> Document:
        """The document to hand in."""
        document = Document(self.KIND, self.body()).signed_by(identity)
        return document.signed_by(previous) if previous is not None else document

    @classmethod
    def verified(cls, document: Document) -> Enrolment:
        """Read it and check its signatures.

        Raises:
            Refusal: MALFORMED or BAD_SIGNATURE.
        """
        enrolment = cls.of(document)
        document.verify(enrolment.identity)
        if enrolment.previous is not None:
            document.verify(enrolment.previous)
        return enrolment


class RosterSite(BaseModel):
    """One line of the roster."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: SiteName
    identity: KeyHex
    node_key: NodeKey
    not_after: Timestamp
    revoked: bool = False

    def active(self, now: datetime) -> bool:
        """Neither revoked nor expired."""
        return not self.revoked and now < parse_timestamp(self.not_after)


class Roster(_Signed):
    """All enrolled sites: kind "roster", signed by the coordinator; `version` only goes up."""

    KIND: ClassVar[str] = "roster"
    consortium: SiteName
    version: int
    coordinator: KeyHex
    sites: tuple[RosterSite, ...]

    def site(self, name: str) -> RosterSite:
        """The line of one site.

        Raises:
            Refusal: NOT_IN_STUDY when the roster does not name it.
        """
        for site in self.sites:
            if site.name == name:
                return site
        raise Refusal(RefusalCode.NOT_IN_STUDY, name)

    def signed(self, identity: Identity) -> Document:
        """The document to publish."""
        return Document(self.KIND, self.body()).signed_by(identity)

    @classmethod
    def verified(cls, document: Document, coordinator: str) -> Roster:
        """Read it; it must be signed by the pinned coordinator.

        Raises:
            Refusal: MALFORMED, BAD_SIGNATURE or WRONG_COORDINATOR.
        """
        roster = cls.of(document)
        if roster.coordinator != coordinator:
            raise Refusal(RefusalCode.WRONG_COORDINATOR)
        document.verify(coordinator)
        return roster


def enrol(roster: Roster, enrolment: Enrolment, now: datetime) -> Roster:
    """The roster with one site added, or its keys renewed.

    A new site is added; a known one may change its node key and expiry under the same identity, or its identity
    when the old one signed too. A revoked site comes back only under a new identity.

    Raises:
        ConsiliumError: the file belongs to another consortium, is expired, or would replace somebody's keys.
    """
    if enrolment.consortium != roster.consortium:
        raise ConsiliumError(
            "The enrolment is for another consortium",
            enrolment.consortium,
            f"This one is `{roster.consortium}`.",
        )
    if parse_timestamp(enrolment.not_after) <= now:
        raise ConsiliumError(
            "The enrolment has expired", enrolment.site, "At the site: `consilium-site enrol --renew`."
        )
    others = [site for site in roster.sites if site.name != enrolment.site]
    known = next((site for site in roster.sites if site.name == enrolment.site), None)
    for other in others:
        if enrolment.identity == other.identity or enrolment.node_key == other.node_key:
            raise ConsiliumError(
                "Another site has the same key",
                f"{enrolment.site} and {other.name}",
                "Each site makes its own keys.",
            )
    if known is not None and known.identity not in (enrolment.identity, enrolment.previous):
        raise ConsiliumError(
            "Another key is enrolled under this name",
            enrolment.site,
            "A renewal is signed with the old key too. If that is lost, revoke the site and choose a new name.",
        )
    if known is not None and known.revoked:
        raise ConsiliumError(
            "The site was revoked",
            enrolment.site,
            "A revoked name does not come back: enrol it under a new name.",
        )
    line = RosterSite(
        name=enrolment.site,
        identity=enrolment.identity,
        node_key=enrolment.node_key,
        not_after=enrolment.not_after,
    )
    sites = tuple(sorted([*others, line], key=lambda site: site.name))
    return roster.model_copy(update={"version": roster.version + 1, "sites": sites})


def revoke(roster: Roster, name: str) -> Roster:
    """The roster with one site revoked.

    Raises:
        ConsiliumError: no such site.
    """
    if all(site.name != name for site in roster.sites):
        known = ", ".join(site.name for site in roster.sites) or "none yet"
        raise ConsiliumError("No such site", name, f"Enrolled sites: {known}.")
    sites = tuple(s.model_copy(update={"revoked": True}) if s.name == name else s for s in roster.sites)
    return roster.model_copy(update={"version": roster.version + 1, "sites": sites})
