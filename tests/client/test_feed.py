"""Images on their way to the network: in order, alike on any number of threads, and nothing left running."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from client import feed as module
from client.feed import Feed, compute
from client.imaging import Cohort, Membership
from client.training import batches
from models import tasks
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


def noisy(image: np.ndarray, seed: int, mask: np.ndarray | None = None):
    moved = image + np.float32(np.random.default_rng(seed).normal())
    return moved if mask is None else (moved, mask[::-1].copy())


def walk(feed: Feed, count: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(4)
    drawn = batches(np.arange(12), 4, generator)
    return [(images.numpy(), targets.numpy()) for images, targets in feed.batches(drawn, generator, count)]


@pytest.mark.parametrize("masks", [False, True])
def test_a_second_thread_changes_nothing_of_what_is_drawn(masks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    task, found = MASKED if masks else LABELLED, []
    for cores in ({0}, {0, 1}):
        monkeypatch.setattr(module.os, "sched_getaffinity", lambda _, cores=cores: cores)
        found.append(walk(Feed(cohort(masks), task, CPU, noisy)))
    for one, two in zip(*found, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_mask_moves_with_its_image() -> None:
    for images, masks in walk(Feed(cohort(masks=True), MASKED, CPU, noisy)):
        assert masks.shape == (4, 4, 4)
        first_pixel = images[:, 0, 0, 0] - images[:, 0, 0, 1] + 1
        np.testing.assert_allclose(first_pixel, 0, atol=1e-4)
        assert np.array_equal(np.unique(masks), [0, 1])


def test_what_fails_in_the_other_thread_fails_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1})

    def broken(image: np.ndarray, seed: int) -> np.ndarray:
        raise ConsiliumError("An image cannot be augmented", "tiny", "Correct the study.")

    with pytest.raises(ConsiliumError, match="cannot be augmented"):
        walk(Feed(cohort(), LABELLED, CPU, broken))


def test_a_walk_that_is_broken_off_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1})
    generator = np.random.default_rng(4)
    walked = Feed(cohort(), LABELLED, CPU, noisy).batches(batches(np.arange(12), 4, generator), generator, 1000)
    assert len(list(islice(walked, 3))) == 3
    walked.close()
    for thread in threading.enumerate():
        if thread.name == "images":
            thread.join(5)
            assert not thread.is_alive()


def test_the_time_spent_waiting_is_part_of_the_time() -> None:
    feed = Feed(cohort(), LABELLED, CPU, noisy)
    assert len(walk(feed, 20)) == 20
    assert 0 < feed.waited <= feed.seconds


def test_without_augmentation_a_batch_is_the_cohorts_images() -> None:
    images, targets = Feed(cohort(), LABELLED, CPU).batch(np.array([3, 1]))
    assert np.array_equal(images.numpy(), cohort().images[[3, 1]])
    assert targets.tolist() == [1, 1]
    assert compute(torch.nn.Flatten(), images).dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_on_a_gpu_images_that_are_not_augmented_stay_there() -> None:
    data = cohort()
    feed = Feed(data, LABELLED, torch.device("cuda"))
    images, _ = feed.batch(np.array([3, 1]))
    assert images.is_cuda
    assert np.array_equal(images.cpu().numpy(), data.images[[3, 1]])
