"""Images that anybody may see, read as a hospital's are: what is shown to a model, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from client import samples
from models import weights
from privacy.errors import ConsiliumError
from tests import study_kit

MASKS: Mapping[str, Any] = {
    "task": {"kind": "segmentation", "classes": ["background", "tumour"]}, "network": {"name": "unet"}
}  # fmt: skip
FLAT: Mapping[str, Any] = {**MASKS, "input": {"size": [16, 24]}}
VOLUMES: Mapping[str, Any] = {**MASKS, "input": {"size": [16, 16, 24]}}
HOUNSFIELD = {"input": {"size": [8, 8], "transforms": [{"name": "window", "parameters": {"low": -100, "high": 100}}]}}


def pictures(folder: Path, channels: int = 1, count: int = 2) -> None:
    """PNG files of the folder, brighter from the left to the right."""
    folder.mkdir()
    for number in range(count):
        values = np.broadcast_to(np.linspace(0, 250, 24, dtype=np.uint8)[None, :, None], (20, 24, channels)).copy()
        values[..., -1] //= channels
        Image.fromarray(values[..., 0] if channels == 1 else values).save(folder / f"{number}.png")


def volume(folder: Path) -> None:
    """One CT of 10 slices, slice k full of 10 k."""
    folder.mkdir()
    values = np.broadcast_to(10.0 * np.arange(10), (12, 14, 10)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "head.nii.gz")


@pytest.mark.parametrize(
    ("sections", "write", "image", "answer"),
    [
        ({}, pictures, (2, 1, 8, 8), (2, 2)),
        ({"input": {"size": [8, 8], "channels": 3}}, lambda folder: pictures(folder, 3), (2, 3, 8, 8), (2, 2)),
        (FLAT, pictures, (2, 1, 16, 24), (2, 16, 24)),
        (FLAT, volume, (1, 1, 16, 24), (1, 16, 24)),
        (VOLUMES, volume, (1, 1, 16, 16, 24), (1, 16, 16, 24)),
    ],
)
def test_each_task_has_its_answer(
    sections: Mapping[str, Any],
    write: Callable[[Path], None],
    image: tuple[int, ...],
    answer: tuple[int, ...],
    tmp_path: Path,
) -> None:
    write(tmp_path / "public")
    (tmp_path / "public" / "LICENCE.txt").write_text("not an image, and not looked at")
    spec = study_kit.study(**sections).spec()
    (tmp_path / "model").write_bytes(weights.initial_state(spec, 1))
    found = samples.run(tmp_path / "public", spec, tmp_path / "model")
    assert (found["images"].shape, found["answers"].shape) == (image, answer)
    assert len(found["names"]) == len(found["images"])
    if sections in (FLAT, VOLUMES):
        assert found["answers"].dtype == np.uint8
        assert set(np.unique(found["answers"])) <= {0, 1}
    else:
        assert found["answers"].sum(axis=1) == pytest.approx(1.0)


def test_a_sample_is_prepared_as_the_study_prepares_a_hospitals(tmp_path: Path) -> None:
    """In the scanner's units where the study windows them; of a volume the middle slice."""
    volume(tmp_path / "public")
    spec = study_kit.study(**HOUNSFIELD).spec()
    assert samples.read(tmp_path / "public", "head.nii.gz", spec) == pytest.approx((50 + 100) / 200)


@pytest.mark.parametrize(
    ("sections", "write", "said"),
    [
        ({}, lambda folder: None, "The folder of samples cannot be read"),
        ({}, lambda folder: pictures(folder, count=0), "holds 0 images"),
        ({}, lambda folder: pictures(folder, count=samples.MOST + 1), "holds 25 images"),
        ({}, lambda folder: pictures(folder, channels=3), "0.png: colour where the study takes grey images"),
        (VOLUMES, pictures, "0.png: a single image"),
    ],
)
def test_a_sample_that_cannot_be_shown_is_named(
    sections: Mapping[str, Any], write: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    write(tmp_path / "public")
    with pytest.raises(ConsiliumError, match=said):
        samples.run(tmp_path / "public", study_kit.study(**sections).spec(), tmp_path / "model")
