"""Enrolment as an exchange of signed files: adding, renewing, revoking, and who may not."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.identity import Document, Identity
from privacy.roster import Consortium, Enrolment, Roster, enrol, expiry, revoke

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def node_key(curve=None) -> str:
    key = ec.generate_private_key(curve or ec.SECP384R1()).public_key()
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def enrolment(identity: Identity, site="st-anna", **changes) -> Enrolment:
    values = {
        "consortium": "alpine",
        "site": site,
        "identity": identity.public,
        "node_key": node_key(),
        "not_after": expiry(NOW),
    }
    return Enrolment(**{**values, **changes})


@pytest.fixture
def coordinator():
    return Identity.generate()


@pytest.fixture
def roster(coordinator):
    return Roster(consortium="alpine", version=1, coordinator=coordinator.public, sites=())


def test_a_site_is_added_and_the_version_goes_up(roster):
    site = Identity.generate()
    grown = enrol(roster, enrolment(site), NOW)
    assert grown.version == 2
    assert grown.site("st-anna").identity == site.public
    assert grown.site("st-anna").active(NOW)
    assert not grown.site("st-anna").active(NOW + timedelta(days=400))


def test_a_renewal_under_the_same_identity_replaces_the_node_key_only(roster):
    site = Identity.generate()
    grown = enrol(roster, enrolment(site), NOW)
    fresh = enrolment(site)
    renewed = enrol(grown, fresh, NOW)
    assert renewed.site("st-anna").node_key == fresh.node_key
    assert len(renewed.sites) == 1


def test_a_new_identity_needs_the_old_one_to_sign_too(roster):
    old, new = Identity.generate(), Identity.generate()
    grown = enrol(roster, enrolment(old), NOW)
    with pytest.raises(ConsiliumError, match="Another key is enrolled"):
        enrol(grown, enrolment(new), NOW)
    change = enrolment(new, previous=old.public)
    with pytest.raises(Refusal) as caught:
        Enrolment.verified(change.signed(new))
    assert caught.value.code is RefusalCode.BAD_SIGNATURE
    accepted = Enrolment.verified(change.signed(new, previous=old))
    assert enrol(grown, accepted, NOW).site("st-anna").identity == new.public


def test_a_revoked_site_stays_revoked(roster):
    site = Identity.generate()
    gone = revoke(enrol(roster, enrolment(site), NOW), "st-anna")
    assert not gone.site("st-anna").active(NOW)
    with pytest.raises(ConsiliumError, match="was revoked"):
        enrol(gone, enrolment(site), NOW)
    with pytest.raises(ConsiliumError, match="No such site"):
        revoke(gone, "nobody")


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"consortium": "other"}, "another consortium"), ({"not_after": "2029-12-31T00:00:00Z"}, "expired")],
)
def test_an_enrolment_that_does_not_fit_is_refused_with_a_remedy(roster, changes, words):
    with pytest.raises(ConsiliumError, match=words):
        enrol(roster, enrolment(Identity.generate(), **changes), NOW)


def test_two_sites_never_share_a_key(roster):
    site = Identity.generate()
    grown = enrol(roster, enrolment(site), NOW)
    with pytest.raises(ConsiliumError, match="same key"):
        enrol(grown, enrolment(site, site="st-berta"), NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"site": "St Anna"},
        {"site": "../etc"},
        {"node_key": "-----BEGIN"},
        {"node_key": node_key(ec.SECP256R1())},
        {"not_after": "soon"},
        {"identity": "ab"},
    ],
)
def test_a_malformed_enrolment_is_refused(changes):
    site = Identity.generate()
    body = {**enrolment(site).body(), **changes}
    with pytest.raises(Refusal) as caught:
        Enrolment.verified(Document("enrolment", body).signed_by(site))
    assert caught.value.code is RefusalCode.MALFORMED


def test_only_the_pinned_coordinator_publishes_the_roster(roster, coordinator):
    document = roster.signed(coordinator)
    assert Roster.verified(document, coordinator.public) == roster
    stranger = Identity.generate()
    with pytest.raises(Refusal) as caught:
        Roster.verified(document, stranger.public)
    assert caught.value.code is RefusalCode.WRONG_COORDINATOR
    with pytest.raises(Refusal):
        Roster.verified(replace(document, signatures=()), coordinator.public)


def test_the_consortium_document_is_signed_by_the_key_it_names(coordinator):
    consortium = Consortium(name="alpine", coordinator=coordinator.public, superlink="fl.example.org:8443", ca="PEM")
    assert Consortium.verified(consortium.signed(coordinator)) == consortium
    with pytest.raises(Refusal):
        Consortium.verified(consortium.signed(Identity.generate()))
