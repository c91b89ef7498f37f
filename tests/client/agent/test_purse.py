"""RULES B1 to B7 in the hospital's own ledger: who is charged, when, how often, and what no crash can undo."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from client.agent.purse import Purse
from client.agent.rows import SECURE_TABLES, TABLES, State
from client.agent.store import Store
from privacy import budget
from privacy.accounting import Role
from privacy.charge import Charge
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.identity import Identity
from privacy.patient import EVALUATION_TRIES
from privacy.roster import timestamp
from privacy.study import Study
from tests.privacy.grant_kit import NOW, SITE, allowance, grant, study

ROOT = Path(__file__).resolve().parents[3]
KEY = b"k" * 32
WARD: dict[str, Role] = {"ada": "train", "bob": "train", "cyd": "validation", "dan": "test"}


@dataclass
class Site:
    """A site's records on disk, and its officer."""

    path: Path
    officer: Identity = field(default_factory=Identity.generate)
    clock: list[datetime] = field(default_factory=lambda: [NOW])
    store: Store = field(init=False)
    purse: Purse = field(init=False)
    serial: int = 0

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        self.store = Store(self.path, lambda: self.clock[0])
        self.purse = self.store.purse(SITE)
        self.purse.verify_whole(KEY)

    def restart(self) -> None:
        self.store.close()
        self.open()

    def allow(self, **changes: Any) -> str:
        return self.purse.take(allowance(self.officer, **changes))[1]

    def grant(self, granted: Study, **changes: Any) -> bytes:
        self.serial += 1
        paper = grant(self.officer, granted, **{"serial": self.serial, **changes})
        self.purse.take(paper)
        return paper

    def approve(self, known: Study) -> None:
        """The study in the agent's records, signed by somebody."""
        document = known.document().signed_by(Identity.generate()).encode()
        self.store.add_study(known.hash, known.study.name, document)
        self.store.decide(known.hash, State.APPROVED, "archive")

    def histories(self) -> dict[str, tuple[int, ...]]:
        rows = self.store._db.execute(
            "SELECT pseudonym, vector FROM patients t JOIN histories h ON h.id = t.history"
        ).fetchall()
        return {name: tuple(int(n) for n in vector.strip("[]").split(",")) for name, vector in rows}

    def begin(self, begun: Study, members: dict[str, Role] | None = None) -> None:
        self.grant(begun)
        self.purse.reserve(begun, WARD if members is None else members)

    def charge(self, charged: Study, slot: int, kind: str = "train", round_: int = 1, request: str = "") -> Charge:
        return self.purse.charge(charged, slot, kind, round_, request or f"{slot:064d}")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A trusted officer who has written an allowance."""
    made = Site(tmp_path / "agent.db")
    made.purse.trust(made.officer.public)
    made.allow()
    yield made
    made.store.close()


def doubt(purse: Purse) -> str:
    """The code that the site shows of a doubt about restored records."""
    found = re.search(r"restored from a backup.*--settle ([0-9a-f]{16})`", purse.trouble())
    assert found is not None, purse.trouble()
    return found[1]


def refused(code: RefusalCode) -> Any:
    return pytest.raises(Refusal, match=code_words(code))


def code_words(code: RefusalCode) -> str:
    return Refusal(code).what


# ---- B1: charge everyone -------------------------------------------------------------------------------------


def test_B1_the_whole_plan_is_reserved_for_every_patient_before_the_first_slot(site: Site) -> None:
    tiny = study()
    site.begin(tiny)
    assert site.purse.eligible(tiny.hash) == WARD
    whole = {role: part.whole for role, part in budget.plan(tiny).items()}
    assert site.histories() == {name: whole[role] for name, role in WARD.items()}


def test_B1_slots_change_no_history_whether_used_or_not(site: Site) -> None:
    tiny = study()
    site.begin(tiny)
    before = site.histories()
    site.charge(tiny, 1)
    site.charge(tiny, 2, round_=2)
    assert site.histories() == before


def test_B1_the_cohort_is_frozen(site: Site) -> None:
    """Who appears later is not in; who is gone from the disk stays in and charged; a role never changes."""
    tiny = study()
    site.begin(tiny)
    before = site.histories()
    site.purse.reserve(tiny, {"ada": "test", "new": "train"})
    site.restart()
    site.purse.reserve(tiny, {})
    assert site.purse.eligible(tiny.hash) == WARD
    assert site.histories() == before


def test_B1_a_spent_patient_is_left_out_silently(site: Site) -> None:
    """Studies go on until the trained patients have no room for the next; then they are out, and nothing says so."""
    lifetime, cost = budget.Lifetime("8", "0.000001", 4), budget.plan(study(noise="0.8"))["train"].whole
    begun = 0
    while budget.fits(site.histories().get("ada", budget.NOTHING), cost, lifetime):
        site.begin(study(f"study-{begun}", noise="0.8"))
        begun += 1
    assert begun > 1, "the case shows nothing"
    before, last = site.histories(), study("last", noise="0.8")
    site.begin(last, {**WARD, "new": "train"})
    assert site.purse.eligible(last.hash) == {"cyd": "validation", "dan": "test", "new": "train"}
    assert {name: site.histories()[name] for name in ("ada", "bob")} == {name: before[name] for name in ("ada", "bob")}
    assert site.charge(last, 1).fresh, "no refusal, no word (RULES N4)"


def test_B1_a_site_whose_patients_are_all_out_is_charged_like_any_other(site: Site) -> None:
    tiny = study()
    site.begin(tiny, {})
    assert site.purse.eligible(tiny.hash) == {}
    assert site.charge(tiny, 1).fresh


def test_B1_another_key_of_pseudonyms_fails_closed(site: Site) -> None:
    tiny = study()
    site.begin(tiny)
    with refused(RefusalCode.LEDGER):
        site.purse.verify_whole(b"x" * 32)
    with refused(RefusalCode.LEDGER):
        site.charge(tiny, 1)
    assert "pseudonym" in site.purse.trouble()
    site.purse.verify_whole(KEY)
    assert site.charge(tiny, 1).fresh


@pytest.mark.parametrize(
    "loss",
    [
        "DELETE FROM members WHERE role = 'test'",
        "DELETE FROM patients WHERE pseudonym = 'ada'",
        "DELETE FROM charges WHERE slot = 1",
        "UPDATE patients SET history = (SELECT id FROM histories WHERE vector LIKE '[0, %')",
        "UPDATE parts SET held = held - 1 WHERE role = 'train'",
        "DELETE FROM ledger",
    ],
)
def test_B1_a_ledger_that_lost_something_fails_closed(site: Site, loss: str) -> None:
    tiny = study()
    site.begin(tiny)
    site.charge(tiny, 1)
    site.charge(tiny, 2, round_=2)
    site.purse.verify_whole(KEY)
    site.store._db.execute("PRAGMA foreign_keys=OFF")
    assert site.store._db.execute(loss).rowcount > 0, "the case shows nothing"
    with refused(RefusalCode.LEDGER):
        site.purse.verify_whole(KEY)
    with refused(RefusalCode.LEDGER):
        site.charge(tiny, 3, round_=3)
    with refused(RefusalCode.LEDGER):
        site.purse.reserve(study("next"), WARD)


def test_B1_a_noised_answer_without_a_charge_fails_closed(site: Site) -> None:
    """The tables are there but empty, and the agent's own slots say that something noised left."""
    tiny = study()
    site.approve(tiny)
    site.store.open_session(tiny.hash, 1)
    site.store.bind(tiny.hash, 1, 1, "r", "train", tiny.slots)
    site.purse.verify_whole(KEY)
    site.store.keep_answer(tiny.hash, 1, "r", b"answer", "ab" * 32, 4)
    with refused(RefusalCode.LEDGER):
        site.purse.verify_whole(KEY)


def test_B1_until_it_was_added_up_nothing_is_charged(tmp_path: Path) -> None:
    store = Store(tmp_path / "agent.db")
    purse = store.purse(SITE)
    with refused(RefusalCode.LEDGER):
        purse.reserve(study(), WARD)
    store.close()


# ---- B2: retries and refunds ---------------------------------------------------------------------------------


def test_B2_shared_a_retry_is_a_new_slot_with_a_new_charge(site: Site) -> None:
    tiny = study()
    site.begin(tiny)
    charges = [site.charge(tiny, slot, round_=1) for slot in range(1, 7)]
    assert [c.fresh for c in charges] == [True] * 6
    assert [c.counter for c in charges] == [1, 2, 3, 4, 5, 6], "RULES B7: no gaps"
    with refused(RefusalCode.GRANT_SPENT):
        site.charge(tiny, 7, round_=1)


def test_B2_per_site_a_round_is_paid_once_and_its_retry_is_free(site: Site) -> None:
    tiny = study(mode="per-site", steps=3)
    site.begin(tiny)
    first = site.charge(tiny, 1, round_=1)
    again = site.charge(tiny, 2, round_=1)
    assert (first.fresh, first.paid) == (True, 1)
    assert (again.fresh, again.paid) == (False, 2), "nothing of the round was stored: compute again, for nothing"
    assert (first.counter, again.counter) == (1, 2), "every release is in the log"
    for slot, round_ in ((3, 2), (4, 3), (5, 4)):
        assert site.charge(tiny, slot, round_=round_).fresh
    assert not site.charge(tiny, 6, round_=4).fresh
    assert site.purse.report()["studies"][0]["roles"]["train"]["charged"] == 4 * 3
    site.purse.verify_whole(KEY)


def test_B2_per_site_what_left_can_only_be_sent_again(site: Site) -> None:
    tiny = study(mode="per-site", steps=3)
    site.approve(tiny)
    site.begin(tiny)
    site.store.open_session(tiny.hash, 1)
    site.store.bind(tiny.hash, 1, 1, "r", "train", tiny.slots, round_=1)
    site.charge(tiny, 1, round_=1)
    assert not site.purse.answered(tiny.hash, 1)
    site.store.keep_answer(tiny.hash, 1, "r", b"answer", "ab" * 32, 4)
    assert site.purse.answered(tiny.hash, 1)
    assert not site.purse.answered(tiny.hash, 2)
    again = site.charge(tiny, 2, round_=1)
    assert (again.fresh, again.paid) == (False, 1), "only what slot 1 stored may be sent again"


@pytest.mark.parametrize("kind", ["validate", "test"])
@pytest.mark.parametrize("mode", ["shared", "per-site"])
def test_B2_an_evaluation_costs_each_time_and_a_third_is_refused(site: Site, mode: str, kind: str) -> None:
    tiny = study(mode=mode)
    site.begin(tiny)
    for slot in range(1, EVALUATION_TRIES + 1):
        assert site.charge(tiny, slot, kind, 4).fresh
    with refused(RefusalCode.GRANT_SPENT):
        site.charge(tiny, EVALUATION_TRIES + 1, kind, 4)
    assert site.charge(tiny, EVALUATION_TRIES + 1).fresh, "training is counted by itself"


@pytest.mark.parametrize("committed", [True, False])
def test_B2_what_no_slot_used_is_given_back_when_the_study_is_closed(site: Site, committed: bool) -> None:
    tiny = study()
    site.begin(tiny)
    site.charge(tiny, 1)
    site.charge(tiny, 2, round_=2)
    site.charge(tiny, 3, "test", 4)
    site.purse.settle(tiny.hash, committed)
    parts = budget.plan(tiny)
    assert site.histories() == {
        "ada": parts["train"].of(2), "bob": parts["train"].of(2), "cyd": parts["validation"].of(0),
        "dan": parts["test"].of(1),
    }  # fmt: skip
    site.purse.verify_whole(KEY)
    before = site.histories()
    site.purse.settle(tiny.hash, not committed)
    assert site.histories() == before, "twice is once"
    assert site.purse.report()["studies"][0]["state"] == ("committed" if committed else "aborted")


def test_B2_a_closed_plan_never_runs_again(site: Site) -> None:
    tiny = study()
    site.begin(tiny)
    site.charge(tiny, 1)
    site.purse.settle(tiny.hash, committed=True)
    for call in (lambda: site.charge(tiny, 1), lambda: site.charge(tiny, 2), lambda: site.purse.reserve(tiny, WARD)):
        with refused(RefusalCode.GRANT_SPENT):
            call()
    with pytest.raises(ConsiliumError, match="closed in this site's ledger"):
        site.grant(tiny)


def test_B2_a_study_closed_before_it_began_never_begins(site: Site) -> None:
    tiny = study()
    site.grant(tiny)
    site.purse.settle(tiny.hash, committed=False)
    with refused(RefusalCode.GRANT_SPENT):
        site.purse.reserve(tiny, WARD)
    assert site.histories() == {}


def test_B2_refunds_of_one_study_leave_the_others_alone(site: Site) -> None:
    one, two = study("one"), study("two")
    site.begin(one)
    site.begin(two, {"ada": "test", "eve": "train"})
    site.charge(one, 1)
    site.purse.settle(one.hash, committed=False)
    parts = budget.plan(one)
    assert site.histories()["ada"] == budget.add(parts["train"].of(1), parts["test"].whole)
    assert site.histories()["eve"] == parts["train"].whole
    site.purse.verify_whole(KEY)


# ---- S3: one charge, one request -----------------------------------------------------------------------------


def test_S3_the_same_request_is_the_same_charge_after_a_restart_too(site: Site) -> None:
    tiny = study()
    site.begin(tiny)
    first = site.charge(tiny, 1)
    site.restart()
    again = site.charge(tiny, 1)
    assert (first.fresh, again.fresh) == (True, False)
    assert (again.slot, again.counter) == (first.slot, first.counter)
    assert site.purse.counter() == 1


@pytest.mark.parametrize("other", [{"request": "f" * 64}, {"round_": 2}, {"kind": "test"}])
def test_S3_another_request_for_a_charged_slot_is_refused(site: Site, other: dict[str, Any]) -> None:
    tiny = study()
    site.begin(tiny)
    site.charge(tiny, 1)
    with refused(RefusalCode.SLOT_BOUND):
        site.charge(tiny, 1, **other)
    assert site.purse.counter() == 1


@pytest.mark.parametrize("slot", [0, -1, 9])
def test_S1_no_slot_outside_the_plan_is_charged(site: Site, slot: int) -> None:
    tiny = study()
    site.begin(tiny)
    with refused(RefusalCode.SLOT_LIMIT):
        site.charge(tiny, slot)


def test_B7_one_counter_for_all_studies_of_the_site(site: Site) -> None:
    one, two = study("one"), study("two")
    site.begin(one)
    site.begin(two)
    charges = [site.charge(s, slot) for slot in (1, 2) for s in (one, two)]
    assert [c.counter for c in charges] == [1, 2, 3, 4]


# ---- B6: grants ----------------------------------------------------------------------------------------------


def test_B6_without_a_grant_nothing_is_reserved(site: Site) -> None:
    tiny = study()
    with refused(RefusalCode.NO_GRANT):
        site.purse.reserve(tiny, WARD)
    with refused(RefusalCode.NO_GRANT):
        site.charge(tiny, 1)
    assert site.histories() == {}


def test_B6_without_an_allowance_nothing_is_reserved(tmp_path: Path) -> None:
    made = Site(tmp_path / "agent.db")
    made.purse.trust(made.officer.public)
    tiny = study()
    made.grant(tiny)
    with refused(RefusalCode.NO_GRANT):
        made.purse.reserve(tiny, WARD)
    made.store.close()


@pytest.mark.parametrize(
    "changes",
    [{"study": "ab" * 32}, {"slots": 7}, {"slots": 9}, {"epsilon": "0.5"}, {"cap": "20"}, {"delta": "0.0000001"}],
)
def test_B6_a_grant_for_something_else_does_not_serve(site: Site, changes: dict[str, Any]) -> None:
    """Another study, other slots, too small an epsilon, too small a cap, too small a delta."""
    tiny = study(noise="0.5") if "cap" in changes else study()
    site.grant(tiny, **changes)
    with refused(RefusalCode.NO_GRANT):
        site.purse.reserve(tiny, WARD)


def test_B6_a_grant_for_another_site_is_not_taken(site: Site) -> None:
    with pytest.raises(ConsiliumError, match="for another hospital: st-bona"):
        site.grant(study(), site="st-bona")
    with pytest.raises(ConsiliumError, match="for another hospital"):
        site.allow(site="st-bona", serial=2)


def test_B6_an_expired_grant_is_not_taken_and_one_that_expires_begins_nothing(site: Site) -> None:
    tiny, late = study(), study("late")
    with pytest.raises(ConsiliumError, match="has expired"):
        site.grant(tiny, expires=timestamp(NOW))
    site.grant(late, expires=timestamp(NOW + timedelta(days=1)))
    site.clock[0] = NOW + timedelta(days=2)
    with refused(RefusalCode.NO_GRANT):
        site.purse.reserve(late, WARD)


def test_B6_what_began_in_time_goes_on_after_the_grants_end(site: Site) -> None:
    tiny = study()
    site.begin(tiny)
    site.clock[0] = NOW + timedelta(days=4000)
    assert site.charge(tiny, 1).fresh


def test_B6_a_grant_is_consumed_once(site: Site) -> None:
    tiny = study()
    paper = site.grant(tiny)
    assert site.purse.take(paper)[0] == "grant", "the same file twice is no harm before it is used"
    site.purse.reserve(tiny, WARD)
    with pytest.raises(ConsiliumError, match="used or revoked here before"):
        site.purse.take(paper)
    site.purse.settle(tiny.hash, committed=True)
    with pytest.raises(ConsiliumError, match="used or revoked here before"):
        site.purse.take(paper)


def test_B6_serials_only_go_up(site: Site) -> None:
    site.grant(study("one"), serial=5)
    for serial in (4, 5):
        with pytest.raises(ConsiliumError, match="newer grant that is here already"):
            site.grant(study("two"), serial=serial)
    with pytest.raises(ConsiliumError, match="newer allowance"):
        site.allow(epsilon="9")


def test_B6_another_officers_paper_is_refused(site: Site) -> None:
    stranger = Identity.generate()
    for paper in (grant(stranger, study()), allowance(stranger, serial=9)):
        with refused(RefusalCode.BAD_SIGNATURE):
            site.purse.take(paper)


def test_B6_the_officers_key_is_pinned_once(site: Site) -> None:
    stranger = Identity.generate()
    with pytest.raises(ConsiliumError, match="Another privacy officer is trusted"):
        site.purse.trust(stranger.public)
    site.purse.trust(site.officer.public)
    tiny = study()
    site.grant(tiny)
    site.purse.trust(stranger.public, replace=True)
    assert site.purse.officer() == stranger.public
    with refused(RefusalCode.NO_GRANT):
        site.purse.reserve(tiny, WARD)
    assert site.purse.take(grant(stranger, tiny))[0] == "grant", "another officer counts serials anew"
    with refused(RefusalCode.NO_GRANT):
        site.purse.reserve(tiny, WARD)
    site.purse.take(allowance(stranger))
    site.purse.reserve(tiny, WARD)


@pytest.mark.parametrize("key", ["", "ab", "AB" * 32, "zz" * 32])
def test_B6_only_a_key_is_pinned(site: Site, key: str) -> None:
    with pytest.raises(ConsiliumError, match="not an officer's key"):
        site.purse.trust(key, replace=True)


def test_B6_without_an_officer_no_paper_counts(tmp_path: Path) -> None:
    made = Site(tmp_path / "agent.db")
    with pytest.raises(ConsiliumError, match="No privacy officer is trusted"):
        made.allow()
    made.store.close()


def test_B6_a_revoked_grant_stops_the_next_charge_and_a_restart_does_not_bring_it_back(site: Site) -> None:
    tiny = study()
    site.begin(tiny)
    site.charge(tiny, 1)
    site.purse.revoke(tiny.hash)
    site.restart()
    for slot in (1, 2):
        with refused(RefusalCode.GRANT_REVOKED):
            site.charge(tiny, slot)
    with refused(RefusalCode.GRANT_REVOKED):
        site.purse.reserve(tiny, WARD)
    with pytest.raises(ConsiliumError, match="no grant that could be revoked"):
        site.purse.revoke(tiny.hash)


def test_B6_a_new_grant_lets_a_revoked_study_go_on_but_gives_no_slot_more(site: Site) -> None:
    tiny = study()
    site.begin(tiny)
    before = site.histories()
    for slot in (1, 2, 3):
        site.charge(tiny, slot)
    site.purse.revoke(tiny.hash)
    site.begin(tiny, {"new": "train"})
    assert site.histories() == before
    for slot in (4, 5, 6):
        assert site.charge(tiny, slot).fresh
    with refused(RefusalCode.GRANT_SPENT):
        site.charge(tiny, 7)


def test_B6_revoking_before_the_study_begins(site: Site) -> None:
    tiny = study()
    site.grant(tiny)
    site.purse.revoke(tiny.hash)
    with refused(RefusalCode.NO_GRANT):
        site.purse.reserve(tiny, WARD)


# ---- B3, B5: the lifetime ------------------------------------------------------------------------------------


def test_B3_the_order_is_fixed_once_somebody_was_charged(site: Site) -> None:
    site.allow(serial=2, order=5)
    site.begin(study())
    with pytest.raises(ConsiliumError, match="order of a lifetime budget cannot change"):
        site.allow(serial=3, order=4)
    assert "order 5" in site.allow(serial=3, order=5, epsilon="9")


def test_a_smaller_allowance_takes_nothing_back_and_says_whom_it_leaves_without(site: Site) -> None:
    tiny = study(noise="0.8")
    site.begin(tiny)
    before = site.histories()
    assert "2 patients have more than that reserved already" in site.allow(serial=2, epsilon="4")
    assert site.histories() == before
    assert site.charge(tiny, 1).fresh, "what was reserved stays reserved"
    assert "patients have more" not in site.allow(serial=3, epsilon="50")


@pytest.mark.parametrize("changes", [{"delta": "0.0000001"}, {"delta": "0.001"}])
def test_B5_delta_of_the_study_below_the_lifetimes_below_one_in_everybody(site: Site, changes: dict[str, str]) -> None:
    site.allow(serial=2, **changes)
    tiny = study()
    site.grant(tiny)
    with refused(RefusalCode.NO_GRANT):
        site.purse.reserve(tiny, WARD)


def test_a_study_that_nobody_could_ever_bear_is_refused_by_public_numbers_alone(site: Site) -> None:
    loud = study(noise="0.3")
    site.grant(loud, epsilon="10000", cap="10000")
    with refused(RefusalCode.BUDGET_SPENT):
        site.purse.reserve(loud, {})


# ---- S3: crashes, full disks, old copies ---------------------------------------------------------------------

VICTIM = """
import sys
from pathlib import Path
from client.agent.store import Store
from tests.client.agent.test_purse import KEY, SITE
from tests.privacy.grant_kit import study
store = Store(Path(sys.argv[1]))
purse = store.purse(SITE)
purse.verify_whole(KEY)
tiny = study()
print("ready", flush=True)
if sys.argv[2] == "reserve":
    purse.reserve(tiny, {f"{n:064x}": ("train", "validation", "test")[n % 3] for n in range(60_000)})
else:
    for slot in range(1, 7):
        purse.charge(tiny, slot, "train", slot, f"{slot:064d}")
        print(slot, flush=True)
print("done", flush=True)
"""


def victim(path: Path, what: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(path), what],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("delay", [0.02, 0.15, 0.4, 0.8])
def test_S3_kill_9_in_the_middle_of_reserving_leaves_all_or_nothing(site: Site, tmp_path: Path, delay: float) -> None:
    tiny = study()
    site.grant(tiny)
    site.store.close()
    process = victim(tmp_path / "agent.db", "reserve")
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    site.open()
    members = len(site.purse.eligible(tiny.hash))
    assert members in {0, 60_000}
    assert len(site.histories()) == members
    grants = site.purse.report()["grants"]
    assert [line["state"] for line in grants] == (["consumed"] if members else ["open"])
    site.purse.reserve(tiny, {"ada": "train"})
    assert len(site.purse.eligible(tiny.hash)) == (members or 1)


def test_S3_kill_9_in_the_middle_of_charging_loses_no_charge_that_was_made(site: Site, tmp_path: Path) -> None:
    tiny = study()
    site.begin(tiny)
    site.store.close()
    process = victim(tmp_path / "agent.db", "charge")
    assert process.stdout is not None
    made = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    made = max([made, *(int(line) for line in process.stdout.read().split() if line.isdigit())])
    site.open()
    assert site.purse.counter() >= made
    for slot in range(1, made + 1):
        assert not site.charge(tiny, slot, round_=slot).fresh


def test_S3_a_full_disk_reserves_and_charges_nothing(site: Site) -> None:
    tiny = study()
    site.grant(tiny)
    db = site.store._db
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count={pages}")
    with refused(RefusalCode.DISK_FULL):
        site.purse.reserve(tiny, {f"{n:064x}": "train" for n in range(2000)})
    assert site.purse.eligible(tiny.hash) == {}
    assert site.histories() == {}
    db.execute("PRAGMA max_page_count=1000000")
    site.purse.reserve(tiny, WARD)
    site.purse.verify_whole(KEY)
    db.execute(f"PRAGMA max_page_count={db.execute('PRAGMA page_count').fetchone()[0]}")
    slots = 0
    with refused(RefusalCode.DISK_FULL):
        for slots in range(6):
            site.charge(tiny, slots + 1, request=f"{slots}" * 60_000)
    assert site.purse.counter() == slots


def test_S3_a_database_that_another_program_holds_charges_nothing(site: Site, tmp_path: Path) -> None:
    tiny = study()
    site.begin(tiny)
    site.store._db.execute("PRAGMA busy_timeout=50")
    other = sqlite3.connect(tmp_path / "agent.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with refused(RefusalCode.BUSY):
        site.charge(tiny, 1)
    other.execute("ROLLBACK")
    other.close()
    assert site.purse.counter() == 0
    assert site.charge(tiny, 1).counter == 1


@pytest.fixture
def old_copy(site: Site, tmp_path: Path) -> tuple[Site, Study]:
    """A backup of after the first charge, restored after two more."""
    tiny = study()
    site.approve(tiny)
    site.begin(tiny)
    site.charge(tiny, 1)
    site.store.close()
    shutil.copy(tmp_path / "agent.db", tmp_path / "backup.db")
    site.open()
    site.charge(tiny, 2)
    site.charge(tiny, 3)
    site.store.close()
    shutil.copy(tmp_path / "backup.db", tmp_path / "agent.db")
    site.open()
    return site, tiny


@pytest.mark.parametrize("by", ["journal", "counter"])
def test_S3_records_older_than_what_left_count_everything_as_spent(old_copy: tuple[Site, Study], by: str) -> None:
    """By the journal's slots, or by the counter that the consortium's log holds."""
    site, tiny = old_copy
    site.purse.hold_against(tiny.hash, 1)
    site.purse.never_below(1)
    assert site.purse.trouble() == "", "as new as what left"
    before = site.histories()
    if by == "journal":
        site.purse.hold_against(tiny.hash, 3)
    else:
        site.purse.never_below(3)
    assert "restored from a backup" in site.purse.trouble()
    for call in (lambda: site.charge(tiny, 4), lambda: site.begin(study("next"))):
        with refused(RefusalCode.LEDGER):
            call()
    site.restart()
    assert "restored" in site.purse.trouble(), "a restart settles nothing"
    code = doubt(site.purse)
    for serial, other in ((2, ""), (3, "0" * 16)):
        said = site.allow(serial=serial, settles=other)
        assert f"the doubt about the ledger stays: the officer settles it with `--settle {code}`" in said
        assert doubt(site.purse) == code, "one that the officer signed before the loss settles nothing"
    assert "the doubt about the ledger is settled" in site.allow(serial=4, settles=code)
    with refused(RefusalCode.GRANT_SPENT):
        site.charge(tiny, 4)
    assert site.histories() == before, "nothing is given back"
    site.restart()
    site.purse.hold_against(tiny.hash, 3 if by == "journal" else 0)
    after = study("after")
    site.begin(after)
    assert site.charge(after, 1).counter == (4 if by == "counter" else 2)


def test_S3_a_noised_study_that_left_and_is_not_known_is_noticed(site: Site) -> None:
    tiny = study()
    site.approve(tiny)
    site.purse.hold_against(tiny.hash, 2)
    site.allow(serial=2, settles=doubt(site.purse))
    site.grant(study("other"))
    with pytest.raises(ConsiliumError, match="closed in this site's ledger"):
        site.grant(tiny)


def test_a_study_without_noise_is_none_of_the_purses_business(site: Site) -> None:
    public = study(mode="none")
    site.approve(public)
    site.purse.hold_against(public.hash, 5)
    assert site.purse.trouble() == ""
    with pytest.raises(ConsiliumError, match="no noise"):
        site.purse.reserve(public, WARD)


# ---- records and reports -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_records_of_an_older_release_get_their_ledger(tmp_path: Path, version: int) -> None:
    path = tmp_path / "agent.db"
    old = sqlite3.connect(path)
    first = TABLES.replace("round INTEGER NOT NULL DEFAULT 0, cohort TEXT NOT NULL DEFAULT '',", "")
    old.executescript(first if version == 1 else TABLES + SECURE_TABLES)
    old.execute(
        "INSERT INTO studies (hash, name, document, state, last, at) VALUES ('h', 'n', x'', 'approved', '', '')"
    )
    old.execute(f"PRAGMA user_version={version}")
    old.commit()
    old.close()
    made = Site(path)
    made.purse.trust(made.officer.public)
    made.allow()
    assert made.store.studies()[0].name == "n"
    tiny = study()
    made.begin(tiny)
    assert made.charge(tiny, 1).counter == 1
    made.store.close()


def test_reserving_for_100_000_patients_is_quick(site: Site) -> None:
    """Composed once per history: seconds of computing, whatever else the machine does."""
    ward: dict[str, Role] = {f"{n * 2654435761 % 2**256:064x}": "train" for n in range(100_000)}
    for name in ("first", "second"):
        tiny = study(name)
        site.grant(tiny)
        begun = time.process_time()
        site.purse.reserve(tiny, ward)
        assert time.process_time() - begun < 2.0
    assert len(set(site.histories().values())) == 1
    site.purse.verify_whole(KEY)


def test_the_report_adds_up_and_names_nobody(site: Site) -> None:
    tiny = study()
    site.begin(tiny)
    site.charge(tiny, 1)
    site.charge(tiny, 2, "validate", 4)
    report = site.purse.report()
    (line,) = report["studies"]
    assert line["roles"]["train"] == {**line["roles"]["train"], "reserved": 6, "charged": 1, "left": 5}
    assert line["patients"] == {"train": 2, "validation": 1, "test": 1}
    assert sum(report["lifetime"]["bins"]) == report["lifetime"]["patients"] == 4
    assert report["lifetime"]["room"]["untouched"]["free"] == 1.0
    assert 0 < report["lifetime"]["room"]["most"]["free"] < 1
    assert not any(name in str(report) for name in WARD)


def test_only_the_purse_is_asked_for_what_it_pays(site: Site) -> None:
    """A charge says what the purse wrote down: study, slot, kind, round, and nothing that a caller could choose."""
    tiny = study()
    site.begin(tiny)
    assert site.charge(tiny, 2, "validate", 4) == Charge(tiny.hash, 2, "validate", 4, paid=2, counter=1, fresh=True)
