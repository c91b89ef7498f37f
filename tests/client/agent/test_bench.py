"""What a site keeps to itself: SCAFFOLD's variate, its own normalisation, its personal model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.agent.bench import CONTROL, NORMS, PERSONAL
from client.agent.benefit import compare
from client.agent.keepsakes import Keepsakes
from client.commands.models import _gain
from models import networks, weights
from privacy.errors import ConsiliumError, RefusalCode
from privacy.messages import Answer
from tests.client.agent.bed import Bed, make_bed
from tests.study_kit import Sections, merged

SCAFFOLD: Sections = {"aggregation": {"strategy": "scaffold"}}
OWN_NORMS: Sections = {"local": {"norms": "local"}}
DITTO: Sections = {"local": {"personal": "ditto"}}


def bed_of(folder: Path, **sections: Mapping[str, Any]) -> Bed:
    bed = make_bed(folder, rounds={"seed": 5}, **sections)
    (bed.home.agent / "pseudonym.key").write_bytes(bytes(32))  # one split for every bed
    bed.start()
    bed.ready()
    return bed


@pytest.fixture
def made(tmp_path: Path, request: pytest.FixtureRequest):
    bed = bed_of(tmp_path, **request.param)
    yield bed
    bed.stop()


def ask(bed: Bed, slot: int, model: np.ndarray, round_: int, kind: str = "train", **more) -> np.ndarray:
    """The numbers of an answer."""
    answer: Answer = bed.call(kind, model.astype("<f4").tobytes(), slot=slot, round=round_, **more)
    assert answer.status == "done", answer.code
    return np.frombuffer(bed.fetch(answer), "<f4")


def model(bed: Bed) -> np.ndarray:
    return np.frombuffer(bed.vector, "<f4")


def kept(bed: Bed) -> Keepsakes:
    return bed.agent.desk.keepsakes(bed.study)


@pytest.mark.parametrize("made", [SCAFFOLD], indirect=True)
def test_scaffold_answers_with_the_change_of_its_variate_and_corrects_the_next_round(made: Bed) -> None:
    """Option II: c_i is the mean gradient of the round, (x − y) / (K η), when c and c_i were zero."""
    d, x = len(model(made)), model(made)
    first = ask(made, 1, np.concatenate([x, np.zeros(d)]), 1)
    update, control = first[:d], first[d : 2 * d]
    np.testing.assert_allclose(control, -update / (3 * 0.05), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(kept(made).newest(CONTROL, 1, d), control)
    c = control + 1.0
    second = ask(made, 2, np.concatenate([x, c]), 2, parameters={"counted": "st-anna:1,st-bona:1"})
    expected = -c - second[:d] / np.float32(3 * 0.05)
    np.testing.assert_allclose(second[d : 2 * d], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kept(made).newest(CONTROL, 2, d), control + expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("made", [SCAFFOLD], indirect=True)
def test_a_round_that_was_not_counted_leaves_the_variate_as_the_coordinator_knows_it(made: Bed) -> None:
    d, x = len(model(made)), model(made)
    sent = np.concatenate([x, np.full(d, 0.01)])
    first = ask(made, 1, sent, 1)
    again = ask(made, 2, sent, 1)
    assert first.tobytes() == again.tobytes(), "the same round from the same state"
    before = kept(made).newest(CONTROL, 1, d).copy()
    late = ask(made, 3, sent, 2)
    assert late.tobytes() != first.tobytes()
    assert kept(made).newest(CONTROL, 1, d).tobytes() == before.tobytes()
    counted = ask(made, 4, sent, 3, parameters={"counted": "st-anna:1"})
    third = kept(made).newest(CONTROL, 3, d)
    np.testing.assert_allclose(third, before + counted[d : 2 * d], rtol=1e-5)
    assert kept(made).newest(CONTROL, 0, d) is None


@pytest.mark.parametrize("made", [SCAFFOLD], indirect=True)
def test_scaffolds_request_has_its_own_size_and_its_parameters_are_read_carefully(made: Bed) -> None:
    x = model(made)
    refused = made.call("train", x.tobytes(), slot=1)
    assert refused.code == RefusalCode.MODEL_SHAPE
    sent = np.concatenate([x, x]).astype("<f4").tobytes()
    refused = made.call("train", sent, slot=1, parameters={"counted": "st-anna:one"})
    assert refused.code == RefusalCode.MALFORMED
    assert len(ask(made, 2, x, 1, "validate")) < len(x), "a measurement carries the model alone"


@pytest.mark.parametrize("made", [OWN_NORMS], indirect=True)
def test_own_norms_never_travel_are_trained_and_come_back_in_the_next_round(made: Bed) -> None:
    network = networks.build(made.study.spec())
    norms = sum(network.state_dict()[name].numel() for name in networks.norm_parameters(network))
    whole = sum(parameter.numel() for parameter in network.parameters())
    assert norms > 0
    assert len(model(made)) == whole - norms
    ask(made, 1, model(made), 1)
    first = kept(made).newest(NORMS, 1, norms)
    assert first is not None
    assert np.abs(first - weights.local_vector(network)).max() > 0, "they are trained"
    again = ask(made, 2, model(made), 1)
    np.testing.assert_array_equal(kept(made).newest(NORMS, 1, norms), first)
    ask(made, 3, model(made), 2)
    assert not np.array_equal(kept(made).newest(NORMS, 2, norms), first), "round 2 goes on from round 1"
    at_one, at_two = (ask(made, slot, model(made), number, "validate") for slot, number in ((4, 1), (5, 2)))
    assert at_one.tobytes() != at_two.tobytes(), "each round's model is measured with the norms of its round"
    assert again[-len(at_one) :].tobytes() != at_one.tobytes()


@pytest.mark.parametrize("made", [merged(DITTO, OWN_NORMS)], indirect=True)
def test_a_delivered_model_stands_beside_the_sites_own(made: Bed) -> None:
    ask(made, 1, model(made), 1)
    ask(made, 2, model(made), 1, "test")
    result = json.loads(made.agent.store.study(made.hash).result)
    assert "auroc" in result
    assert set(result["personal"]) >= {"auroc", "images"}
    norms = kept(made).newest(NORMS, 1, len(weights.local_vector(networks.build(made.study.spec()))))
    assert made.call("deliver", made.parcel(), round=1).status == "done"
    folder = made.agent.models() / made.hash
    network = networks.build(made.study.spec())
    weights.load_state(network, folder / "site-model.safetensors")
    np.testing.assert_array_equal(weights.local_vector(network), norms)
    np.testing.assert_array_equal(weights.trainable_vector(network), model(made))
    weights.load_state(network, folder / "personal-model.safetensors")
    assert np.abs(weights.trainable_vector(network) - model(made)).max() > 0
    assert kept(made).newest(PERSONAL, 9, len(model(made)) + len(norms)) is None, "what was kept is gone with the study"


def test_a_personal_model_does_not_change_what_leaves(tmp_path: Path) -> None:
    answers = []
    for name, sections in (("plain", {}), ("ditto", DITTO)):
        bed = bed_of(tmp_path / name, **sections)
        answers.append([ask(bed, 1, model(bed), 1), ask(bed, 2, model(bed), 2)])
        bed.stop()
    for plain, ditto in zip(*answers, strict=True):
        assert plain[: len(plain) - 2010].tobytes() == ditto[: len(ditto) - 2010].tobytes()


def test_building_a_network_for_its_sizes_draws_nothing() -> None:
    """A study that arrives while another one trains must not shift what that one draws."""
    spec = make_spec()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    weights.trainable_count(spec)
    assert torch.equal(torch.rand(4), expected)


def make_spec() -> dict:
    return {
        "task": {"kind": "classification", "classes": ["a", "b"]},
        "network": {"name": "densenet-small"},
        "input": {"channels": 1, "size": [16, 16]},
    }


def test_a_keepsake_is_whole_or_not_there_and_old_ones_go(tmp_path: Path) -> None:
    keep = Keepsakes(tmp_path / "kept")
    assert keep.newest("control", 9, 3) is None
    for number in (1, 2, 5):
        keep.keep("control", number, np.full(3, number, np.float32))
    assert keep.newest("control", 4, 3).tolist() == [2, 2, 2]
    assert keep.newest("control", 4, 7) is None, "of another length"
    assert keep.newest("norms", 4, 3) is None
    keep.keep("control", 6, np.zeros(3, np.float32), oldest=5)
    assert keep.newest("control", 4, 3) is None
    keep.discard()
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("made", [{}], indirect=True)
def test_a_site_compares_what_it_was_given_with_what_it_trains_alone(made: Bed) -> None:
    row = made.agent.store.study(made.hash)
    with pytest.raises(ConsiliumError, match="no model yet"):
        compare(made.agent, row)
    ask(made, 1, model(made), 4, "test")
    assert made.call("deliver", made.parcel(), round=4).status == "done"
    seen: list[tuple[int, int]] = []
    text = compare(made.agent, made.agent.store.study(made.hash), lambda done, total: seen.append((done, total)))
    report = json.loads(text)
    assert seen == [(done, 4) for done in range(5)]
    assert report["steps"] == 4 * 3
    test = json.loads(made.agent.store.study(made.hash).result)
    assert report["federated"]["metrics"] == pytest.approx(test, rel=1e-5), "the delivered model is the tested one"
    assert report["alone"]["metrics"]["images"] == test["images"]
    assert report["alone"]["metrics"]["loss"] != test["loss"]
    assert (made.agent.models() / made.hash / "site-report.json").read_text() == text


@pytest.mark.parametrize("made", [{}], indirect=True)
def test_a_comparison_that_nobody_waits_for_is_broken_off(made: Bed) -> None:
    assert made.call("deliver", made.parcel(), round=4).status == "done"

    def gone(done: int, total: int) -> None:
        if done:
            raise ConsiliumError("The work was broken off", "tiny", "Start it again.")

    with pytest.raises(ConsiliumError, match="broken off"):
        compare(made.agent, made.agent.store.study(made.hash), gone)
    assert not (made.agent.models() / made.hash / "site-report.json").exists()


def test_no_more_is_claimed_of_a_gain_than_the_intervals_allow() -> None:
    def side(value: float, low: float, high: float) -> dict:
        return {"metrics": {"auroc": value}, "intervals": {"auroc": [low, high]}}

    report = {"primary": "auroc", "alone": side(0.8, 0.7, 0.86), "federated": side(0.9, 0.85, 0.95)}
    assert _gain(report) == (
        "Together +0.100 auroc. The two intervals overlap: another sample of patients could say otherwise."
    )
    assert "do not overlap" in _gain(report | {"federated": side(0.9, 0.87, 0.95)})
    assert "cannot be known" in _gain({"primary": "auroc", "alone": {}, "federated": {}})
