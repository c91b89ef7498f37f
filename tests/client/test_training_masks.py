"""The local step on masks: image and label map are moved together, and a network learns to find a disc."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from client.imaging import Cohort, Membership
from client.training import Plan, evaluate, train
from models import networks, tasks, transforms, weights

torch.set_num_threads(1)

PLAN = Plan("adamw", 0.01, 0.0, 0.0, 8, schedule="constant", local_steps=30, rounds=1, proximal_mu=0.0, seed=1)


def discs(size: list[int], count: int = 40, training: int = 30) -> Cohort:
    """Discs or balls in noise, half a millimetre between neighbours."""
    generator = np.random.default_rng(1)
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"))
    masks = np.zeros((count, *size), np.uint8)
    for mask in masks:
        centre = generator.uniform(0.3, 0.7, len(size)) * size
        away = ((grid - centre.reshape(-1, *[1] * len(size))) ** 2).sum(0)
        mask[...] = away < (0.25 * size[0]) ** 2
    images = (0.3 * generator.normal(size=(count, 1, *size)) + masks[:, None]).astype(np.float32)
    sides = tuple(Membership.TRAIN if i < training else Membership.VALIDATION for i in range(count))
    names, spacing = tuple(f"p{i}" for i in range(count)), np.full((count, len(size)), 0.5, np.float32)
    return Cohort(images, masks, names, sides, ("background", "disc"), (), Counter(), "one image", spacing)


@pytest.mark.parametrize("size", [[32, 32], [16, 16, 16]])
def test_a_network_learns_to_find_a_disc(size: list[int]) -> None:
    spec: dict[str, Any] = {
        "task": {"kind": "segmentation", "classes": ["background", "disc"]},
        "network": {"name": "unet"},
        "input": {"channels": 1, "size": size, "augmentation": [{"name": "random_flip"}, {"name": "random_shift"}]},
        "optimiser": {"batch_size": 8},
    }
    torch.manual_seed(0)
    network, task, cohort = networks.build(spec), tasks.get(spec), discs(size)
    before = task.metrics(evaluate(network, task, cohort, Membership.VALIDATION))
    train(
        network, task, cohort, PLAN, 1, weights.trainable_vector(network), augment=transforms.augmentation(spec)
    )  # fmt: skip
    after = task.metrics(evaluate(network, task, cohort, Membership.VALIDATION))
    assert after["images"] == 10
    assert after["dice:disc"] > 0.75 > before["dice:disc"]
    assert 0 < after["hd95:disc"] < 2, "in mm: two voxels are one"
    coarse = task.metrics(evaluate(network, task, replace(cohort, spacing=2 * cohort.spacing), Membership.VALIDATION))
    assert coarse["hd95:disc"] == pytest.approx(2 * after["hd95:disc"]), "the same discs, a millimetre apart"
    assert after["loss"] < before["loss"]
