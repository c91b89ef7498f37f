"""RULES B6: what an officer's papers bind, and that nobody else can write, widen or soften one."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from pydantic import ValidationError

from privacy.canonical import canonical
from privacy.claims import claim
from privacy.errors import Refusal, RefusalCode
from privacy.grants import Allowance, Claims, Grant, read, shortfalls
from privacy.identity import Document, Identity
from privacy.roster import expiry, timestamp
from tests.privacy.grant_kit import NOW, SITE, allowance, grant, study

OFFICER = Identity.generate()
STUDY = study()


def test_papers_come_back_as_they_were_signed() -> None:
    paper, document = read(grant(OFFICER, STUDY), OFFICER.public)
    assert isinstance(paper, Grant)
    assert (paper.study, paper.slots, paper.site) == (STUDY.hash, STUDY.slots, SITE)
    assert document.encode() == grant(OFFICER, STUDY)
    paper, _ = read(allowance(OFFICER), OFFICER.public)
    assert isinstance(paper, Allowance)
    assert (paper.lifetime.epsilon, paper.lifetime.order) == ("8", 4)


def test_an_allowance_names_the_doubt_it_settles_or_says_nothing_of_one() -> None:
    plain, settling = (Document.decode(allowance(OFFICER, **more), "allowance") for more in ({}, {"settles": "0f" * 8}))
    assert set(settling.body) - set(plain.body) == {"settles"}
    assert Allowance.verified(settling, OFFICER.public).settles == "0f" * 8
    for wrong in ("", "0f", "0F" * 8, "0f" * 8 + "\n"):
        with pytest.raises(Refusal):
            read(Document("allowance", {**plain.body, "settles": wrong}).signed_by(OFFICER).encode(), OFFICER.public)


@pytest.mark.parametrize("make", [allowance, lambda officer: grant(officer, STUDY)])
def test_B6_another_officers_paper_is_refused(make: Any) -> None:
    with pytest.raises(Refusal) as refused:
        read(make(Identity.generate()), OFFICER.public)
    assert refused.value.code is RefusalCode.BAD_SIGNATURE


@pytest.mark.parametrize("entry", ["site", "study", "slots", "epsilon", "cap", "delta", "serial", "expires"])
def test_B6_the_signature_binds_every_entry(entry: str) -> None:
    document = Document.decode(grant(OFFICER, STUDY), Grant.KIND)
    other = {
        "site": "st-bona", "study": "ab" * 32, "slots": 9, "epsilon": "21", "cap": "41", "delta": "0.00001",
        "serial": 2, "expires": expiry(NOW, 9),
    }  # fmt: skip
    assert set(other) == set(document.body)
    changed = replace(document, body={**document.body, entry: other[entry]})
    with pytest.raises(Refusal) as refused:
        read(changed.encode(), OFFICER.public)
    assert refused.value.code is RefusalCode.BAD_SIGNATURE


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon": "1e1"}, {"epsilon": "20.0"}, {"epsilon": 20}, {"epsilon": "0"}, {"cap": "19"}, {"delta": "1"},
        {"slots": 0}, {"slots": "8"}, {"serial": 0}, {"serial": True}, {"expires": "2030-01-31"}, {"site": "St Anna"},
        {"study": "AB" * 32}, {"more": "1"},
    ],
)  # fmt: skip
def test_a_grant_is_read_strictly(changes: dict[str, Any]) -> None:
    """One way to write each value, no entry more and none less."""
    body = {**Document.decode(grant(OFFICER, STUDY), Grant.KIND).body, **changes}
    with pytest.raises(Refusal) as refused:
        read(Document(Grant.KIND, body).signed_by(OFFICER).encode(), OFFICER.public)
    assert refused.value.code is RefusalCode.MALFORMED


@pytest.mark.parametrize("entry", ["site", "study", "slots", "epsilon", "cap", "delta", "serial", "expires"])
def test_a_grant_that_leaves_something_out_is_refused(entry: str) -> None:
    body = dict(Document.decode(grant(OFFICER, STUDY), Grant.KIND).body)
    del body[entry]
    with pytest.raises(Refusal, match="not well formed"):
        read(Document(Grant.KIND, body).signed_by(OFFICER).encode(), OFFICER.public)


@pytest.mark.parametrize("changes", [{"order": 7}, {"epsilon": "0.001"}, {"delta": "1"}, {"order": "4"}])
def test_an_allowance_that_decides_nothing_cannot_be_written(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        allowance(OFFICER, **changes)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"null", canonical({"kind": "grant", "body": {}, "signatures": []}), b"\xff" * 40]
)
def test_rubbish_is_refused(data: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        read(data, OFFICER.public)
    assert refused.value.code is RefusalCode.MALFORMED


def test_one_kind_never_passes_for_the_other() -> None:
    body = Document.decode(allowance(OFFICER), Allowance.KIND).body
    with pytest.raises(Refusal):
        read(Document(Grant.KIND, body).signed_by(OFFICER).encode(), OFFICER.public)


def test_a_claim_is_that_of_the_most_exposed_role() -> None:
    claims, promise = Claims.of(STUDY), claim(STUDY)
    assert (f"{claims.epsilon:f}", f"{claims.cap:f}") == (promise.worst(1).epsilon_rdp, promise.worst(2).epsilon_rdp)
    assert claims.cap > claims.epsilon, "one share of the noise hides less than all"
    own = Claims.of(study(mode="per-site"))
    assert own.cap == own.epsilon, "RULES B2: equal tiers"


def test_B6_a_plan_within_its_grant_lacks_nothing() -> None:
    claims = Claims.of(STUDY)
    exact, _ = read(grant(OFFICER, STUDY, epsilon=f"{claims.epsilon:f}", cap=f"{claims.cap:f}"), OFFICER.public)
    assert isinstance(exact, Grant)
    assert shortfalls(exact, claims) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"study": "ab" * 32}, "names another study"),
        ({"slots": STUDY.slots + 1}, "the grant names 9"),
        ({"slots": STUDY.slots - 1}, "the grant names 7"),
        ({"epsilon": f"{Claims.of(STUDY).epsilon - Decimal('0.001'):f}"}, "epsilon is"),
        ({"epsilon": "0.9", "cap": f"{Claims.of(STUDY).cap - Decimal('0.001'):f}"}, "the cap"),
        ({"delta": "0.0000001"}, "delta is"),
    ],
)
def test_B6_what_was_not_granted_is_named(changes: dict[str, Any], words: str) -> None:
    paper, _ = read(grant(OFFICER, STUDY, **changes), OFFICER.public)
    assert isinstance(paper, Grant)
    (found,) = shortfalls(paper, Claims.of(STUDY))
    assert words in found


def test_B6_a_grant_expires() -> None:
    paper, _ = read(grant(OFFICER, STUDY, expires=timestamp(NOW)), OFFICER.public)
    assert isinstance(paper, Grant)
    assert paper.expired(NOW)
    assert not paper.expired(NOW - timedelta(seconds=2))
