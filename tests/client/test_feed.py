"""Images on their way to the network: in order, alike on any number of threads, and nothing left running."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from client import feed as module
from client.feed import Feed, compute
from client.imaging import Cohort, Membership
from client.training import batches
from models import tasks, transforms
from privacy.errors import ConsiliumError

CPU = torch.device("cpu")
CLASSES = ("normal", "finding")
LABELLED = tasks.get({"task": {"kind": "classification", "classes": list(CLASSES)}})
MASKED = tasks.get({"task": {"kind": "segmentation", "classes": list(CLASSES)}})


def cohort(masks: bool = False, count: int = 12) -> Cohort:
    images = np.arange(count * 16, dtype=np.float32).reshape(count, 1, 4, 4)
    targets = images[:, 0].astype(np.uint8) % 2 if masks else np.arange(count, dtype=np.int64) % 2
    sides, names = (Membership.TRAIN,) * count, tuple(f"p{i}" for i in range(count))
    return Cohort(images, targets, names, sides, CLASSES, (), Counter(), "one image, one patient")


class Noisy:
    """Adds one number to an image, and turns its mask upside down."""

    anywhere = False

    def __call__(
        self, images: Tensor, seeds: Sequence[int], masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        added = torch.tensor([np.random.default_rng(seed).normal() for seed in seeds], dtype=torch.float32)
        return images + added.view(-1, 1, 1, 1), None if masks is None else masks.flip(1)


class Broken(Noisy):
    def __call__(
        self, images: Tensor, seeds: Sequence[int], masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        raise ConsiliumError("An image cannot be augmented", "tiny", "Correct the study.")


def walk(feed: Feed, count: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(4)
    drawn = batches(np.arange(12), 4, generator)
    return [(images.cpu().numpy(), targets.cpu().numpy()) for images, targets in feed.batches(drawn, generator, count)]


@pytest.mark.parametrize("masks", [False, True])
def test_a_second_thread_changes_nothing_of_what_is_drawn(masks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    task, found = MASKED if masks else LABELLED, []
    for cores in ({0}, {0, 1}):
        monkeypatch.setattr(module.os, "sched_getaffinity", lambda _, cores=cores: cores)
        found.append(walk(Feed(cohort(masks), task, CPU, Noisy())))
    for one, two in zip(*found, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_mask_moves_with_its_image() -> None:
    for images, masks in walk(Feed(cohort(masks=True), MASKED, CPU, Noisy())):
        assert masks.shape == (4, 4, 4)
        first_pixel = images[:, 0, 0, 0] - images[:, 0, 0, 1] + 1
        np.testing.assert_allclose(first_pixel, 0, atol=1e-4)
        assert np.array_equal(np.unique(masks), [0, 1])


def test_what_fails_in_the_other_thread_fails_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(ConsiliumError, match="cannot be augmented"):
        walk(Feed(cohort(), LABELLED, CPU, Broken()))


def test_a_walk_that_is_broken_off_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1})
    generator = np.random.default_rng(4)
    walked = Feed(cohort(), LABELLED, CPU, Noisy()).batches(batches(np.arange(12), 4, generator), generator, 1000)
    assert len(list(islice(walked, 3))) == 3
    walked.close()
    for thread in threading.enumerate():
        if thread.name == "images":
            thread.join(5)
            assert not thread.is_alive()


def test_the_time_spent_waiting_is_part_of_the_time() -> None:
    feed = Feed(cohort(), LABELLED, CPU, Noisy())
    assert len(walk(feed, 20)) == 20
    assert 0 < feed.waited <= feed.seconds


def test_without_augmentation_a_batch_is_the_cohorts_images() -> None:
    images, targets = Feed(cohort(), LABELLED, CPU).batch(np.array([3, 1]))
    assert np.array_equal(images.numpy(), cohort().images[[3, 1]])
    assert targets.tolist() == [1, 1]
    assert compute(torch.nn.Flatten(), images).dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("names", [[], ["random_flip", "random_contrast"], ["random_flip", "random_elastic"]])
def test_on_a_gpu_the_same_images_come_wherever_they_are_kept_and_augmented(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stay there, they are sent and augmented there, or they are augmented before (elastic)."""
    augment = transforms.augmenting([{"name": name} for name in names], (4, 4)) if names else None
    here = walk(Feed(cohort(masks=True), MASKED, CPU, augment))
    for share in (0.4, 0.0):
        monkeypatch.setattr(module, "RESIDENT_SHARE", share)
        data = cohort(masks=True)
        there = walk(Feed(data, MASKED, torch.device("cuda"), augment))
        assert bool(data.__dict__.get("_resident")) == (share > 0 and "random_elastic" not in names)
        for (image, mask), (expected, moved) in zip(there, here, strict=True):
            np.testing.assert_allclose(image, expected, rtol=1e-5, atol=1e-4)
            np.testing.assert_array_equal(mask, moved)
