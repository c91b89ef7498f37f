"""No damaged file comes out of the readers as anything but a picture or a reason."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.imaging import pool
from tests.client.imaging import fuzzing

SECONDS = float(os.environ.get("CONSILIUM_FUZZ_SECONDS", "600"))
BLOCK = 2000


def test_the_corpus_itself_is_good():
    """Otherwise nothing but the first check would be tried."""
    kinds = Counter(ending for ending, _ in fuzzing.corpus())
    assert set(kinds) == {".dcm", ".nii", ".nii.gz", ".png", ".jpg", ".npz"}


@settings(max_examples=2000, deadline=None)
@given(seed=st.integers(0, 2**48))
def test_a_damaged_file_is_read_or_has_a_reason(seed):
    outcome = fuzzing.one(seed)
    assert not outcome.startswith(("ESCAPED", "SLOW")), outcome


@pytest.mark.long
def test_ten_minutes_of_damaged_files():
    """In two processes of their own: a decoder that dies counts as a reason, as it does in an agent. The number of
    seconds can be given as CONSILIUM_FUZZ_SECONDS."""
    end, outcomes = time.monotonic() + SECONDS, Counter[str]()
    for block in itertools.count():
        seeds = range(10**15 + block * BLOCK, 10**15 + (block + 1) * BLOCK)
        outcomes.update(pool.each(fuzzing.one, seeds, lambda seed: f"decoder-crashed, seed {seed}", 2, 50))
        if time.monotonic() > end:
            break
    print(dict(outcomes.most_common()))
    bad = [outcome for outcome in outcomes if outcome.startswith(("ESCAPED", "SLOW"))]
    assert not bad
    assert outcomes["read"] > 0
    assert len(outcomes) > 8
