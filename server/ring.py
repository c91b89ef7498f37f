"""Who can be summed together? Sets up the keys of a session: three exchanges, after which the sites share a ring.

A ring serves the slots of one session. A new one is set up, under a new session number that ends the old one's keys at
the sites for good (RULES S7), when the next slot is not covered, when a site is there that has no keys, or when one
says that it has lost them. Who does not come through an exchange is not in the ring; the others go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from privacy.canonical import sha256
from privacy.errors import Refusal, RefusalCode
from privacy.identity import Document
from privacy.messages import Kind
from privacy.secagg.checks import check_keys, check_shares
from privacy.secagg.messages import Keys, Shares
from privacy.secagg.plan import Plan
from privacy.secagg.ring import Ring, accept_shares, place_of
from privacy.secagg.states import Place
from privacy.stages import FIRST, LAST, TRANSCRIPT, Enclosure, room
from server.attempt import Attempt
from server.desk import Call, Desk, Said
from server.members import Members
from server.records import Outcome, OutcomeState
from server.registry import Registry
from server.ring_records import RingRecord

MOST_RENEWALS = 3
"""How often one site may cause new keys by saying that it has none, until this process ends."""
KEYLESS = frozenset({RefusalCode.OUT_OF_ORDER, RefusalCode.SLOT_SESSION, RefusalCode.RING})
BROKEN = frozenset({OutcomeState.REFUSED, OutcomeState.LATE})


class Rings:
    """The keys of one study's secure sums.

    `found` is the ring of its session, once one stands; `problem` says why the last set-up came to nothing.
    """

    def __init__(
        self,
        registry: Registry,
        desk: Desk,
        members: Members,
        renew: Callable[[], None],
        plan: Plan,
        obey: Callable[[], None],
    ) -> None:
        """Take up the ring of the study's session, if one stands.

        Args:
            renew: begins a new session.
            obey: called about once a second; may raise to end everything.
        """
        self._registry, self._desk, self._members = registry, desk, members
        self._renew, self._plan, self._obey = renew, plan, obey
        self._records = registry.rings(desk.record.hash)
        self.found = self._records.ring(desk.record.session)
        self._left_out: set[str] = set()
        self._blamed: set[str] = set()
        self._stale = False
        self._renewals: Counter[str] = Counter()
        self.problem = ""

    @property
    def transcript(self) -> str:
        """What every request of a masked slot names: the hash of all that the ring's members signed."""
        assert self.found is not None
        return self.found.ring.transcript

    def cohort(self, slot: int) -> tuple[str, ...]:
        """The sites that the next slot can ask, after setting up keys where that is needed; () when too few have them.

        Args:
            slot: its number.
        """
        if not self._serves(slot):
            self._set_up(slot)
        usable = self._usable()
        return tuple(sorted(usable)) if len(usable) >= self._plan.minimum else ()

    def lost_keys(self, codes: Mapping[str, str]) -> None:
        """Take note of refusals, by site: some say that a site has no keys for what it was asked."""
        for site, code in codes.items():
            if code in KEYLESS and self._renewals[site] < MOST_RENEWALS:
                self._renewals[site] += 1
                self._stale = True

    def _serves(self, slot: int) -> bool:
        if self.found is None or self._stale or self.found.session != self._desk.record.session:
            return False
        place = self.found.ring.place
        newcomers = self._there() - set(self.found.members) - self._left_out
        covered = place.first_slot <= slot <= place.last_slot
        return covered and not newcomers and len(self._usable()) >= self._plan.minimum

    def _usable(self) -> set[str]:
        members = set(self.found.members) if self.found else set()
        return {site for site in self._members.askable() & members if not self._desk.lost(site)}

    def _there(self) -> set[str]:
        """The sites that keys can be set up with now."""
        return self._members.ready() & self._members.askable() - self._blamed

    # ---- the three exchanges ---------------------------------------------------------------------------------

    def _set_up(self, slot: int) -> None:
        self.found, self._stale, self._left_out = None, False, set()
        if self._records.begun(self._desk.record.session):
            self._renew()
        last = min(slot + self._plan.session_slots - 1, self._plan.slots)
        self._records.begin(self._desk.record.session, slot, last)
        identities = {line.name: line.identity for line in self._desk.roster.sites}
        try:
            place = place_of(self._plan, self._desk.record.session, slot, last, identities)
            keys = self._keys(place)
            ring = self._shares(place, keys)
            members = self._seal(ring)
        except Refusal as refusal:
            self.problem = f"no keys for secure sums: {refusal.what.lower()} ({refusal.subject})"
            self._registry.note(self._desk.record.hash, "waiting", self.problem)
            return
        self.problem = ""
        self.found = RingRecord(self._desk.record.session, members, ring)
        self._records.ready(self.found)

    def _keys(self, place: Place) -> dict[str, Document]:
        there, found = self._there(), dict[str, Document]()

        def take(said: Said) -> None:
            document = said.statement("keys", Keys.KIND)
            check_keys(place, said.site, document)
            found[said.site] = document

        range_ = {FIRST: str(place.first_slot), LAST: str(place.last_slot)}
        self._exchange(dict.fromkeys(sorted(there), self._call("keys", there, parameters=range_)), take)
        return found

    def _shares(self, place: Place, keys: Mapping[str, Document]) -> Ring:
        found, parcels = dict[str, Document](), dict[str, Mapping[str, bytes]]()
        limit = room(len(self._plan.sites), self._plan.session_slots)

        def take(said: Said) -> None:
            document = said.statement("shares", Shares.KIND)
            check_shares(place, said.site, document, keys)
            parcels[said.site] = Enclosure.decode(said.payload(limit), limit, {}, parcels=True).parcels
            found[said.site] = document

        call = self._call("shares", keys, Enclosure({"keys": keys}))
        self._exchange(dict.fromkeys(sorted(keys), call), take)
        ring, bad = accept_shares(place, keys, found, parcels)
        self._left_out |= set(bad)
        return ring

    def _seal(self, ring: Ring) -> tuple[str, ...]:
        sealed = set[str]()

        def take(said: Said) -> None:
            assert said.answer is not None
            if said.answer.detail.get(TRANSCRIPT) != ring.transcript:
                raise Refusal(RefusalCode.RING, said.site)
            sealed.add(said.site)

        calls = {
            site: self._call("seal", ring.sites, Enclosure({"shares": ring.shares}, ring.bundles(site)))
            for site in ring.sites
        }
        self._exchange(calls, take)
        return tuple(sorted(sealed))

    def _exchange(self, calls: Mapping[str, Call], take: Callable[[Said], None]) -> None:
        """One exchange.

        Raises:
            Refusal: RING when too few sites came through it; the subject says who did not, and why. PEER_SHARES when
                one is blamed by more than may collude.
        """
        outcomes: dict[str, Outcome] = {}
        attempt = Attempt(
            self._members, self._desk, calls, take, self._plan.minimum, lambda o: outcomes.update({o.site: o})
        )
        attempt.run(self._desk.record.study.rounds.deadline_seconds, self._obey)
        self._left_out |= {site for site, outcome in outcomes.items() if outcome.state in BROKEN}
        self._blame({site: outcome.about for site, outcome in outcomes.items() if outcome.about not in {"", site}})
        if len(attempt.taken) < self._plan.minimum:
            raise Refusal(RefusalCode.RING, attempt.summary())

    def _blame(self, accusers: Mapping[str, str]) -> None:
        """Leave out, until this process ends, whoever more sites blame than may be colluding; keys are set up again."""
        for site, count in Counter(accusers.values()).items():
            if count > self._plan.colluding and site in self._plan.sites:
                self._blamed.add(site)
                text = f"{site} is left out of secure sums: {count} sites cannot use what it sent them"
                self._registry.note(self._desk.record.hash, "blamed", text, site)
                raise Refusal(RefusalCode.PEER_SHARES, site)

    def _call(
        self,
        kind: Kind,
        cohort: Iterable[str],
        enclosed: Enclosure | None = None,
        parameters: Mapping[str, str] | None = None,
    ) -> Call:
        payload = enclosed.encode() if enclosed else b""
        document = self._desk.sign(
            kind,
            cohort=tuple(cohort),
            payload=payload,
            payload_sha256=sha256(payload),
            seconds=self._desk.record.study.rounds.deadline_seconds,
            parameters=parameters,
        )
        return Call.of(document, payload)
