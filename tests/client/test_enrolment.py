"""Joining: keys are made once, documents are signed, a renewal waits beside the old keys."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client import enrolment
from client.home import SiteHome
from privacy.errors import ConsiliumError
from privacy.identity import Document, Identity
from privacy.roster import Enrolment, Roster, enrol, parse_timestamp
from tests.client.site_kit import Link, new_site

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def link(tmp_path: Path) -> Link:
    (tmp_path / "link").mkdir()
    link = Link(tmp_path / "link", port=8443)
    link.prepare()
    return link


@pytest.fixture
def home(tmp_path: Path, link: Link) -> SiteHome:
    return new_site(tmp_path / "a", link)


def empty(link: Link) -> Roster:
    return Roster(consortium="heart", version=0, coordinator=link.identity.public, sites=())


def test_init_makes_private_keys_and_pins_the_consortium(home: SiteHome, link: Link) -> None:
    for folder in (home.agent, home.connector, home.outward_socket.parent, home.local_socket.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for key in (home.identity_key, home.node_key, enrolment.pseudonym_key(home)):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(enrolment.pseudonym_key(home).read_bytes()) == 32
    assert home.consortium().coordinator == link.identity.public
    assert home.ca.read_text() == home.consortium().ca
    assert home.config().site == "st-anna"


def test_two_sites_share_no_key(home: SiteHome, tmp_path: Path, link: Link) -> None:
    other = new_site(tmp_path / "b", link)
    for key in ("identity_key", "node_key"):
        assert getattr(home, key).read_bytes() != getattr(other, key).read_bytes()
    assert enrolment.pseudonym_key(home).read_bytes() != enrolment.pseudonym_key(other).read_bytes()


def test_a_second_init_keeps_the_keys(home: SiteHome, link: Link, tmp_path: Path) -> None:
    before = home.identity_key.read_bytes()
    with pytest.raises(ConsiliumError, match="a site here already"):
        enrolment.create(home, "st-anna", link.consortium(tmp_path))
    assert home.identity_key.read_bytes() == before


@pytest.mark.parametrize("left", ["agent/identity.key.part", "connector/node.key.part", "agent/pseudonym.key.part"])
def test_an_init_that_was_killed_can_be_run_again(home: SiteHome, link: Link, tmp_path: Path, left: str) -> None:
    identity = home.identity_key.read_bytes()
    home.config_file.unlink()
    (home.root / left).write_bytes(b"half a k")
    (home.root / left).with_suffix("").unlink()
    enrolment.create(home, "st-anna", link.consortium(tmp_path))
    assert Enrolment.verified(enrolment.enrolment(home)).site == "st-anna"
    if "identity" not in left:
        assert home.identity_key.read_bytes() == identity


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda text: text.replace("localhost:8443", "evil.org:8443"), "not signed by the coordinator"),
        (lambda text: text[:-20], "not a well-formed consortium"),
    ],
)
def test_a_changed_consortium_document_is_refused(tmp_path: Path, link: Link, damage, what: str) -> None:
    path = link.consortium(tmp_path)
    path.write_text(damage(path.read_text()))
    home = SiteHome(tmp_path / "site")
    with pytest.raises(ConsiliumError, match=what):
        enrolment.create(home, "st-anna", path)
    assert not home.root.exists()


@pytest.mark.parametrize("name", ["St-Anna", "a", "-a-", "st anna", "../x", "x" * 41])
def test_a_name_that_cannot_be_one_is_refused(tmp_path: Path, link: Link, name: str) -> None:
    with pytest.raises(ConsiliumError, match="cannot be a site's name"):
        enrolment.create(SiteHome(tmp_path / "site"), name, link.consortium(tmp_path))


def test_an_extra_authority_must_be_a_certificate_and_is_copied(tmp_path: Path, link: Link) -> None:
    extra = tmp_path / "proxy.pem"
    extra.write_text("not a certificate")
    with pytest.raises(ConsiliumError, match="no certificate in PEM form"):
        new_site(tmp_path / "a", link, extra_ca=extra)
    extra.write_bytes((link.home / "tls" / "ca.pem").read_bytes())
    home = new_site(tmp_path / "b", link, extra_ca=extra)
    assert (home.root / home.config().extra_ca).read_bytes() == extra.read_bytes()


def test_the_enrolment_is_signed_and_lasts_397_days(home: SiteHome, link: Link) -> None:
    document = enrolment.enrolment(home, now=NOW)
    enrolled = Enrolment.verified(Document.decode(document.encode(), "enrolment"))
    assert enrolled.identity == Identity.load(home.identity_key).public
    assert parse_timestamp(enrolled.not_after) == NOW + timedelta(days=397)
    assert enrol(empty(link), enrolled, NOW).site("st-anna").node_key == enrolled.node_key


def test_a_renewed_node_key_waits_beside_the_old_one(home: SiteHome, link: Link) -> None:
    first = Enrolment.verified(enrolment.enrolment(home, now=NOW))
    old = home.node_key.read_bytes()
    renewed = Enrolment.verified(enrolment.enrolment(home, renew=True, now=NOW))
    assert home.node_key.read_bytes() == old
    assert renewed.node_key != first.node_key
    assert Enrolment.verified(enrolment.enrolment(home, renew=True, now=NOW)).node_key == renewed.node_key
    roster = enrol(enrol(empty(link), first, NOW), renewed, NOW)
    assert roster.site("st-anna").node_key == renewed.node_key
    enrolment.adopt_node_key(home)
    assert Enrolment.verified(enrolment.enrolment(home, now=NOW)).node_key == renewed.node_key


def test_a_renewed_identity_is_signed_by_both_and_used_once_the_roster_names_it(home: SiteHome, link: Link) -> None:
    first = Enrolment.verified(enrolment.enrolment(home, now=NOW))
    before = enrol(empty(link), first, NOW)
    renewed = Enrolment.verified(enrolment.enrolment(home, renew_identity=True, now=NOW))
    assert (renewed.previous, renewed.identity != first.identity) == (first.identity, True)
    after = enrol(before, renewed, NOW)
    assert not enrolment.adopt_identity(home, before)
    assert Identity.load(home.identity_key).public == first.identity
    assert enrolment.adopt_identity(home, after)
    assert Identity.load(home.identity_key).public == renewed.identity
    assert not enrolment.adopt_identity(home, after)


def test_a_stranger_cannot_take_a_sites_name(home: SiteHome, tmp_path: Path, link: Link) -> None:
    roster = enrol(empty(link), Enrolment.verified(enrolment.enrolment(home, now=NOW)), NOW)
    stranger = new_site(tmp_path / "stranger", link)
    with pytest.raises(ConsiliumError, match="Another key is enrolled under this name"):
        enrol(roster, Enrolment.verified(enrolment.enrolment(stranger, now=NOW)), NOW)


def test_the_fingerprint_is_spread_out_over_two_lines() -> None:
    lines = enrolment.big("0123456789abcdef" * 4)
    assert [line.replace(" ", "") for line in lines] == ["0123456789ABCDEF", "0123456789ABCDEF"]
