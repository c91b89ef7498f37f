"""A published model's answers on public images: through the command, with the process that reads and runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models import networks, plots, tasks, transforms, weights
from privacy.study import Study
from privacy.terminal import run
from server.cli import app
from server.home import CoordinatorHome
from server.outputs import publisher
from server.registry import Registry
from server.samples import _words
from tests import study_kit

CELLS = Path(os.environ.get("CONSILIUM_DATA", Path(__file__).parents[3] / "shared" / "data")) / "wbc_segmentation"
MASKS: Mapping[str, Mapping[str, Any]] = {
    "task": {"kind": "segmentation", "classes": ["background", "cytoplasm", "nucleus"]},
    "network": {"name": "unet"},
    "input": {"channels": 3, "size": [32, 32], "transforms": [{"name": "scale_intensity"}]},
}
DRAWN = {"MODEL_CARD.md", "metrics.json", "model.safetensors", "overlays.png", "study.json"}


@dataclass
class Published:
    """A coordinator with one published model, and its command that exports it with samples."""

    root: Path
    capsys: pytest.CaptureFixture[str]

    def export(self, samples: Path) -> tuple[int, str]:
        """The exit status, and what was said on standard error without its line ends."""
        out = ["--out", str(self.root / "out"), "--samples", str(samples)]
        code = run(app, "c", ["-H", str(self.root / "home"), "models", "export", "tiny", *out])
        return code, " ".join(self.capsys.readouterr().err.split())

    @property
    def files(self) -> set[str]:
        """What stands in the exported folder."""
        return {path.name for path in (self.root / "out").iterdir()}

    def pixels(self, colour: str) -> int:
        """Pixels of a colour in the picture."""
        with Image.open(self.root / "out" / "overlays.png") as picture:
            wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
            return int((np.abs(np.asarray(picture.convert("RGB")).astype(int) - wanted).sum(axis=2) < 30).sum())


@pytest.fixture
def published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Published]:
    """(sections of a study, what trains its network) -> its model, published as the round loop does it."""

    def publish(sections: Mapping[str, Any], train: Callable[[Study, Any], None] | None = None) -> Published:
        import torch

        torch.set_num_threads(1)
        study = study_kit.study(**sections)
        state = weights.initial_state(study.spec(), 1)
        network = networks.build(study.spec())
        weights.load_state(network, state)
        if train is not None:
            train(study, network)
        assert run(app, "c", ["-H", str(tmp_path / "home"), "init", "lab", "--host", "localhost"]) == 0
        home = CoordinatorHome(tmp_path / "home")
        with Registry(home) as registry:
            initial = registry.blobs.put(state)
            flat = registry.blobs.put(weights.state_vector(state).tobytes())
            study = study.model_copy(update={"initial": study.initial.model_copy(update={"sha256": initial})})
            record = registry.add_study(study.document().signed_by(home.identity()), initial, flat)
            (tmp_path / "vector").write_bytes(weights.state_vector(weights.state_bytes(network)).tobytes())
            package = publisher(home, registry)(record, 1, tmp_path / "vector", [], None)
            registry.add_model(record.hash, 1, registry.blobs.put(package), {})
        return Published(tmp_path, capsys)

    return publish


def cells(study: Study, network: Any) -> None:
    """A few seconds of training: 40 steps on 40 white blood cells."""
    import torch

    prepare, task = transforms.preparation(study.spec()), tasks.get(study.spec())
    images, masks = [], []
    for number in range(1, 41):
        stem = CELLS / "site1_jiangxi_tecom" / f"{number:03d}"
        with Image.open(f"{stem}.png") as picture, Image.open(f"{stem}_mask.png") as mask:
            images.append(prepare(np.moveaxis(np.asarray(picture.convert("RGB"), np.float32) / 255, -1, 0)))
            masks.append(np.asarray(mask.convert("L").resize((32, 32), Image.Resampling.NEAREST)))
    values = np.stack(masks)
    inputs, targets = torch.from_numpy(np.stack(images)), torch.from_numpy((values > 64).astype("u1") + (values > 192))
    optimiser = torch.optim.AdamW(network.parameters(), 1e-2)
    dice = torch.Generator().manual_seed(1)
    network.train()
    for _ in range(40):
        chosen = torch.randint(40, (8,), generator=dice)
        optimiser.zero_grad()
        task.losses(network(inputs[chosen]), targets[chosen]).mean().backward()
        optimiser.step()


@pytest.mark.skipif(not CELLS.exists(), reason=f"REAL DATA ABSENT: {CELLS} (set CONSILIUM_DATA)")
def test_outlines_of_a_trained_model_are_drawn_on_public_images(
    published: Callable[..., Published], tmp_path: Path
) -> None:
    samples = tmp_path / "public"
    samples.mkdir()
    for site, number in (("site1_jiangxi_tecom", 201), ("site1_jiangxi_tecom", 202), ("site2_cellavision", 3)):
        shutil.copy(CELLS / site / f"{number:03d}.png", samples / f"{site}-{number:03d}.png")
    (samples / "LICENCE.txt").write_text("not an image, and not looked at")
    made = published(MASKS, cells)
    assert made.export(samples) == (0, "")
    assert made.files >= DRAWN
    assert min(made.pixels(plots.BLUE), made.pixels(plots.VERMILION)) > 500


def pictures(folder: Path) -> Path:
    """A folder with two small PNG files."""
    folder.mkdir()
    for number in range(2):
        values = np.random.default_rng(number).integers(0, 256, (20, 24), np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
    return folder


def test_findings_of_whole_images_are_told_in_words(published: Callable[..., Published], tmp_path: Path) -> None:
    made = published({"task": {"kind": "multilabel", "classes": ["mass", "nodule"]}})
    assert made.export(pictures(tmp_path / "public")) == (0, "")
    assert made.files >= DRAWN
    classes = ("mass", "nodule")
    assert _words([0.7, 0.91], classes, several=True) == "nodule 0.91, mass 0.70"
    assert _words([0.2, 0.1], classes, several=True) == "no finding"
    assert _words([0.3, 0.7], classes, several=False) == "nodule 0.70"


@pytest.mark.parametrize("own_norms", [True, False])
def test_what_cannot_be_shown_is_named_and_nothing_remains(
    published: Callable[..., Published], tmp_path: Path, own_norms: bool
) -> None:
    made = published({"local": {"norms": "local"}} if own_norms else {})
    samples = pictures(tmp_path / "public")
    (samples / "1.png").write_bytes((samples / "0.png").read_bytes()[:300])
    code, said = made.export(samples)
    assert (code, made.files) == (1, set())
    assert ("stayed at the hospitals" if own_norms else "1.png: the file ends too early") in said
    assert "Traceback" not in said


def test_a_process_that_ends_early_leaves_nothing_behind(
    published: Callable[..., Published], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = published({})
    monkeypatch.setattr("sys.executable", "/bin/false")
    code, said = made.export(pictures(tmp_path / "public"))
    assert (code, made.files) == (1, set())
    assert "ended early" in said
