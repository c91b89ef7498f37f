"""The study contract: one canonical body, one hash, and messages that name the remedy."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.canonical import canonical
from privacy.errors import ConsiliumError, Refusal
from privacy.identity import Document, Identity
from privacy.study import Study, read_signed
from privacy.study_text import explain, template

DRAFT = template("alpha", ["st-anna", "st-berta"])
VECTORS = Path(__file__).parent.parent / "vectors" / "study"


def test_the_template_is_a_study_as_it_stands():
    study = Study.from_toml(DRAFT)
    assert study.sites == ("st-anna", "st-berta")
    assert study.slots == 10 + 5 + 2


def test_the_signed_body_leaves_nothing_open():
    """Every default is written out, so no release can ever read the same hash differently."""
    body = Study.from_toml(DRAFT).body()
    minimal = """
    sites = ["st-berta", "st-anna"]
    study = { name = "alpha", title = "Chest X-ray triage", purpose = "%s" }
    task = { classes = ["normal", "finding"] }
    network = { name = "densenet-small" }
    input = { size = [64, 64], transforms = [{ name = "scale_intensity" }], augmentation = [{ name = "random_flip" }] }
    """
    assert Study.from_toml(minimal % body["study"]["purpose"]).body() == body


@pytest.mark.parametrize("spelling", ["0.001", "1e-3", "0.0010", '"0.001"', "1.0e-3"])
def test_one_real_number_has_one_spelling(spelling):
    changed = DRAFT.replace("learning_rate = 0.001", f"learning_rate = {spelling}")
    assert Study.from_toml(changed).hash == Study.from_toml(DRAFT).hash


@given(st.floats(min_value=1e-10, max_value=1e10))
def test_reals_keep_their_value(value):
    study = Study.from_toml(DRAFT.replace("learning_rate = 0.001", f"learning_rate = {value!r}"))
    assert study.spec()["optimiser"]["learning_rate"] == value


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "alpha"', 'name = "Alpha Beta"', "study.name"),
        ("learning_rate = 0.001", "learning_rate = 0", "optimiser.learning_rate"),
        ("learning_rate = 0.001", "learning_rate = nan", "optimiser.learning_rate"),
        ("count = 10", "count = 0", "rounds.count"),
        ("count = 10", "cuont = 10", "no such entry"),
        ('title = "Chest X-ray triage"', "", "missing"),
        ("minimum_sites = 2", "minimum_sites = 3", "minimum_sites"),
        ('strategy = "fedavg"', 'strategy = "fedprox"', "proximal_mu"),
        ('strategy = "fedavg"', 'strategy = "mode"', "aggregation.strategy"),
        ('strategy = "fedavg"', 'strategy = "median"', "needs every hospital's single update"),
        ('strategy = "fedavg"', 'strategy = "scaffold"', "plain gradient steps"),
        ("personal_weight = 0.1", "personal_weight = 0", "local.personal_weight"),
        ("seed = 0 ", "seed = -1 ", "rounds.seed"),
        ("test = 0.2", "test = 0.8", "leave at least a tenth"),
        ('"st-anna", "st-berta"', '"st-anna", "st-anna"', "twice"),
        ('mode = "off"', 'mode = "on"', "secagg.mode"),
        ('norm = "group"', 'norm = "layer"', "network.norm"),
        ("weight_standardisation = false", 'weight_standardisation = "yes"', "network.weight_standardisation"),
        ("ema = 0.0", "ema = 1", "initial weights for ever"),
        ("ema = 0.0", "ema = 1.5", "aggregation.ema"),
        ("schema = 1", "schema = 2", "schema"),
        ("[task]", "[task", "not valid TOML"),
    ],
)
def test_what_cannot_stand_is_named_with_its_remedy(old, new, words):
    with pytest.raises(ConsiliumError, match=words) as caught:
        Study.from_toml(DRAFT.replace(old, new), "alpha.toml")
    assert "alpha.toml" in caught.value.subject
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregation": {"strategy": "scaffold"}, "optimiser": {"name": "sgd"}}, "scaffold"),
        ({"local": {"norms": "local"}}, "local.norms"),
        ({"local": {"personal": "ditto"}}, "ditto"),
        ({"rounds": {"seed": 3}}, "who was sampled"),
    ],
)
def test_N1_N3_what_keeps_unnoised_state_or_tells_the_sample_is_refused_with_noise_on(changes, words):
    """The rule is asked of a study whose privacy mode is not "none", whatever modes there are."""
    study = Study.from_toml(DRAFT)
    parts = {name: getattr(study, name).model_copy(update=values) for name, values in changes.items()}
    noisy = study.model_copy(update={**parts, "privacy": study.privacy.model_copy(update={"mode": "shared"})})
    with pytest.raises(ValueError, match=words):
        noisy._learning_fits()
    study.model_copy(update=parts)._learning_fits()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('choose = "last"', 'choose = "best-validation"', "chooses among the models that were validated"),
        ('norms = "shared"', 'norms = "local"', "fit the newest model"),
    ],
)
def test_an_average_is_refused_beside_what_speaks_of_single_models(old, new, words):
    Study.from_toml(DRAFT.replace(old, new))
    with pytest.raises(ConsiliumError, match=words):
        Study.from_toml(DRAFT.replace("ema = 0.0", "ema = 0.9").replace(old, new))


def test_the_explanation_says_what_is_averaged_and_standardised():
    plain = dict(explain(Study.from_toml(DRAFT)))
    changed = DRAFT.replace("ema = 0.0", "ema = 0.90").replace(
        "weight_standardisation = false", "weight_standardisation = true"
    )
    words = dict(explain(Study.from_toml(changed)))
    assert plain["Published"] == "the model of the last round"
    assert words["Published"] == "the moving average of the models over the rounds, with decay 0.9"
    assert words["Network"] == plain["Network"] + ", weights standardised"


def test_scaffold_is_refused_with_secure_aggregation():
    study = Study.from_toml(DRAFT)
    aggregation = study.aggregation.model_copy(update={"strategy": "scaffold"})
    secagg = study.secagg.model_copy(update={"mode": "on"})
    optimiser = study.optimiser.model_copy(update={"name": "sgd"})
    chosen = study.model_copy(update={"aggregation": aggregation, "secagg": secagg, "optimiser": optimiser})
    with pytest.raises(ValueError, match="secure aggregation"):
        chosen._learning_fits()


def test_a_signed_study_is_read_back_and_only_from_its_coordinator():
    coordinator = Identity.generate()
    study = Study.from_toml(DRAFT)
    document = study.document().signed_by(coordinator)
    assert read_signed(Document.decode(document.encode(), "study"), coordinator.public) == study
    with pytest.raises(Refusal):
        read_signed(document, Identity.generate().public)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("publish"),
        lambda body: body["optimiser"].update(learning_rate="1e-3"),
        lambda body: body["optimiser"].update(learning_rate=1),
        lambda body: body.update(sites=["st-berta", "st-anna"]),
        lambda body: body.update(command="rm -rf /"),
        lambda body: body["network"]["parameters"].update(x={"y": {"z": None}}) or body.update(schema="1"),
    ],
)
def test_a_body_written_any_other_way_is_malformed_even_when_signed(change):
    coordinator = Identity.generate()
    body = Study.from_toml(DRAFT).body()
    change(body)
    with pytest.raises(Refusal):
        read_signed(Document("study", body).signed_by(coordinator), coordinator.public)


def test_the_explanation_says_plainly_what_leaves_and_what_is_not_protected():
    words = dict(explain(Study.from_toml(DRAFT)))
    assert "NO differential privacy" in words["Privacy"]
    assert "OFF" in words["Secure aggregation"]
    assert "weights" in words["Leaves the site"]
    assert words["Hash"] == Study.from_toml(DRAFT).hash


def test_the_golden_study_keeps_its_bytes_and_hash_for_ever():
    """A change here breaks every study already signed: it needs a new schema number instead."""
    golden = json.loads((VECTORS / "golden.json").read_text())
    study = Study.from_toml(golden["toml"])
    assert canonical(study.body()).decode() == golden["canonical"]
    assert study.hash == golden["hash"]
