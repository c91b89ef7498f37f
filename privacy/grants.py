"""What has a hospital's privacy officer allowed? An allowance for a patient's lifetime, and a grant for each study.

Both are signed by the officer's own identity, which the site has pinned: neither the coordinator nor the operator can
write one. Serials only go up, so that an old paper never comes back; a grant serves one study once (RULES B6).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from privacy.accounting import Tier, events
from privacy.budget import Lifetime
from privacy.canonical import canonical
from privacy.claims import epsilon_rdp, rounded
from privacy.entries import Hex, Positive
from privacy.errors import Refusal, RefusalCode
from privacy.identity import Document, Identity
from privacy.roster import SiteName, Timestamp, parse_timestamp
from privacy.study import Study

DOUBT = r"^([0-9a-f]{16})?$"
Serial = Annotated[int, Field(ge=1, le=2**31 - 1)]


class _Paper(BaseModel):
    """A paper that an officer signs, for one site, under a serial of its kind."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    KIND: ClassVar[str]
    site: SiteName
    serial: Serial
    delta: Positive

    def body(self) -> dict[str, Any]:
        """The JSON body that is signed."""
        return self.model_dump(mode="json")

    def signed(self, identity: Identity) -> Document:
        """The document to hand to the site."""
        return Document(self.KIND, self.body()).signed_by(identity)

    @classmethod
    def of(cls, document: Document) -> Self:
        """Read a body, which must be written the one way there is; signatures are not looked at.

        Raises:
            Refusal: MALFORMED.
        """
        try:
            paper = cls.model_validate_json(canonical(document.body), strict=True)
        except ValidationError as error:
            raise Refusal(RefusalCode.MALFORMED, document.kind) from error
        if document.kind != cls.KIND or canonical(paper.body()) != canonical(document.body):
            raise Refusal(RefusalCode.MALFORMED, document.kind)
        return paper

    @classmethod
    def verified(cls, document: Document, officer: str) -> Self:
        """Read it; it must be signed by the pinned officer.

        Raises:
            Refusal: MALFORMED or BAD_SIGNATURE.
        """
        paper = cls.of(document)
        document.verify(officer)
        return paper


class Allowance(_Paper):
    """The lifetime budget of every patient at one site: kind "allowance".

    `settles` is the code under which the site doubts its ledger, drawn when it noticed that its records were restored:
    no paper signed before can name it. Empty, and then not in the body, in every other allowance.
    """

    KIND: ClassVar[str] = "allowance"
    epsilon: Positive
    order: int
    settles: Annotated[str, Field(pattern=DOUBT)] = ""

    def body(self) -> dict[str, Any]:
        """The JSON body that is signed."""
        return {name: value for name, value in super().body().items() if name != "settles" or value}

    @model_validator(mode="after")
    def _leaves_room(self) -> Self:
        if Decimal(self.delta) >= 1:
            raise ValueError("delta promises nothing from 1 upwards")
        _ = self.lifetime
        return self

    @property
    def lifetime(self) -> Lifetime:
        """The budget itself."""
        return Lifetime(self.epsilon, self.delta, self.order)


class Grant(_Paper):
    """Leave for one study, by its hash, at one site: kind "grant" (RULES B6).

    `slots` is T_max; `epsilon` the most that the plan may claim against everyone who sees aggregates, at a δ of at most
    `delta`; `cap` the same against one who breaks secure aggregation wholly; `expires`, until when the study may begin.
    """

    KIND: ClassVar[str] = "grant"
    study: Hex
    slots: Annotated[int, Field(ge=1, le=2**31 - 1)]
    epsilon: Positive
    cap: Positive
    expires: Timestamp

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if Decimal(self.cap) < Decimal(self.epsilon):
            raise ValueError("cap is below epsilon; without secure aggregation nobody sees less")
        if Decimal(self.delta) >= 1:
            raise ValueError("delta promises nothing from 1 upwards")
        return self

    def expired(self, now: datetime) -> bool:
        """Whether a study may not begin on it any more."""
        return now >= parse_timestamp(self.expires)


@dataclass(frozen=True)
class Claims:
    """What a study asks for: its hash, T_max, its own δ, and ε in both tiers, decimals rounded up."""

    study: str
    slots: int
    delta: Decimal
    epsilon: Decimal
    cap: Decimal

    @classmethod
    def of(cls, study: Study) -> Claims:
        """Computed from the plan alone: the ε that binds (RULES B4) of the role that is promised least.

        Raises:
            ConsiliumError: the study has no noise.
        """
        delta = study.privacy.delta

        def worst(tier: Tier) -> Decimal:
            return max(Decimal(rounded(epsilon_rdp(event, delta))) for event in events(study, tier).values())

        return cls(study.hash, study.slots, Decimal(delta), worst(1), worst(2))


def shortfalls(grant: Grant, claims: Claims) -> list[str]:
    """Where a plan asks for more than was granted, or for something else; nothing when the grant covers it."""
    found = []
    if claims.study != grant.study:
        found.append("the grant names another study")
    if claims.slots != grant.slots:
        found.append(f"the study has {claims.slots} slots and the grant names {grant.slots}")
    for words, asked, given in (
        ("epsilon", claims.epsilon, grant.epsilon),
        ("the cap (epsilon if secure aggregation is broken)", claims.cap, grant.cap),
        ("delta", claims.delta, grant.delta),
    ):
        if asked > Decimal(given):
            found.append(f"{words} is {asked:f} and {given} is granted")
    return found


def read(data: bytes, officer: str) -> tuple[Allowance | Grant, Document]:
    """An allowance or a grant from a file.

    Raises:
        Refusal: TOO_LARGE, MALFORMED (neither of the two), or BAD_SIGNATURE.
    """
    for paper in (Allowance, Grant):
        try:
            document = Document.decode(data, paper.KIND)
        except Refusal as refusal:
            if refusal.code is RefusalCode.TOO_LARGE:
                raise
            continue
        return paper.verified(document, officer), document
    raise Refusal(RefusalCode.MALFORMED)
