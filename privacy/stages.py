"""How do the parts of a secure sum travel? What lies in the payloads before and after the masked vectors.

Each payload is one canonical JSON object: signed documents by the name of their site, and parcels (base64) by the name
of the other site. Nothing is believed here; who signed what is for the protocol to check.

| stage | what the request brings | what the answer adds |
|---|---|---|
| keys | `first` and `last` slot, in the header's parameters | `keys`, a signed document |
| shares | the `keys` of all who sent theirs | `shares`, a signed document; as payload a parcel for each of them |
| seal | the `shares` of the ring, and its parcels for this site | `transcript`, the hash of it all |
| survivors | the header's cohort: those who are to be summed | `survivors`, a signed document |
| unmask | the same cohort, and as `proof` either the answers of all, or `survivors` of enough | `opening`, signed |
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from privacy.canonical import canonical, parse
from privacy.errors import Refusal, RefusalCode
from privacy.identity import Document

TRANSCRIPT = "transcript"
FIRST, LAST = "first", "last"
SITE_ROOM = 64 << 10
SLOT_ROOM = 128


def room(sites: int, slots: int) -> int:
    """The most bytes a stage's payload may have, by the signed study: its sites, and slots in a session."""
    return sites * (SITE_ROOM + SLOT_ROOM * slots)


@dataclass(frozen=True)
class Enclosure:
    """A payload in parts: `documents` by what they are and then by site, `parcels` by the other site's name."""

    documents: Mapping[str, Mapping[str, Document]] = field(default_factory=dict)
    parcels: Mapping[str, bytes] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Canonical bytes."""
        parts: dict[str, Any] = {
            name: {site: document.plain() for site, document in found.items()} for name, found in self.documents.items()
        }
        if self.parcels:
            parts["parcels"] = {site: base64.b64encode(data).decode() for site, data in self.parcels.items()}
        return canonical(parts)

    @classmethod
    def decode(cls, data: bytes, limit: int, kinds: Mapping[str, str], *, parcels: bool = False) -> Enclosure:
        """Read a payload that must hold exactly these parts.

        Args:
            kinds: part -> kind of its documents.
            parcels: whether parcels belong to it.

        Raises:
            Refusal: MALFORMED or TOO_LARGE.
        """
        parts = parse(data, limit)
        if set(parts) != {*kinds, *({"parcels"} if parcels else ())} or not all(
            isinstance(part, dict) for part in parts.values()
        ):
            raise Refusal(RefusalCode.MALFORMED)
        sealed = parts.pop("parcels", {})
        return cls(
            {
                name: {site: Document.of_plain(value, kinds[name]) for site, value in part.items()}
                for name, part in parts.items()
            },
            {site: _binary(text) for site, text in sealed.items()},
        )


def _binary(text: object) -> bytes:
    try:
        if not isinstance(text, str):
            raise Refusal(RefusalCode.MALFORMED)
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(RefusalCode.MALFORMED) from error
    if base64.b64encode(data).decode() != text:
        raise Refusal(RefusalCode.MALFORMED)
    return data
