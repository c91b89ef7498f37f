"""Who set up keys together, and what did they send each other? The coordinator's half of the set-up.

Bad messages are sorted out and named here, before any site sees them; a ring is what remains.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from privacy.canonical import sha256
from privacy.errors import Refusal, RefusalCode
from privacy.identity import Document
from privacy.secagg.checks import check_keys, check_shares
from privacy.secagg.messages import Parcel, keys_digest, transcript
from privacy.secagg.plan import Plan
from privacy.secagg.states import Place

Bad = dict[str, Refusal]


def place_of(plan: Plan, session: int, first_slot: int, last_slot: int, roster: Mapping[str, str]) -> Place:
    """The coordinator's own place in a session.

    Raises:
        Refusal: SLOT_LIMIT, SLOT_SESSION, RING when the roster lacks a site of the study.
    """
    plan.check_slots(first_slot, last_slot)
    pinned = {name: roster[name] for name in plan.sites if name in roster}
    if len(set(pinned.values())) != len(plan.sites):
        raise Refusal(RefusalCode.RING)
    return Place(plan, session, first_slot, last_slot, "", pinned)


def accept_keys(place: Place, documents: Mapping[str, Document]) -> tuple[dict[str, Document], Bad]:
    """The good `Keys`, to be sent to all of their sites, and what is wrong with the others.

    Raises:
        Refusal: RING when too few are good.
    """
    good: dict[str, Document] = {}
    bad: Bad = {}
    for name in sorted(documents):
        try:
            _known(place, name)
            check_keys(place, name, documents[name])
            good[name] = documents[name]
        except Refusal as refusal:
            bad[name] = refusal
    place.plan.check_group(tuple(good), place.plan.sites, RefusalCode.RING)
    return good, bad


def accept_shares(
    place: Place,
    keys: Mapping[str, Document],
    documents: Mapping[str, Document],
    parcels: Mapping[str, Mapping[str, bytes]],
) -> tuple[Ring, Bad]:
    """The ring of all sites whose `Shares` and parcels are good, and what is wrong with the others.

    Args:
        keys: what `accept_keys` gave.
        documents: the signed `Shares`, by site.
        parcels: by sender, then by recipient.

    Raises:
        Refusal: RING when too few are good.
    """
    good: dict[str, Document] = {}
    bad: Bad = {}
    everyone = keys_digest(keys)
    for name in sorted(documents):
        try:
            _known(place, name)
            if name not in keys:
                raise Refusal(RefusalCode.OUT_OF_ORDER, name)
            message = check_shares(place, name, documents[name], keys, everyone)
            sent = parcels.get(name, {})
            for recipient, expected in message.parcels.items():
                data = sent.get(recipient, b"")
                Parcel.decode(data, place.slots, own=recipient == name)
                if sha256(data) != expected:
                    raise Refusal(RefusalCode.PEER_SHARES, name)
            good[name] = documents[name]
        except Refusal as refusal:
            bad[name] = refusal
    place.plan.check_group(tuple(good), place.plan.sites, RefusalCode.RING)
    return Ring(place, dict(keys), good, {name: dict(parcels[name]) for name in good}), bad


@dataclass(frozen=True)
class Ring:
    """Sites that set up keys together, with all that they said. It holds nothing secret, and lasts as bytes.

    Attributes:
        place: plan, session, slots, roster.
        keys: the signed `Keys` of every site that brought them.
        shares: the signed `Shares`, by site; these sites are the ring.
        parcels: by sender, then by recipient.
    """

    place: Place
    keys: Mapping[str, Document]
    shares: Mapping[str, Document]
    parcels: Mapping[str, Mapping[str, bytes]]

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Sorted."""
        return tuple(sorted(self.shares))

    @cached_property
    def transcript(self) -> str:
        """64 hex digits; they belong into the header of every request of the session."""
        return transcript(self.keys, self.shares)

    def bundles(self, recipient: str) -> dict[str, bytes]:
        """What the others of the ring sent to one of them, by sender."""
        return {name: self.parcels[name][recipient] for name in self.sites if name != recipient}

    def parcel(self, dealer: str, holder: str) -> Parcel:
        """A parcel, read."""
        return Parcel.decode(self.parcels[dealer][holder], self.place.slots, own=dealer == holder)

    def to_bytes(self) -> bytes:
        """For the coordinator's registry."""
        value = {
            "place": self.place.body(),
            "keys": [b64encode(document.encode()).decode() for _, document in sorted(self.keys.items())],
            "shares": [b64encode(document.encode()).decode() for _, document in sorted(self.shares.items())],
            "parcels": {
                name: {to: b64encode(data).decode() for to, data in sorted(sent.items())}
                for name, sent in sorted(self.parcels.items())
            },
        }
        return json.dumps(value).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Ring:
        """Back from `to_bytes`."""
        value = json.loads(data)

        def documents(name: str, kind: str) -> dict[str, Document]:
            found = [Document.decode(b64decode(item), kind) for item in value[name]]
            return {document.body["site"]: document for document in found}

        return cls(
            Place.from_body(value["place"]),
            documents("keys", "secagg-keys"),
            documents("shares", "secagg-shares"),
            {name: {to: b64decode(item) for to, item in sent.items()} for name, sent in value["parcels"].items()},
        )


def _known(place: Place, name: str) -> None:
    if name not in place.roster:
        raise Refusal(RefusalCode.NOT_IN_STUDY, name)
