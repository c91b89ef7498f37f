"""A noised request that comes again after the site refused it as late: the same charge, one release, or nothing."""

from __future__ import annotations

import pytest

from client.agent.work import Work
from privacy.errors import Refusal, RefusalCode
from privacy.mechanisms import Mechanism
from tests.client.agent.bed import Bed
from tests.client.agent.private_kit import charges, journal, rows


@pytest.fixture
def bed(granted_bed: Bed) -> Bed:
    return granted_bed


class Clock:
    """Lets a work be late at its n-th question whether to go on, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self.late_at = 0, 0
        real = Work.check

        def check(work: Work) -> None:
            real(work)
            self.asked += 1
            if self.asked == self.late_at:
                raise Refusal(RefusalCode.LATE, str(work.slot))

        monkeypatch.setattr(Work, "check", check)

    def late(self, at: int) -> None:
        self.asked, self.late_at = 0, at


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def numbers(bed: Bed) -> list[object]:
    """Of everything that left: ranges of noised vectors."""
    return [line for line in journal(bed) if "vector" in str(line["what"])]


@pytest.mark.parametrize("moment", ["first", "middle", "last"])
def test_S2_S3_late_and_asked_again_is_one_charge_and_one_release(bed: Bed, clock: Clock, moment: str) -> None:
    assert bed.call("train", bed.vector, slot=1).status == "done"
    clock.late(0)
    assert bed.call("train", bed.vector, slot=2, round=2).status == "done"
    assert clock.asked >= 4, "before and between the steps of a round, and before it is kept"
    clock.late({"first": 1, "middle": clock.asked // 2, "last": clock.asked}[moment])
    assert bed.call("train", bed.vector, slot=3, round=3).code == "late"
    assert rows(bed, "SELECT state, sha256 FROM slots WHERE slot = 3") == [("bound", "")]
    assert numbers(bed) == [], "nothing left"
    charged = charges(bed)[2:]
    assert len(charged) == (moment != "first"), "the charge comes before the computation"
    assert bed.call("train", bed.vector, slot=3, round=3, deadline_seconds=9).code == "slot-bound", "another request"
    done = bed.call("train", bed.vector, slot=3, round=3)
    assert done.status == "done"
    assert charges(bed)[2:] == (charged or [(3, "train", 3, 2, 3, 3)]), "the same charge, and no second one"
    assert bed.call("train", bed.vector, slot=3, round=3) == done, "the same stored answer from then on"
    assert len(charges(bed)) == 3


def test_S2_late_again_and_again_never_charges_again(bed: Bed, clock: Clock) -> None:
    for at in (6, 5, 4, 6, 5):
        clock.late(at)
        assert bed.call("train", bed.vector, slot=1).code == "late"
    clock.late(0)
    assert bed.call("train", bed.vector, slot=1).status == "done"
    assert len(charges(bed)) == 1


def test_B2_per_site_what_was_kept_before_it_was_late_is_sent_and_nothing_is_noised_anew(
    bed: Bed, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bed.call("train", bed.vector, slot=1).status == "done"
    clock.late(0)
    assert bed.call("train", bed.vector, slot=2, round=2).status == "done"
    clock.late(clock.asked)
    assert bed.call("train", bed.vector, slot=3, round=3).code == "late"
    noised: list[object] = []
    real = Mechanism.release
    monkeypatch.setattr(Mechanism, "release", lambda *parts: noised.append(parts) or real(*parts))
    assert bed.call("train", bed.vector, slot=3, round=3).status == "done"
    assert noised == []


def test_S2_a_late_slot_that_the_coordinator_has_passed_over_is_never_served(bed: Bed, clock: Clock) -> None:
    clock.late(6)
    assert bed.call("train", bed.vector, slot=1).code == "late"
    assert bed.call("train", bed.vector, slot=2).status == "done"
    assert bed.call("train", bed.vector, slot=1).code == "slot-spent"
    assert [row[0] for row in charges(bed)] == [1, 2]


def test_S3_after_another_start_the_late_request_finds_its_charge(bed: Bed, clock: Clock) -> None:
    clock.late(6)
    assert bed.call("train", bed.vector, slot=1).code == "late"
    charged = charges(bed)
    bed.stop()
    bed.start()
    assert bed.call("train", bed.vector, slot=1).status == "done"
    assert charges(bed) == charged
    assert len(charged) == 1
