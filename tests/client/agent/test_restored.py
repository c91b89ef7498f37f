"""RULES S3: records put back from before a study was known give no budget back, not even to another study."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from privacy.errors import Refusal, RefusalCode
from tests.client.agent.bed import Bed
from tests.client.agent.private_kit import allow, granted, private_bed
from tests.client.agent.test_purse import doubt

RECORDS = ("agent.db", "agent.db-wal", "agent.db-shm")


@pytest.fixture
def spent(tmp_path: Path) -> Bed:
    """A noised round has left; its records are those of before the study was offered."""
    bed, saved = private_bed(tmp_path / "site"), tmp_path / "saved"
    saved.mkdir()
    bed.start()
    bed.connect_data()
    bed.stop()
    copied = [Path(shutil.copy2(bed.home.agent / name, saved)) for name in RECORDS if (bed.home.agent / name).exists()]
    granted(bed)
    bed.fetch(bed.call("train", bed.vector, slot=1))
    bed.stop()
    for name in RECORDS:
        (bed.home.agent / name).unlink(missing_ok=True)
    for path in copied:
        shutil.copy2(path, bed.home.agent)
    return bed


def test_S3_records_of_before_a_study_was_known_are_noticed_by_the_journal(spent: Bed) -> None:
    agent = spent.start()
    assert "restored from a backup" in agent.purse.trouble()
    spent.stop()
    agent = spent.start()
    assert "restored" in agent.purse.trouble(), "a restart settles nothing"
    spent.approve()
    with pytest.raises(Refusal) as refused:
        agent.purse.granted(spent.study)
    assert refused.value.code is RefusalCode.LEDGER
    spent.stop()


def test_S3_what_the_lost_records_knew_of_stays_closed_after_the_officers_word(spent: Bed) -> None:
    agent = spent.start()
    with pytest.raises(Exception, match="closed in this site's ledger"):
        allow(spent, settles=doubt(agent.purse))
    assert agent.purse.trouble() == "", "the officer's allowance settles the doubt"
    spent.stop()
    assert spent.start().purse.trouble() == "", "for good"
    spent.stop()
