"""Patients under pseudonyms, each on one side of a split that looks at that patient alone (RULES N5)."""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.imaging import Cohort, Membership, Split, pseudonym
from client.imaging.cohort import members
from privacy.errors import ConsiliumError

KEY = b"0123456789abcdef"
PATIENTS = st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=40)
SPLITS = st.tuples(st.integers(0, 49), st.integers(0, 50)).map(
    lambda v: Split.of({"validation": v[0] / 100, "test": v[1] / 100})
)


def _cohort(patients, membership, labels=None) -> Cohort:
    count = len(patients)
    return Cohort(
        images=np.zeros((count, 1, 2, 2), np.float32),
        targets=np.zeros(count, np.int64) if labels is None else np.array(labels, np.int64),
        patients=tuple(patients),
        membership=tuple(membership),
        classes=("a", "b"),
        quarantine=(),
        scanners=Counter(),
        patient_rule="",
    )


def test_a_pseudonym_is_a_keyed_hash():
    expected = hmac.new(KEY, b"consilium/v1/pseudonym\0MRN 7", hashlib.sha256).hexdigest()
    assert pseudonym(KEY, "MRN 7") == expected
    assert pseudonym(KEY + b"x", "MRN 7") != expected
    with pytest.raises(ValueError, match="at least 16"):
        pseudonym(b"short", "MRN 7")


@given(patients=PATIENTS, others=PATIENTS, split=SPLITS)
def test_n5_a_patients_side_does_not_depend_on_who_else_is_there(patients, others, split):
    alone = {name: split.side(KEY, name) for name in patients}
    together = members(KEY, [*others, *reversed(patients)], [None] * (len(others) + len(patients)), split)
    assert dict(zip([*others, *reversed(patients)], together, strict=True)).items() >= alone.items()


@given(patients=PATIENTS, split=SPLITS)
def test_no_patient_is_on_two_sides(patients, split):
    names = [pseudonym(KEY, patient) for patient in patients * 3]
    cohort = _cohort(names, members(KEY, names, [None] * len(names), split))
    sides = [set(cohort.groups(side)) for side in Membership]
    assert sum(len(side) for side in sides) == len(set(names))
    assert sum(len(cohort.indices(side)) for side in Membership) == len(cohort)


def test_a_torn_patient_cannot_be_built():
    with pytest.raises(ValueError, match="two sides"):
        _cohort(["p", "p"], [Membership.TRAIN, Membership.TEST])


@given(name=st.text(max_size=20), fractions=st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 19)))
def test_a_larger_test_share_only_adds_test_patients(name, fractions):
    validation, test, more = fractions
    first = Split.of({"validation": validation / 100, "test": test / 100}).side(KEY, name)
    second = Split.of({"validation": validation / 100, "test": (test + more) / 100}).side(KEY, name)
    assert first is not Membership.TEST or second is Membership.TEST


def test_shares_are_what_the_study_asks_for():
    split = Split.of({"validation": "0.15", "test": 0.2})
    count = Counter(split.side(KEY, pseudonym(KEY, str(i))) for i in range(20_000))
    assert count[Membership.TEST] / 20_000 == pytest.approx(0.2, abs=0.012)
    assert count[Membership.VALIDATION] / 20_000 == pytest.approx(0.15, abs=0.012)


def test_another_site_key_splits_anew():
    split = Split.of({"test": 0.5})
    sides = [[split.side(key, str(i)) for i in range(200)] for key in (KEY, KEY[::-1])]
    assert sides[0] != sides[1]


@pytest.mark.parametrize(
    "spec", [{"test": 1}, {"validation": 0.5, "test": 0.5}, {"test": -0.1}, {"test": "many"}, {"test": "nan"}]
)
def test_a_split_that_leaves_nobody_is_refused(spec):
    with pytest.raises(ConsiliumError, match="sum to less than 1"):
        Split.of(spec)


def test_groups_and_summary():
    sides = [Membership.TRAIN] * 3 + [Membership.TEST]
    cohort = _cohort(["p", "q", "p", "r"], sides, labels=[0, 1, 0, 1])
    assert {name: rows.tolist() for name, rows in cohort.groups("train").items()} == {"p": [0, 2], "q": [1]}
    summary = cohort.summary()
    assert summary["split"]["train"] == {"images": 3, "patients": 2, "classes": {"a": 2, "b": 1}}
    assert summary["split"]["test"] == {"images": 1, "patients": 1, "classes": {"a": 0, "b": 1}}
    assert (summary["images"], summary["patients"]) == (4, 3)
