"""How does the coordinator add masked vectors and open the sum? One `SecureSum` for each slot.

It holds no secret of its own. What it checks here protects the result and names whoever spoilt it; what protects the
hospitals is checked at the hospitals.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from privacy.errors import Refusal, RefusalCode
from privacy.identity import Document
from privacy.secagg import masks, shamir
from privacy.secagg.checks import check_opening, check_submission, check_survivor
from privacy.secagg.fixed import Opened, Words, decode
from privacy.secagg.keys import SEED_BYTES, about_deposit, deposit_key, self_mask_key, unseal
from privacy.secagg.messages import Opening, binding, seed_digest, share_digest
from privacy.secagg.ring import Bad, Ring


class SecureSum:
    """One slot's sum: vectors are added as they arrive, then opened once. Memory: one vector."""

    def __init__(self, ring: Ring, slot: int, header: str, cohort: Sequence[str], numbers: int) -> None:
        """Start at zero.

        Args:
            header: hash of the request, 64 hex digits.
            cohort: sorted sites of the ring that were asked.
            numbers: d + m, or m without an update.

        Raises:
            Refusal: SLOT_SESSION, COHORT, MODEL_SHAPE.
        """
        self.ring, self.slot, self.header = ring, slot, header
        self._index = ring.place.index(slot)
        self.cohort = ring.place.plan.check_group(cohort, ring.sites, RefusalCode.COHORT)
        self._total: Words = np.zeros(ring.place.plan.length(numbers), np.uint32)
        self.submissions: dict[str, Document] = {}
        self.closed = False
        self._opened: Opened | None = None

    @property
    def present(self) -> tuple[str, ...]:
        """Whose vectors are in the sum, sorted."""
        return tuple(sorted(self.submissions))

    @property
    def complete(self) -> bool:
        """Whether nobody is missing; then `submissions` is the proof that the sites ask for."""
        return self.present == self.cohort

    def add(self, name: str, document: Document, vector: Words, digest: str | None = None) -> None:
        """Take one site's masked vector.

        Args:
            document: its signed answer.
            vector: uint32; not kept.
            digest: SHA-256 of the vector's little-endian bytes, when the caller has taken it while receiving them.

        Raises:
            Refusal: LATE once the sum is closed, COHORT for a site not asked or twice, MODEL_SHAPE, MODEL_HASH, or as
                `check_submission`; then nothing has changed.
        """
        if self.closed:
            raise Refusal(RefusalCode.LATE, name)
        if name not in self.cohort or name in self.submissions:
            raise Refusal(RefusalCode.COHORT, name)
        answer = check_submission(self.ring.place, self.slot, self.header, name, document)
        if len(vector) != len(self._total) or answer.payload_bytes != 4 * len(vector):
            raise Refusal(RefusalCode.MODEL_SHAPE, name)
        if (digest or hashlib.sha256(vector.astype("<u4", copy=False).data).hexdigest()) != answer.payload_sha256:
            raise Refusal(RefusalCode.MODEL_HASH, name)
        np.add(self._total, vector, out=self._total)
        self.submissions[name] = document

    def close(self) -> tuple[str, ...]:
        """No more vectors: the set that the sites are asked to sign, or to open at once when it is the cohort.

        Raises:
            Refusal: TOO_FEW below n_min; the slot is lost.
        """
        self.closed = True
        try:
            return self.ring.place.plan.check_group(self.present, self.cohort, RefusalCode.SURVIVORS)
        except Refusal as refusal:
            raise Refusal(RefusalCode.TOO_FEW) from refusal

    def accept_survivors(self, documents: Mapping[str, Document]) -> tuple[dict[str, Document], Bad]:
        """The good signatures over the closed set, which are the proof, and what is wrong with the others.

        Raises:
            Refusal: TOO_FEW below w.
        """
        survivors = self.close()
        good: dict[str, Document] = {}
        bad: Bad = {}
        for name in sorted(documents):
            try:
                if name not in survivors:
                    raise Refusal(RefusalCode.SURVIVORS, name)
                check_survivor(self.ring.place, self.slot, self.header, survivors, name, documents[name])
                good[name] = documents[name]
            except Refusal as refusal:
                bad[name] = refusal
        if len(good) < self.ring.place.plan.threshold:
            raise Refusal(RefusalCode.TOO_FEW)
        return good, bad

    def open(
        self, documents: Mapping[str, Document], agreed: Mapping[str, Document] | None = None
    ) -> tuple[Opened, Bad]:
        """The exact sum of the closed set, and what is wrong with the openings that were left out.

        Args:
            documents: signed `Opening` of w survivors.
            agreed: when somebody dropped, the good signed `Survivors`. Each survivor alone knows its pair's seed with
                the one that dropped: it must have signed (its deposit has it) or open.

        Raises:
            Refusal: TOO_FEW, or OPENING naming a dealer whose seed is not what it promised; more openings may still
                come after either, because nothing has changed.
        """
        place, survivors = self.ring.place, self.close()
        good: dict[str, Opening] = {}
        bad: Bad = {}
        for name in sorted(documents):
            try:
                if name not in survivors:
                    raise Refusal(RefusalCode.SURVIVORS, name)
                good[name] = self._opening(name, documents[name], survivors)
            except Refusal as refusal:
                bad[name] = refusal
        if self._opened is not None:
            return self._opened, bad
        if len(good) < place.plan.threshold:
            raise Refusal(RefusalCode.TOO_FEW)
        add, subtract = self._keys(good, survivors, agreed or {})
        masks.apply(self._total, add, subtract)
        self._opened = decode(place.plan, self._total, len(survivors))
        return self._opened, bad

    def _opening(self, name: str, document: Document, survivors: tuple[str, ...]) -> Opening:
        place = self.ring.place
        message = check_opening(place, self.slot, self.header, self.cohort, survivors, name, document)
        for dealer, share in message.shares.items():
            expected = self.ring.parcel(dealer, name).digest_of(self._index)
            if share_digest(dealer, name, self.slot, bytes.fromhex(share)) != expected:
                raise Refusal(RefusalCode.OPENING, name)
        return message

    def _keys(
        self, openings: Mapping[str, Opening], survivors: tuple[str, ...], agreed: Mapping[str, Document]
    ) -> tuple[list[bytes], list[bytes]]:
        """Keystream keys to add and to subtract, so that what the sites put on comes off."""
        place = self.ring.place
        plan = place.plan
        bound = binding(plan.study, place.session, self.ring.transcript, self.slot, self.header, self.cohort)
        add: list[bytes] = []
        subtract: list[bytes] = []
        holders = sorted(openings)[: plan.threshold]
        for dealer in survivors:
            shares = {plan.position(name): bytes.fromhex(openings[name].shares[dealer]) for name in holders}
            seed = _combined(shares, dealer)
            if seed_digest(dealer, self.slot, seed) != self.ring.parcel(dealer, dealer).seed_digest_of(self._index):
                raise Refusal(RefusalCode.OPENING, dealer)
            subtract.append(self_mask_key(seed, bound))
            if self.complete:
                continue
            if dealer in openings:
                pairs = {dropped: bytes.fromhex(found) for dropped, found in openings[dealer].seeds.items()}
            else:
                pairs = self._deposited(dealer, deposit_key(seed, bound, survivors), agreed)
            for dropped, pair in pairs.items():
                (subtract if dealer < dropped else add).append(pair)
        return add, subtract

    def _deposited(self, name: str, key: bytes, agreed: Mapping[str, Document]) -> dict[str, bytes]:
        """The slot seeds that a survivor which went away left behind with its signature.

        Raises:
            Refusal: TOO_FEW when it left none that can be read; it may still come back and open.
        """
        dropped = [site for site in self.cohort if site not in self.submissions]
        try:
            place, survivors = self.ring.place, self.present
            check_survivor(place, self.slot, self.header, survivors, name, agreed[name])
            data = unseal(key, bytes.fromhex(agreed[name].body["deposit"]), about_deposit(place.context, name))
        except (KeyError, Refusal) as error:
            raise Refusal(RefusalCode.TOO_FEW, name) from error
        if len(data) != SEED_BYTES * len(dropped):
            raise Refusal(RefusalCode.TOO_FEW, name)
        return {site: data[SEED_BYTES * at : SEED_BYTES * (at + 1)] for at, site in enumerate(dropped)}


def _combined(shares: Mapping[int, bytes], dealer: str) -> bytes:
    try:
        return shamir.combine(shares)
    except Refusal as refusal:
        raise Refusal(RefusalCode.OPENING, dealer) from refusal
