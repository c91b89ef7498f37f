"""What do the sites of a secure sum say, by way of the coordinator? Four signed documents and one parcel of bytes.

Set-up: `Keys`, then `Shares` with one parcel for each site of the ring. In a slot: the signed answer that comes with
the masked vector (`privacy.messages.Answer`) is the submission; `Survivors` only when a site dropped; then `Opening`.
Every body is strict, signed by the site's pinned identity, and bounded in size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from privacy.canonical import canonical, digest
from privacy.entries import Hex
from privacy.errors import Refusal, RefusalCode
from privacy.identity import Document, Identity
from privacy.roster import SiteName
from privacy.secagg.keys import CIPHERTEXT_BYTES, KEM_BYTES, TAG_BYTES, info
from privacy.secagg.shamir import SHARE_BYTES
from privacy.sections import MOST_SITES

DIGEST_BYTES = 32
Number = Annotated[int, Field(ge=0, le=2**31 - 1)]
Group = Annotated[tuple[SiteName, ...], Field(min_length=1, max_length=MOST_SITES)]
ShareHex = Annotated[str, StringConstraints(pattern=rf"^[0-9a-f]{{{2 * SHARE_BYTES}}}$")]
KemHex = Annotated[str, StringConstraints(pattern=rf"^[0-9a-f]{{{2 * KEM_BYTES}}}$")]
DepositHex = Annotated[
    str, StringConstraints(pattern=rf"^([0-9a-f]{{64}}){{1,{MOST_SITES - 1}}}[0-9a-f]{{{2 * TAG_BYTES}}}$")
]


class _Signed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    KIND: ClassVar[str]
    study: Hex
    session: Number
    site: SiteName
    protocol: Literal[1] = 1

    def signed(self, identity: Identity) -> Document:
        """The document, signed."""
        return Document(self.KIND, self.model_dump(mode="json")).signed_by(identity)

    @classmethod
    def verified(cls, document: Document, key: str) -> Self:
        """Read a document signed by a site's pinned key.

        Raises:
            Refusal: MALFORMED or BAD_SIGNATURE.
        """
        try:
            if document.kind != cls.KIND:
                raise Refusal(RefusalCode.MALFORMED)
            message = cls.model_validate_json(canonical(document.body), strict=True)
            if message.model_dump(mode="json") != document.body:  # nothing left out, nothing written another way
                raise Refusal(RefusalCode.MALFORMED, cls.KIND)
        except (ValidationError, ValueError, TypeError) as error:
            raise Refusal(RefusalCode.MALFORMED, cls.KIND) from error
        document.verify(key)
        return message


class Keys(_Signed):
    """Set-up, first: a site's ephemeral public keys for the slots first_slot..last_slot."""

    KIND: ClassVar[str] = "secagg-keys"
    first_slot: Number
    last_slot: Number
    x25519: Hex
    kem: KemHex


class Shares(_Signed):
    """Set-up, second: `keys` is the digest of all signed keys, `parcels` the SHA-256 of the bytes for each site.

    The parcel under the site's own name holds digests only, and is for the coordinator.
    """

    KIND: ClassVar[str] = "secagg-shares"
    keys: Hex
    parcels: Annotated[dict[SiteName, Hex], Field(max_length=MOST_SITES)]


class Survivors(_Signed):
    """Only when a site dropped: whose vectors this site agrees to have summed in one slot; durably its one choice.

    `deposit` holds its slot seeds with those that dropped, for the case that it goes away itself: sealed under a key
    that comes to light with its self-mask seed, and so only when the set is opened.
    """

    KIND: ClassVar[str] = "secagg-survivors"
    slot: Number
    header: Hex
    survivors: Group
    deposit: DepositHex


class Opening(_Signed):
    """What opens one slot: a share of each survivor's self-mask seed, and the pair's slot seed of each that dropped."""

    KIND: ClassVar[str] = "secagg-opening"
    slot: Number
    header: Hex
    survivors: Group
    shares: Annotated[dict[SiteName, ShareHex], Field(max_length=MOST_SITES)]
    seeds: Annotated[dict[SiteName, Hex], Field(max_length=MOST_SITES)]


@dataclass(frozen=True)
class Choice:
    """What a site must have stored before it signs or opens: one set of survivors for one slot, for ever (RULES S4).

    Attributes:
        slot: the slot.
        header: hash of the request that the slot is bound to.
        survivors: the set, sorted.
        released: whether shares and seeds may have left for it.
    """

    slot: int
    header: str
    survivors: tuple[str, ...]
    released: bool = False

    def body(self) -> dict[str, Any]:
        """As JSON, for the site's store."""
        return {
            "slot": self.slot,
            "header": self.header,
            "survivors": list(self.survivors),
            "released": self.released,
        }

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Choice:
        """Back from `body`."""
        return cls(body["slot"], body["header"], tuple(body["survivors"]), body["released"])


@dataclass(frozen=True)
class Parcel:
    """The bytes of one site for another, for all slots of a session.

    Attributes:
        ciphertext: ML-KEM-768, 1088 bytes; empty in the parcel under the sender's own name.
        digests: of the recipient's share, 32 bytes a slot, so that the coordinator can tell a wrong share.
        sealed: the recipient's shares, 33 bytes a slot, under the transport key. Under the sender's own name: digests
            of the seeds themselves, 32 bytes a slot, so that the coordinator can tell a wrong dealer.
    """

    ciphertext: bytes
    digests: bytes
    sealed: bytes

    def encode(self) -> bytes:
        """The bytes that travel."""
        return self.ciphertext + self.digests + self.sealed

    @classmethod
    def decode(cls, data: bytes, slots: int, *, own: bool) -> Parcel:
        """Read a parcel for `slots` slots.

        Raises:
            Refusal: PEER_SHARES for another length.
        """
        first = 0 if own else CIPHERTEXT_BYTES
        second = first + DIGEST_BYTES * slots
        if len(data) != second + (DIGEST_BYTES * slots if own else SHARE_BYTES * slots + TAG_BYTES):
            raise Refusal(RefusalCode.PEER_SHARES)
        return cls(data[:first], data[first:second], data[second:])

    def digest_of(self, index: int) -> bytes:
        """The share's digest for the session's slot number `index`, from 0."""
        return self.digests[DIGEST_BYTES * index : DIGEST_BYTES * (index + 1)]

    def seed_digest_of(self, index: int) -> bytes:
        """The seed's digest; only in the parcel under the sender's own name."""
        return self.sealed[DIGEST_BYTES * index : DIGEST_BYTES * (index + 1)]


def share_digest(dealer: str, holder: str, slot: int, share: bytes) -> bytes:
    """Commits a dealer to one holder's share; the share's 256 bits of chance hide it."""
    return hashlib.sha256(
        info("share-digest", dealer.encode(), holder.encode(), slot.to_bytes(4, "big"), share)
    ).digest()


def seed_digest(dealer: str, slot: int, seed: bytes) -> bytes:
    """Commits a dealer to one self-mask seed."""
    return hashlib.sha256(info("seed-digest", dealer.encode(), slot.to_bytes(4, "big"), seed)).digest()


def keys_digest(keys: Mapping[str, Document]) -> str:
    """64 hex digits over all signed keys, sorted by site."""
    return digest("secagg/keys", _digests(keys))


def transcript(keys: Mapping[str, Document], shares: Mapping[str, Document]) -> str:
    """64 hex digits over every signed document of the set-up, sorted by site: a ring has them in common."""
    return digest("secagg/transcript", {"keys": _digests(keys), "shares": _digests(shares)})


def binding(study: str, session: int, ring: str, slot: int, header: str, cohort: tuple[str, ...]) -> bytes:
    """32 bytes that every mask of a slot hangs on (RULES S5): study, session, transcript, slot, request, cohort."""
    body = {
        "study": study, "session": session, "transcript": ring, "slot": slot, "header": header, "cohort": list(cohort),
    }  # fmt: skip
    return bytes.fromhex(digest("secagg/binding", body))


def _digests(documents: Mapping[str, Document]) -> list[list[str]]:
    return [[site, documents[site].digest] for site in sorted(documents)]
