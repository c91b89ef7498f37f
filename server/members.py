"""Which hospitals take part now, and what must each be told before it can be asked to compute?

A site needs the study with the newest roster (an offer), and an open session (RULES S7). The initial weights travel
only to a site that says it needs them. What a site decided is believed when its approval is signed by its own key.
"""

from __future__ import annotations

from privacy.canonical import sha256
from privacy.errors import Refusal, RefusalCode
from privacy.identity import Document
from privacy.study import APPROVAL, read_approval
from server.desk import Call, Desk, Said
from server.registry import Registry

PREPARE_SECONDS = 3600
DECISIONS = frozenset({"pending", "approved", "declined", "withdrawn"})
UNDONE = {
    RefusalCode.UNKNOWN_STUDY: "",
    RefusalCode.NOT_APPROVED: "pending",
    RefusalCode.DECLINED: "declined",
    RefusalCode.WITHDRAWN: "withdrawn",
}


LEDGER_SAYS_NO = frozenset(
    {
        RefusalCode.NO_GRANT,
        RefusalCode.GRANT_REVOKED,
        RefusalCode.GRANT_SPENT,
        RefusalCode.BUDGET_SPENT,
        RefusalCode.LEDGER,
    }
)
"""Refusals that stand until people at the site have done something. To ask on would cost the others' patients a charge
for each slot, and lead to nothing."""


class Members:
    """The sites of one study and where each stands with this session.

    Attributes:
        decisions: what each site has decided.
        grants: site → digest of its officer's grant, of those that opened a session of a study with noise.
        reserved: the sites for which the consortium's log has reserved the plan; None where no noise is asked for.
        stopped: site → code, of those whose own ledger has said no since then; until this process ends.
    """

    def __init__(self, registry: Registry, desk: Desk) -> None:
        self._registry, self._desk = registry, desk
        self._informed: dict[str, str] = {}
        self._opened: set[str] = set()
        self._needs: set[str] = set()
        self._offer: tuple[int, Call] | None = None
        self._opens: dict[bool, Call] = {}
        self.decisions = {line.site: line.state for line in registry.approvals(desk.record.hash)}
        self.grants: dict[str, str] = {}
        self.reserved: frozenset[str] | None = None
        self.stopped: dict[str, str] = {}

    def approved(self) -> set[str]:
        """Sites that said yes and are enrolled, and for which the plan is reserved where that is needed."""
        return {
            site
            for site, state in self.decisions.items()
            if state == "approved" and self._desk.enrolled(site) and (self.reserved is None or site in self.reserved)
        }

    def ready(self) -> set[str]:
        """Those of them that are connected."""
        return {site for site in self.approved() if self._desk.online(site)}

    def askable(self) -> set[str]:
        """The approved sites that a slot may be asked of."""
        return self.approved() - set(self.stopped)

    def guests(self) -> dict[str, Call]:
        """The offer, for every site that has not said yes."""
        return {site: self.offer() for site in self._desk.record.study.sites if self.decisions[site] != "approved"}

    def preparation(self, site: str) -> Call | None:
        """What a site must be told next before it can be asked to compute; None when nothing is missing."""
        if self._informed.get(site) != self.offer().hash:
            return self.offer()
        if site not in self._opened:
            return self._open(site in self._needs)
        return None

    def offer(self) -> Call:
        """The study with the newest roster."""
        version = self._desk.roster.version
        if self._offer is None or self._offer[0] != version:
            self._offer = (version, self._desk.offer(PREPARE_SECONDS))
        return self._offer[1]

    def hear(self, said: Said) -> str:
        """Take the answer to an offer or an open; returns "" or the code of what stands in the way."""
        if said.lost or said.answer is None:
            return said.code
        if said.answer.status == "refused":
            self.undo(said.site, said.answer.code)
            return said.answer.code
        if said.call.header.kind == "offer":
            return self._decided(said)
        if said.answer.detail.get("initial") == "needed":
            if said.call.header.payload_bytes:
                return RefusalCode.INTERNAL.value
            self._needs.add(said.site)
            return ""
        self._opened.add(said.site)
        if grant := said.answer.detail.get("grant", ""):
            self.grants[said.site] = grant
        return ""

    def undo(self, site: str, code: str) -> None:
        """A refusal shows that what we believed of a site no longer holds."""
        if code == RefusalCode.SESSION_UNKNOWN:
            self._opened.discard(site)
        if code in {RefusalCode.NOT_IN_STUDY, RefusalCode.REVOKED, *UNDONE}:
            self._informed.pop(site, None)
        if code in UNDONE:
            self._decide(site, UNDONE[RefusalCode(code)])
        if code in LEDGER_SAYS_NO and self.reserved is not None:
            self.stopped[site] = code

    def begin(self) -> None:
        """A new session: nobody has opened it yet."""
        self._opened.clear()
        self._opens.clear()

    def suppose_open(self) -> None:
        """Take every site for open and informed until it says otherwise: the study is done but for the delivery."""
        self._opened = set(self._desk.record.study.sites)
        self._informed = dict.fromkeys(self._opened, self.offer().hash)

    def _decided(self, said: Said) -> str:
        assert said.answer is not None
        state, document = said.answer.detail.get("state", ""), b""
        state = "approved" if state == "finished" else state
        if state not in DECISIONS:
            return RefusalCode.MALFORMED.value
        if state == "approved":
            try:
                approval = Document.decode(bytes.fromhex(said.answer.detail.get("approval", "")), APPROVAL)
                approval.verify(self._desk.roster.site(said.site).identity)
                body = read_approval(approval)
            except ValueError:
                return RefusalCode.MALFORMED.value
            except Refusal as refusal:
                return refusal.code.value
            if (body["study"], body["site"]) != (self._desk.record.hash, said.site):
                return RefusalCode.BAD_SIGNATURE.value
            document = approval.encode()
        self._decide(said.site, state, document)
        self._informed[said.site] = said.call.hash
        codes = {state: code.value for code, state in UNDONE.items()}
        return codes.get(state, "")

    def _decide(self, site: str, state: str, document: bytes = b"") -> None:
        self.decisions[site] = state
        self._registry.set_approval(self._desk.record.hash, site, state, document)

    def _open(self, whole: bool) -> Call:
        if whole not in self._opens:
            payload = self._registry.blobs.path(self._desk.record.initial) if whole else b""
            document = self._desk.sign(
                "open",
                cohort=self._desk.record.study.sites,
                payload=payload,
                payload_sha256=self._desk.record.initial if whole else sha256(b""),
                seconds=PREPARE_SECONDS,
            )
            self._opens[whole] = Call.of(document, payload)
        return self._opens[whole]
