"""What would each hospital have had by itself? The same training without the others, on the same test images.

Every hospital trains from the study's initial weights for as many steps as it did in the federation, by the agent's
own training code, and each of the models is measured on the test images of all hospitals together. It can be done here
because the demo stands in for every hospital at once; in a real consortium nobody could.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from client import training
from client.imaging import Cohort, Membership, Source, load
from models import networks, tasks, transforms, weights
from privacy.study import Study

if TYPE_CHECKING:
    from torch import nn

Metrics = Mapping[str, float]


def cohort(study: Study, source: Source, agent: Path) -> Cohort:
    """A hospital's images as its agent sees them: same key, same split, same cache."""
    spec = study.spec()
    return load(
        source,
        spec["input"],
        spec["task"]["classes"],
        spec["split"],
        (agent / "pseudonym.key").read_bytes(),
        agent / "cache",
        prepare=transforms.preparation(spec),
    )


def train_alone(
    study: Study, initial: bytes, cohorts: Mapping[str, Cohort], tick: Callable[[str], None]
) -> dict[str, Metrics]:
    """Each hospital's own model, measured on the test images of all of them.

    Args:
        initial: the study's initial state (safetensors).
        cohorts: images by site.
        tick: called with the site's name after each of its rounds.

    Returns:
        {site: metrics}, AUROC among them.
    """
    import torch

    spec, plan = study.spec(), training.Plan.of(study)
    task, augment = tasks.get(spec), transforms.augmentation(spec)
    results: dict[str, Metrics] = {}
    for site, images in cohorts.items():
        network = networks.build(spec).to("cuda" if torch.cuda.is_available() else "cpu")
        weights.load_state(network, initial)
        for number in range(1, study.rounds.count + 1):
            vector = weights.trainable_vector(network)
            training.train(
                network, task, images, plan, number, vector, augment=augment, chance=plan.chance(site, "alone", number)
            )
            tick(site)
        results[site] = measure(study, network, cohorts)
    return results


def measure(study: Study, network: nn.Module, cohorts: Mapping[str, Cohort]) -> Metrics:
    """One model on the test images of all hospitals together."""
    task = tasks.get(study.spec())
    sums = np.zeros(task.size)
    for images in cohorts.values():
        sums += training.evaluate(network, task, images, Membership.TEST)
    return task.metrics(sums)


def measure_file(study: Study, model: Path, cohorts: Mapping[str, Cohort]) -> Metrics:
    """A published model file on the test images of all hospitals together."""
    network = networks.build(study.spec())
    weights.load_state(network, model)
    return measure(study, network, cohorts)
