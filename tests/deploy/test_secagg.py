"""Secure sums in the real deployment: kill -9 at every stage, a coordinator that dies, and one that lies.

Four hospitals, one of which may collude with the coordinator: any three of them open a sum.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import additive, tasks
from privacy.canonical import canonical, sha256
from privacy.identity import Document
from privacy.messages import Answer, Header
from privacy.secagg.messages import Keys, Shares, Survivors
from privacy.secagg.plan import Plan
from privacy.secagg.ring import Ring, accept_shares, place_of
from privacy.stages import FIRST, LAST, TRANSCRIPT, Enclosure
from server.flower import Exchange, Outgoing, acquire, start_run
from server.records import OutcomeState, SlotRecord, SlotState, State, StudyRecord
from server.superlink import private_url, secrets
from tests.deploy.lab import LIVENESS, Lab, running_lab
from tests.deploy.witness import Witness

pytestmark = pytest.mark.long

SITES = ("east", "north", "south", "west")
SECAGG = {"secagg": {"mode": "on"}}
LOOK = 0.004


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Four hospitals and a coordinator."""
    root = Path(tempfile.mkdtemp(prefix="sec-"))
    try:
        with running_lab(root, SITES) as made:
            yield made
    finally:
        shutil.rmtree(root, ignore_errors=True)


def launched(lab: Lab, name: str, **changes: object) -> StudyRecord:
    return lab.launch(name, sites=SITES, minimum=3, extra=SECAGG, **{"rounds": 3, **changes})


def weights(lab: Lab, record: StudyRecord, round_: int) -> np.ndarray:
    """The model after a round: float32 [d]."""
    row = next(c for c in lab.registry.course(record.hash).checkpoints() if c.round == round_)
    return np.fromfile(lab.registry.blobs.path(row.weights), "<f4")


def taken(lab: Lab, record: StudyRecord, slot: int) -> set[str]:
    return {site for site, o in lab.outcomes(record, slot).items() if o.state is OutcomeState.IN}


class Models:
    """Copies of the models, taken as they appear: the coordinator keeps a few only."""

    def __init__(self, lab: Lab, record: StudyRecord) -> None:
        self._lab, self._record = lab, record
        self.found: dict[int, np.ndarray] = {}

    def look(self) -> bool:
        for row in self._lab.registry.course(self._record.hash).checkpoints():
            if row.weights and row.round not in self.found:
                self.found[row.round] = np.fromfile(self._lab.registry.blobs.path(row.weights), "<f4")
        return self._lab.now(self._record).state is State.FINISHED


def each_round_is_the_exact_sum(lab: Lab, record: StudyRecord, witness: Witness, models: Models) -> list[SlotRecord]:
    """Every training slot that counts led to the model that the survivors' own numbers give, bit for bit."""
    done = [s for s in lab.slots(record) if s.kind == "train" and s.state is SlotState.DONE]
    for slot in done:
        sites = taken(lab, record, slot.slot)
        assert len(sites) >= 3
        expected = witness.model(slot.slot, sites, models.found[slot.round - 1])
        np.testing.assert_array_equal(models.found[slot.round], expected)
    return done


def answered(lab: Lab, record: StudyRecord, site: str, stage: str) -> int:
    """How many such stages a site has answered (train: has stored)."""
    if stage == "train":
        query = "SELECT count(*) FROM slots WHERE study = ? AND kind = 'train' AND state != 'bound'"
        return int(str(lab.agent(site, query, record.hash)[0][0]))
    query = "SELECT count(*) FROM stages WHERE study = ? AND stage = ?"
    return int(str(lab.agent(site, query, record.hash, stage)[0][0]))


def catch(lab: Lab, record: StudyRecord, site: str, stage: str, models: Models) -> None:
    """Wait until a site has just answered a stage once more."""
    before, end = answered(lab, record, site, stage), time.monotonic() + LIVENESS
    while answered(lab, record, site, stage) == before:
        models.look()
        assert time.monotonic() < end, f"{stage} of {site} never came\n{lab.story(record)}\n{lab.federation.logs()}"
        time.sleep(LOOK)


# ---- kill -9 at each stage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["agent", "connector"])
def test_a_hospital_is_killed_at_every_stage_and_every_sum_is_exact(lab: Lab, victim: str) -> None:
    record = lab.sign(f"stages-{victim}", sites=SITES, minimum=3, extra=SECAGG, rounds=4)
    models = Models(lab, record)
    with Witness(lab, record) as witness:
        lab.registry.launch(record.name)
        lab.approve(record)
        for stage in ("keys", "shares", "seal", "train", "unmask"):
            catch(lab, record, "south", stage, models)
            lab.federation.kill("south", victim)
        lab.until(models.look, f"{record.name} to finish")
    lab.finishes(record)
    done = each_round_is_the_exact_sum(lab, record, witness, models)
    assert [s.round for s in done] == [1, 2, 3, 4]
    assert lab.delivered(record)["south"].state == "delivered"


def test_a_hospital_that_drops_is_left_out_and_another_that_is_killed_while_they_agree_is_not(lab: Lab) -> None:
    record = lab.sign("agree", sites=SITES, minimum=3, extra=SECAGG, rounds=4, deadline=25)
    models = Models(lab, record)
    with Witness(lab, record) as witness:
        lab.registry.launch(record.name)
        lab.approve(record)
        catch(lab, record, "north", "unmask", models)
        with lab.held("west"):
            lab.mid_round(record, held="west", after=1)
            lab.federation.kill("west", "connector")
            agent = lab.federation.process("west", "agent")
            assert agent is not None
            catch(lab, record, "south", "survivors", models)
            lab.federation.kill("south", "agent")
            lab.until(lambda: bool(models.look()) or "survivors" in stages(lab, record), "the smaller sum to be opened")
            lab.until(lambda: opened_without(lab, record, "west"), "a round without west")
        lab.until(models.look, f"{record.name} to finish")
    lab.finishes(record)
    done = each_round_is_the_exact_sum(lab, record, witness, models)
    assert any(taken(lab, record, s.slot) == {"east", "north", "south"} for s in done)


def stages(lab: Lab, record: StudyRecord) -> set[str]:
    """The stages that were begun in any slot."""
    rings = lab.registry.rings(record.hash)
    return {stage for slot in lab.slots(record) for stage in rings.stages(slot.slot)}


def opened_without(lab: Lab, record: StudyRecord, site: str) -> bool:
    return any(
        s.state is SlotState.DONE and s.kind == "train" and site not in taken(lab, record, s.slot)
        for s in lab.slots(record)
    )


def test_the_coordinator_is_killed_between_masks_and_unmasking_and_the_slot_is_finished_from_stored_bytes(
    lab: Lab,
) -> None:
    record = lab.sign("between", sites=SITES, minimum=3, extra=SECAGG, rounds=12)
    models, caught = Models(lab, record), None
    rings = lab.registry.rings(record.hash)
    with Witness(lab, record) as witness:
        lab.registry.launch(record.name)
        lab.approve(record)
        end = time.monotonic() + LIVENESS
        while caught is None:
            assert time.monotonic() < end, f"never caught between\n{lab.story(record)}"
            slot = lab.open_slot(record)
            if slot is None or "unmask" not in rings.stages(slot.slot):
                models.look()
                time.sleep(LOOK)
                continue
            lab.federation.kill("coordinator", "serverapp")
            lab.reaches(record, State.INTERRUPTED)
            if lab.slots(record)[slot.slot - 1].state is SlotState.OPEN:
                caught = slot
            lab.resume(record)
        lab.until(models.look, f"{record.name} to finish")
    lab.finishes(record)
    done = each_round_is_the_exact_sum(lab, record, witness, models)
    assert [s.round for s in done] == list(range(1, 13))
    assert next(s for s in done if s.slot == caught.slot).hash == caught.hash
    for site in SITES:
        for what, hashes in lab.left(site, record, caught.slot).items():
            assert len(hashes) == 1, f"{what} of {site}: the same bytes again, and nothing else"


def test_below_the_threshold_nothing_is_opened_and_the_next_round_goes_on(lab: Lab) -> None:
    record = lab.sign("few", sites=SITES, minimum=3, extra=SECAGG, rounds=3, deadline=15)
    models = Models(lab, record)
    with Witness(lab, record) as witness:
        lab.registry.launch(record.name)
        lab.approve(record)
        catch(lab, record, "north", "unmask", models)
        with lab.held("south"), lab.held("west"):
            lab.until(lambda: any(s.state is SlotState.FAILED for s in lab.slots(record)), "a slot to come to nothing")
        lab.until(models.look, f"{record.name} to finish")
    lab.finishes(record)
    failed = next(s for s in lab.slots(record) if s.state is SlotState.FAILED)
    assert "nothing is opened" in failed.reason
    each_round_is_the_exact_sum(lab, record, witness, models)


# ---- a coordinator that lies -----------------------------------------------------------------------------------


@dataclass
class Liar:
    """The coordinator's right key and token, put to wrong use: a study that only its signer drives, at four sites."""

    lab: Lab
    record: StudyRecord
    exchange: Exchange
    ring: Ring | None = None

    @property
    def vector(self) -> bytes:
        return self.lab.registry.blobs.path(self.record.weights).read_bytes()

    @property
    def identities(self) -> dict[str, str]:
        return {line.name: line.identity for line in self.lab.registry.roster()[1].sites}

    def request(self, kind: str, payload: bytes, **changes: Any) -> Document:
        values: dict[str, Any] = {
            "kind": kind, "study": self.record.hash, "session": 1, "slot": 0, "round": 0, "cohort": SITES,
            "payload_sha256": sha256(payload), "payload_bytes": len(payload), "deadline_seconds": 120,
        }  # fmt: skip
        return Header(**{**values, **changes}).signed(self.lab.home.identity())

    def ask(self, site: str, kind: str, payload: bytes = b"", **changes: Any) -> tuple[Answer, bytes, Document]:
        """One signed request to one site, through the whole deployment: its answer, the payload, and both as signed."""
        document = self.request(kind, payload, **changes)
        line = self.lab.registry.roster()[1].site(site)
        self.lab.until(lambda: line.node_key in self.exchange.nodes(), f"{site} to be connected")
        node = self.exchange.nodes()[line.node_key]
        (message,) = self.exchange.send([Outgoing(node, kind, document.encode(), payload or None)], 120)
        end = time.monotonic() + LIVENESS
        while time.monotonic() < end:
            for reply in self.exchange.poll([message], 1.0):
                data = b"".join(reply.chunks())
                return Answer.verified(reply.document, line.identity), data, Document.decode(reply.document, "answer")
        raise AssertionError(f"no answer to {kind}")

    def code(self, site: str, kind: str, payload: bytes = b"", **changes: Any) -> str:
        return self.ask(site, kind, payload, **changes)[0].code

    def begin(self) -> None:
        """Offer, approvals, sessions, keys: all as an honest coordinator."""
        offer = {"study": self.record.document.plain(), "roster": self.lab.registry.roster()[0].plain()}
        initial = self.lab.registry.blobs.path(self.record.initial).read_bytes()
        for site in SITES:
            assert self.ask(site, "offer", canonical(offer), session=0)[0].detail["state"] == "pending"
        self.lab.approve(self.record)
        for site in SITES:
            assert self.ask(site, "open", initial)[0].detail == {"initial": "held"}
        keys, shares, parcels = dict[str, Document](), dict[str, Document](), dict[str, Any]()
        for site in SITES:
            told = self.ask(site, "keys", parameters={FIRST: "1", LAST: "19"})[0].detail["keys"]
            keys[site] = Document.decode(told.encode(), Keys.KIND)
        payload = Enclosure({"keys": keys}).encode()
        for site in SITES:
            answer, data, _ = self.ask(site, "shares", payload)
            shares[site] = Document.decode(answer.detail["shares"].encode(), Shares.KIND)
            parcels[site] = Enclosure.decode(data, 1 << 24, {}, parcels=True).parcels
        task = tasks.get(self.record.study.spec())
        plan = Plan.of(self.record.study, len(self.vector) // 4, additive.size(task))
        self.ring, bad = accept_shares(place_of(plan, 1, 1, 19, self.identities), keys, shares, parcels)
        assert bad == {}
        for site in SITES:
            sealed = Enclosure({"shares": shares}, self.ring.bundles(site)).encode()
            assert self.ask(site, "seal", sealed)[0].detail == {TRANSCRIPT: self.ring.transcript}

    def masked(self, slot: int, **changes: Any) -> dict[str, Any]:
        assert self.ring is not None
        return {"slot": slot, "round": slot, "parameters": {TRANSCRIPT: self.ring.transcript}, **changes}

    def train(self, site: str, slot: int, model: bytes | None = None, **changes: Any) -> tuple[Answer, bytes, Document]:
        return self.ask(site, "train", model or self.vector, **self.masked(slot, **changes))


@pytest.fixture(scope="module")
def liar(lab: Lab) -> Iterator[Liar]:
    """A study whose set-up was honest."""
    record = lab.sign("lies", sites=SITES, minimum=3, extra=SECAGG, rounds=12)
    private, shared = private_url(lab.home.root), secrets(lab.home.root)
    start_run(private, shared.control, record.hash)
    task = acquire(private, shared.runtime, record.hash)
    assert task is not None
    with Exchange(private, task[0], record.hash) as exchange:
        made = Liar(lab, record, exchange)
        made.begin()
        yield made


def proof_of(documents: dict[str, Document]) -> bytes:
    return Enclosure({"proof": documents}).encode()


def test_S2_S4_a_liar_gets_one_share_only_and_the_same_bytes_again_across_a_restart(lab: Lab, liar: Liar) -> None:
    answers = dict[str, Document]()
    for site in SITES:
        answer, _, document = liar.train(site, 1)
        assert answer.status == "done", answer.code
        answers[site] = document
    assert liar.train("north", 1)[:2] == liar.train("north", 1)[:2], "a replay gives the stored bytes"
    proof, smaller = proof_of(answers), ("east", "north", "south")
    first = liar.ask("north", "unmask", proof, slot=1, round=1)
    assert first[0].status == "done", first[0].code
    assert liar.code("north", "survivors", slot=1, round=1, cohort=smaller) == "choice-bound"
    lab.federation.kill("north", "agent")
    assert liar.code("north", "survivors", slot=1, round=1, cohort=smaller) == "choice-bound"
    assert liar.ask("north", "unmask", proof, slot=1, round=1)[0] == first[0]
    lab.federation.kill("north", "connector")
    assert liar.ask("north", "unmask", proof, slot=1, round=1)[0] == first[0]
    signed = liar.ask("south", "survivors", slot=1, round=1, cohort=smaller)[0]
    assert signed.status == "done"
    lab.federation.kill("south", "agent")
    assert liar.code("south", "unmask", proof, slot=1, round=1) == "choice-bound"
    kept = Document.decode(signed.detail["survivors"].encode(), Survivors.KIND)
    alone = proof_of({"south": kept})
    assert liar.code("south", "unmask", alone, slot=1, round=1, cohort=smaller) == "too-few"
    forged = Document(kept.kind, {**kept.body, "site": "north"}).signed_by(lab.home.identity())
    more = proof_of({"south": kept, "north": forged, "east": forged})
    assert liar.code("south", "unmask", more, slot=1, round=1, cohort=smaller) == "bad-signature"
    assert liar.train("north", 2, round=1)[0].code == "round-opened"


def test_nothing_that_a_coordinator_says_at_run_time_changes_threshold_ring_or_keys(liar: Liar) -> None:
    assert liar.ring is not None
    transcript = liar.ring.transcript
    for parameters in (
        {}, {TRANSCRIPT: "0" * 64}, {TRANSCRIPT: transcript, "threshold": "1"},
        {TRANSCRIPT: transcript, "norm_bound": "0"},
    ):  # fmt: skip
        assert liar.train("north", 3, parameters=parameters)[0].code == "out-of-order"
    assert liar.train("north", 3, cohort=("north", "south"))[0].code == "cohort"
    assert liar.code("north", "keys", parameters={FIRST: "1", LAST: "5"}) == "slot-bound"
    assert liar.code("north", "shares", Enclosure({"keys": {}}).encode()) == "slot-bound"
    assert liar.code("north", "seal", b"{}") == "slot-bound"
    assert liar.train("north", 40, round=3)[0].code == "slot-limit"


def test_S5_different_models_to_different_sites_sum_to_noise(liar: Liar) -> None:
    crafted = (np.frombuffer(liar.vector, "<f4") * np.float32(1.5)).tobytes()
    total, words = None, []
    for site in SITES:
        answer, data, _ = liar.train(site, 4, crafted if site == "west" else None)
        assert answer.status == "done", answer.code
        words.append(np.frombuffer(data, "<u4"))
    total = np.sum(np.array(words, np.uint32), axis=0, dtype=np.uint32)
    for vector in (*words, total):
        share = np.bincount(vector >> 28, minlength=16) / len(vector)
        assert abs(share - 1 / 16).max() < 0.02, "uniform: nothing of any update can be seen"
