"""What do coordinator and agent say to each other? Requests and answers, bound to one slot and signed.

A request's hash covers every byte the coordinator supplied: the header by its canonical form, the payload by its
SHA-256 inside the header (RULES S2, S5). An answer names the hash of the request it answers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from privacy.canonical import canonical
from privacy.entries import Hex
from privacy.errors import Refusal, RefusalCode
from privacy.identity import Document, Identity
from privacy.roster import SiteName

PROTOCOL = 2
PAYLOAD_LIMIT = 4 << 30
SLOTTED = frozenset({"train", "validate", "test"})
SETTING_UP = frozenset({"keys", "shares", "seal"})
"""The exchanges before a session's first masked slot (RULES S6)."""
OPENING = frozenset({"survivors", "unmask"})
"""What may follow the answers of a masked slot (RULES S4)."""

Kind = Literal[
    "offer", "open", "keys", "shares", "seal", "train", "validate", "test", "survivors", "unmask", "witness", "deliver"
]
Size = Annotated[int, Field(ge=0, le=PAYLOAD_LIMIT)]
Vector = npt.NDArray[np.float32]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def body(self) -> dict[str, Any]:
        """The JSON body that is signed."""
        return self.model_dump(mode="json")

    @classmethod
    def read(cls, body: dict[str, Any]) -> Self:
        """Check a body, which writes every field out.

        Raises:
            Refusal: MALFORMED.
        """
        try:
            data = canonical(body)
            message = cls.model_validate_json(data, strict=True)
            if canonical(message.body()) != data:  # one message, one spelling: no default is filled in
                raise Refusal(RefusalCode.MALFORMED)
        except (ValidationError, ValueError, TypeError) as error:
            raise Refusal(RefusalCode.MALFORMED) from error
        return message


class Header(_Body):
    """Everything of a request but its payload.

    `slot` is 1..T_max for a computation and for the stages that open its masked sum, and 0 for everything else;
    `round` is the round the model belongs to; `cohort` is sorted; `deadline_seconds` runs from the agent's receipt.
    """

    protocol: Literal[2] = 2
    kind: Kind
    study: Hex
    session: int = Field(ge=0, le=2**31 - 1)
    slot: int = Field(ge=0, le=2**31 - 1)
    round: int = Field(ge=0, le=2**31 - 1)
    cohort: tuple[SiteName, ...]
    payload_sha256: Hex
    payload_bytes: Size
    deadline_seconds: int = Field(ge=1, le=604_800)
    parameters: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if tuple(sorted(set(self.cohort))) != self.cohort:
            raise ValueError("the cohort is not sorted or names a site twice")
        if (self.kind in SLOTTED | OPENING) != (self.slot > 0):
            raise ValueError("slots number computations and what opens their sums, and only those")
        return self

    def signed(self, identity: Identity) -> Document:
        """The request document."""
        return Document("request", self.body()).signed_by(identity)


class Request:
    """A signed header that a site received."""

    def __init__(self, document: Document, header: Header) -> None:
        self.document, self.header, self.hash = document, header, document.digest

    @classmethod
    def decode(cls, data: bytes, coordinator: str | None) -> Request:
        """Read a request; `coordinator` is the pinned key it must be signed with (None: checked by the caller).

        Raises:
            Refusal: MALFORMED, TOO_LARGE or BAD_SIGNATURE.
        """
        document = Document.decode(data, "request")
        header = Header.read(document.body)
        if coordinator is not None:
            document.verify(coordinator)
        return cls(document, header)


class Answer(_Body):
    """What a site says of one request. `statistics` counts the last numbers of the payload; the rest is the update.

    In a study with secure aggregation the numbers are masked words of four bytes, and this signed statement, which
    names the request's hash and the payload's, is what the other sites see of it before they help to open the sum.
    """

    protocol: Literal[2] = 2
    study: Hex
    session: int = Field(ge=0, le=2**31 - 1)
    slot: int = Field(ge=0, le=2**31 - 1)
    site: SiteName
    request: Hex
    status: Literal["done", "refused"]
    code: str = Field(default="", max_length=40)
    payload_sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    payload_bytes: Size = 0
    statistics: int = Field(default=0, ge=0, le=1 << 24)
    detail: dict[str, str] = Field(default_factory=dict)

    def signed(self, identity: Identity) -> Document:
        """The answer document."""
        return Document("answer", self.body()).signed_by(identity)

    @classmethod
    def verified(cls, data: bytes, site_key: str) -> Answer:
        """Read an answer signed by a site's pinned key.

        Raises:
            Refusal: MALFORMED, TOO_LARGE or BAD_SIGNATURE.
        """
        document = Document.decode(data, "answer")
        answer = cls.read(document.body)
        document.verify(site_key)
        return answer


def refused(header: Header, request: str, site: str, code: RefusalCode, about: str = "") -> Answer:
    """The answer that says no; `about` names another site of the study whose message was the reason."""
    return Answer(
        detail={"about": about} if about else {},
        study=header.study,
        session=header.session,
        slot=header.slot,
        site=site,
        request=request,
        status="refused",
        code=code.value,
    )


def encode_vector(*parts: npt.NDArray[Any]) -> Vector:
    """One flat little-endian float32 vector from update and statistics, in that order.

    Raises:
        Refusal: NON_FINITE.
    """
    vector = np.concatenate([np.asarray(part, dtype="<f4").ravel() for part in parts])
    if not all_finite(vector):
        raise Refusal(RefusalCode.NON_FINITE)
    return vector


def decode_vector(data: bytes | bytearray | memoryview | npt.NDArray[np.uint8], size: int) -> Vector:
    """A read-only view of `size` float32 numbers.

    Raises:
        Refusal: MODEL_SHAPE for another length, NON_FINITE for anything not a number.
    """
    if len(data) != 4 * size:
        raise Refusal(RefusalCode.MODEL_SHAPE)
    vector = np.frombuffer(data, dtype="<f4")
    if not all_finite(vector):
        raise Refusal(RefusalCode.NON_FINITE)
    return vector


def all_finite(vector: Vector) -> bool:
    """Whether every number is finite, in blocks so that no mask of the whole vector is made."""
    block = 1 << 20
    return all(bool(np.isfinite(vector[i : i + block]).all()) for i in range(0, len(vector), block))
