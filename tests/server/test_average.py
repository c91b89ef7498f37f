"""`aggregation.ema`: what is judged, published and delivered is the moving average; training goes on from the model."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from models import weights
from privacy.messages import Request
from server.course import Course
from server.records import State
from server.simulation import Simulation
from tests import study_kit
from tests.server.round_kit import Bench
from tests.server.secure_kit import SecureBench
from tests.server.test_secure_checks import far_out
from tests.study_kit import Sections

Model = npt.NDArray[np.float32]
SITES = ("north", "south", "west")
DECAY = 0.3


def after(before: Model, model: Model, done: int) -> Model:
    """The average with one more model in it, after `done` rounds."""
    decay = min(DECAY, (1 + done) / (10 + done))
    return (decay * before.astype(np.float64) + (1 - decay) * model.astype(np.float64)).astype(np.float32)


def average(models: list[Model]) -> Model:
    """The moving average by itself: from the models of all rounds, the first weights before them."""
    found = models[0]
    for done, model in enumerate(models[1:]):
        found = after(found, model, done)
    return found


def read(path: Path) -> Model:
    return np.frombuffer(path.read_bytes(), "<f4")


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Model]]:
    """The models of all rounds of a study, by its hash: older ones are forgotten while it runs."""
    real, seen = Course.commit_round, dict[str, dict[int, Model]]()

    def commit(self: Course, *given: object) -> None:
        real(self, *given)  # type: ignore[arg-type]
        for row in self.checkpoints():
            if row.weights:
                seen.setdefault(self._study, {})[row.round] = read(self._blobs.path(row.weights))

    monkeypatch.setattr(Course, "commit_round", commit)
    return lambda study: [model for _, model in sorted(seen[study].items())]


def averaged(kind: type[Bench], folder: Path, **sections: dict[str, object]) -> Bench:
    aggregation = {"ema": DECAY, **sections.pop("aggregation", {})}
    return kind(folder, aggregation=aggregation, **sections)


def judged(bench: Bench) -> dict[str, set[str]]:
    """Blobs that sites were asked about, by kind."""
    found: dict[str, set[str]] = {}
    for slot in bench.course.slots():
        found.setdefault(slot.kind, set()).add(slot.payload)
    return found


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [(Bench, "fedavg"), (Bench, "fedadam"), (Bench, "scaffold"), (SecureBench, "fedavg"), (SecureBench, "fedadam")],
)
def test_the_average_is_judged_and_published_and_training_goes_on_as_without(
    tmp_path: Path, models: Callable[[str], list[Model]], kind: type[Bench], strategy: str
) -> None:
    rule: dict[str, object] = {"strategy": strategy, "server_learning_rate": 0.5}
    sections = {"rounds": {"count": 5}, **({"optimiser": {"name": "sgd"}} if strategy == "scaffold" else {})}
    plain = kind(tmp_path / "plain", aggregation=rule, **sections)
    bench = averaged(kind, tmp_path / "averaged", aggregation=rule, **sections)
    for one in (plain, bench):
        assert one.run() is State.FINISHED, one.registry.study(one.hash).reason
    without, found = models(plain.hash), models(bench.hash)
    assert [model.tobytes() for model in found] == [model.tobytes() for model in without]
    expected = average(found)
    assert not np.allclose(expected, found[-1], atol=1e-3), "else nothing is shown"
    (last,) = bench.course.checkpoints()[-1:]
    np.testing.assert_array_equal(read(bench.registry.blobs.path(last.memory[-1])), expected)
    asked = judged(bench)
    assert asked["validate"] == asked["test"] == {last.memory[-1]}
    assert last.memory[-1] not in asked["train"]
    package = bench.registry.blobs.path(bench.registry.models()[0].package).read_bytes()
    assert package.startswith(expected.tobytes())


def test_nothing_more_is_sent(tmp_path: Path) -> None:
    """Requests are as large as without it: the average stays where it is."""
    sizes = []
    for name, ema in (("without", 0), ("with", DECAY)):
        bench = Bench(tmp_path / name, aggregation={"ema": ema})
        bench.run()
        sizes.append([Request.decode(slot.request, None).header.payload_bytes for slot in bench.course.slots()])
    assert sizes[0] == sizes[1]


def test_a_round_that_changes_nothing_and_the_first_weights_leave_the_average_alone(
    tmp_path: Path, models: Callable[[str], list[Model]]
) -> None:
    bench = averaged(SecureBench, tmp_path, secagg={"norm_bound": "0.5", "examples_bound": 100})
    assert isinstance(bench, SecureBench)
    bench.sites["cleo"].shift = far_out
    assert bench.run() is State.PAUSED
    assert bench.course.checkpoints()[1].memory == (), "round 1 was left out, and nothing is averaged yet"
    bench.sites["cleo"].shift = lambda words: words
    bench.registry.resume(bench.hash)
    assert bench.loop().run() is State.FINISHED
    found = models(bench.hash)
    assert found[0].tobytes() == found[1].tobytes()
    expected = after(average(found[1:3]), found[3], 2)
    np.testing.assert_array_equal(read(bench.registry.blobs.path(bench.course.checkpoints()[-1].memory[-1])), expected)


def test_a_round_that_is_taken_back_takes_its_average_back(tmp_path: Path) -> None:
    bench = averaged(SecureBench, tmp_path, rounds={"count": 6})
    stops = [4]

    def watch() -> None:
        if stops and len(bench.course.checkpoints()) > stops[0] and bench.registry.study(bench.hash).state == "running":
            stops.pop()
            bench.registry.pause(bench.hash)

    bench.clock.watch = watch
    for site in bench.sites.values():
        site.delay = 5.0
    assert bench.run() is State.PAUSED
    rows = {row.round: row for row in bench.course.checkpoints()}
    averages = {number: row.memory[-1] for number, row in rows.items() if row.memory}
    assert len(set(averages.values())) == len(averages) >= 3
    last = max(rows)
    bench.registry.back_to(bench.hash, last - 2)
    again = bench.course.checkpoints()[-1]
    assert (again.weights, again.memory[-1]) == (rows[last - 2].weights, averages[last - 2])
    before = read(bench.registry.blobs.path(again.memory[-1]))
    bench.registry.resume(bench.hash)
    committed: list[tuple[Model, Model]] = []
    real = Course.commit_round

    def commit(self: Course, *given: object) -> None:
        real(self, *given)  # type: ignore[arg-type]
        row = self.checkpoints()[-1]
        committed.append((read(self._blobs.path(row.weights)), read(self._blobs.path(row.memory[-1]))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Course, "commit_round", commit)
        assert bench.loop().run() is State.FINISHED
    for done, (model, found) in enumerate(committed, last):
        before = after(before, model, done)
        np.testing.assert_array_equal(found, before)
    assert committed


# ---- with real agents, and with noise -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulation]:
    """90 patients with two images each; who has the finding is brighter."""
    folder = tmp_path_factory.mktemp("set")
    labels = np.array([i // 2 % 2 for i in range(180)])
    pixels = np.random.default_rng(2).integers(0, 150, (180, 8, 8)) + 100 * labels[:, None, None]
    np.savez(folder / "images.npz", images=pixels.astype(np.uint8))
    rows = [f"{i},{labels[i]},p{i // 2}" for i in range(180)]
    (folder / "index.csv").write_text("\n".join(["file,label,patient", *rows]))
    with Simulation(folder, SITES, threads=1) as made:
        yield made


NOISE = {
    "noise_multiplier": 0.5, "sampling_rate": 0.5, "images_per_patient": 2, "expected_patients": 20,
    "patients_bound": 400, "site_patients_bound": 30, "delta": 0.001, "evaluation_noise": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("mode", ["none", "shared", "per-site"])
@pytest.mark.parametrize("standardised", [False, True])
def test_real_agents_with_and_without_noise(
    simulation: Simulation, models: Callable[[str], list[Model]], tmp_path: Path, mode: str, standardised: bool
) -> None:
    noise: Sections = {} if mode == "none" else {"privacy": {"mode": mode, **NOISE}}
    study = study_kit.study(
        f"average-{mode}-{int(standardised)}",
        SITES,
        **study_kit.merged(
            {
                "network": {"weight_standardisation": standardised},
                "optimiser": {"learning_rate": 0.05, "batch_size": 16},
                "rounds": {"count": 3, "local_steps": 1},
                "aggregation": {"weights": "equal", "minimum_sites": 3, "ema": DECAY},
                "secagg": {"mode": "on"},
            },
            noise,
        ),
    )
    done = simulation.run(study)
    assert done.test is not None
    found = models(done.record.hash)
    assert len(found) == 4
    expected = average(found)
    simulation.export(done, tmp_path / "out")
    assert weights.state_vector(tmp_path / "out" / "model.safetensors").tobytes() == expected.tobytes()
    with zipfile.ZipFile(tmp_path / "out" / "delivery.zip") as package:
        assert package.read("model.safetensors") == (tmp_path / "out" / "model.safetensors").read_bytes()
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert "3, the moving average of the models until then (decay 0.3)" in card
    assert ("weights standardised" in card) == standardised
