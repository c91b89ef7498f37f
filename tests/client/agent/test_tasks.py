"""Every kind of task through a whole agent: images from a file in, update and sums out, its own result kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import additive, tasks
from models.weights import Layout
from privacy.study import Study
from tests.client.agent.bed import Bed, make_bed, with_sides


def _images(kind: str, size: tuple[int, ...], count: int = 40) -> dict[str, Any]:
    """Images with a bright half, and what is said of each."""
    generator, bright = np.random.default_rng(7), np.arange(count) % 2
    masks = np.zeros((count, *size), np.uint8)
    masks[bright == 1, ..., : size[-1] // 2] = 1
    images = (generator.normal(size=masks.shape) + 2 * masks).astype(np.float32)
    if kind == "segmentation":
        return {"images": images, "masks": masks}
    return {"images": images, "labels": np.stack([bright, 1 - bright], axis=1)}


CASES = [
    ("segmentation", (16, 16), "unet", "all", "dice"),
    ("segmentation", (16, 16, 16), "segresnet", "lora", "dice"),
    ("multilabel", (8, 8), "resnet-small", "adapters", "auroc"),
]


def _bed(folder: Path, kind: str, size: tuple[int, ...], network: str, train: str) -> Bed:
    bed = make_bed(
        folder, task={"kind": kind}, network={"name": network}, input={"size": list(size)}, transfer={"train": train}
    )
    np.savez(folder / "images.npz", **with_sides(_images(kind, size)))
    return bed


@pytest.mark.parametrize(("kind", "size", "network", "train", "primary"), CASES)
def test_an_agent_trains_and_measures(
    tmp_path: Path, kind: str, size: tuple[int, ...], network: str, train: str, primary: str
) -> None:
    bed = _bed(tmp_path, kind, size, network, train)
    bed.start()
    try:
        bed.ready()
        task, count = tasks.get(bed.study.spec()), Layout.of_state(bed.initial).count
        answer = bed.call("train", bed.vector, slot=1)
        assert answer.status == "done"
        vector = np.frombuffer(bed.fetch(answer), "<f4")
        assert vector.shape == (count + additive.size(task),)
        assert np.abs(vector[:count]).max() > 1e-6, "an update of what is trained"
        assert additive.leading(vector[count:])["train_examples"] > 0
        found = task.metrics(additive.task_sums(vector[count:]))
        assert primary == task.primary
        assert found["images"] > 0
        answer = bed.call("test", bed.vector, slot=2)
        tested = task.metrics(additive.task_sums(np.frombuffer(bed.fetch(answer), "<f4")))
        assert 0 <= tested[primary] <= 1
        assert bed.agent is not None
        row = bed.agent.store.study(bed.hash)
        assert row is not None
        assert json.loads(row.result)[primary] == pytest.approx(tested[primary], abs=1e-6)
    finally:
        bed.stop()


def test_what_travels_is_what_is_trained(tmp_path: Path) -> None:
    whole = _bed(tmp_path / "all", *CASES[1][:3], "all")
    part = _bed(tmp_path / "lora", *CASES[1][:3], "lora")
    assert len(part.vector) < 0.35 * len(whole.vector)
    assert isinstance(part.study, Study)
    assert part.study.transfer.train == "lora"
