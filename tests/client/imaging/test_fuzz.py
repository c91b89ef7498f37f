"""No damaged file comes out of the readers as anything but a picture or a reason."""

from __future__ import annotations

import io
import itertools
import os
import random
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread, uid

from client.imaging import pool
from client.imaging.codestream import ISOLATED
from client.imaging.seg import marked
from tests.client.imaging import fuzzing

SECONDS = float(os.environ.get("CONSILIUM_FUZZ_SECONDS", "600"))
BLOCK = 2000
DEADLY = 10**15 + 8180
"""A file on which GDCM 3.2.6 ends its process; the long test found it."""


CORPUS = [*fuzzing.corpus(), *fuzzing.corpus_of_gdcm()]


@pytest.mark.parametrize(("ending", "raw"), CORPUS, ids=[f"{at}{ending}" for at, (ending, _) in enumerate(CORPUS)])
def test_every_file_of_the_corpus_is_read_while_it_is_whole(ending, raw):
    """Otherwise nothing but the first check would be tried. A slice is no volume, and a class is not a yes and a no."""
    outcomes = Counter(fuzzing.outcome(ending, raw, random.Random(seed), "whole") for seed in range(12))
    assert outcomes["read"]
    assert set(outcomes) <= {"read", "no-volume", "refused"}


def test_the_segmentation_of_the_corpus_marks_its_square(tmp_path):
    file = tmp_path / "seg.dcm"
    (raw,) = [raw for ending, raw in CORPUS if ending == ".dcm" and dcmread(io.BytesIO(raw)).Modality == "SEG"]
    file.write_bytes(raw)
    assert marked([file], [fuzzing.MARKED], 1, fuzzing.CLASSES, {}).sum() == 144


def test_the_corpus_has_every_ending_and_every_syntax():
    assert {ending for ending, _ in CORPUS} == {".dcm", ".nii", ".nii.gz", ".png", ".jpg", ".npz"}
    syntaxes = [
        {dcmread(io.BytesIO(raw)).file_meta.TransferSyntaxUID for ending, raw in files if ending == ".dcm"}
        for files in (fuzzing.corpus(), fuzzing.corpus_of_gdcm())
    ]
    assert syntaxes[0] >= {uid.JPEGBaseline8Bit, uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.RLELossless}
    assert syntaxes[1] == ISOLATED


@settings(max_examples=2000, deadline=None)
@given(seed=st.integers(0, 2**48))
def test_a_damaged_file_is_read_or_has_a_reason(seed):
    outcome = fuzzing.one(seed)
    assert not outcome.startswith(("ESCAPED", "SLOW")), outcome


def test_a_damaged_file_of_gdcms_is_read_or_has_a_reason_or_costs_its_process():
    seeds = [*range(200), DEADLY]
    outcomes = Counter(pool.each(fuzzing.one_of_gdcm, seeds, lambda seed: "decoder-crashed", 1, 50))
    assert not [outcome for outcome in outcomes if outcome.startswith(("ESCAPED", "SLOW"))]
    assert outcomes.total() == len(seeds)
    assert outcomes["read"] > 10
    assert len(outcomes) > 4


@pytest.mark.long
def test_ten_minutes_of_damaged_files():
    """In two processes of their own: a decoder that dies counts as a reason, as it does in an agent. The number of
    seconds can be given as CONSILIUM_FUZZ_SECONDS."""
    end, outcomes = time.monotonic() + SECONDS, Counter[str]()
    for block in itertools.count():
        seeds = range(10**15 + block * BLOCK, 10**15 + (block + 1) * BLOCK)
        outcomes.update(pool.each(fuzzing.one, seeds, lambda seed: f"decoder-crashed, seed {seed}", 2, 50))
        gdcms = seeds[: len(seeds) // 4]
        outcomes.update(pool.each(fuzzing.one_of_gdcm, gdcms, lambda seed: f"decoder-crashed, GDCM's {seed}", 2, 50))
        if time.monotonic() > end:
            break
    print(dict(outcomes.most_common()))
    bad = [outcome for outcome in outcomes if outcome.startswith(("ESCAPED", "SLOW"))]
    assert not bad
    assert outcomes["read"] > 0
    assert len(outcomes) > 8
