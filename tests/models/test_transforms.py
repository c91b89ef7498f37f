"""Preparation is the same on every call; augmentation follows its seed and nothing else."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import monai.transforms
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import fields, transforms
from models.transforms import TRANSFORMS, Preparation

NEEDED = {
    "window": {"low": "0.2", "high": "0.8"},
    "normalise": {"mean": "0.5", "std": "0.25"},
    "contrast": {"gamma": "2"},
}
RANDOM = [name for name, transform in TRANSFORMS.items() if transform.random]
ALWAYS = {"probability": "1"}
TURNS = [name for name in RANDOM if "edge" in TRANSFORMS[name].parameters]


def image(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def many(entries: Any, size: tuple[int, ...]) -> Any:
    """Steps as a function of one image, a seed and perhaps a mask."""
    if not all(TRANSFORMS[entry["name"]].random for entry in entries):
        prepare = Preparation(entries, size)
        return lambda image, seed=0: prepare(image)
    augment = transforms.augmenting(entries, size)

    def apply(image: Any, seed: int = 0, mask: Any = None) -> Any:
        labels = None if mask is None else torch.tensor(mask[None])
        images, masks = augment(torch.tensor(image[None]), [seed], labels)
        return images[0].numpy() if masks is None else (images[0].numpy(), masks[0].numpy())

    return apply


def one(name: str, size: tuple[int, ...] = (32, 32), **parameters: Any) -> Any:
    return many([{"name": name, "parameters": {**NEEDED.get(name, {}), **parameters}}], size)


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 32, 40), (1, 12, 16, 16)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_step_keeps_type_and_channels_and_leaves_its_input_alone(name: str, shape: tuple[int, ...]) -> None:
    given_image = image(*shape)
    before = given_image.copy()
    given_image.flags.writeable = False
    result = one(name, shape[1:])(given_image, seed=3)
    assert result.dtype == np.float32
    assert result.shape == shape
    assert np.isfinite(result).all()
    assert result.flags.writeable
    assert not np.shares_memory(result, given_image)
    np.testing.assert_array_equal(given_image, before)


@settings(max_examples=25)
@given(st.lists(st.sampled_from(RANDOM), min_size=1, max_size=3), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_a_seed_decides_alone(names: list[str], seed: int, other: int) -> None:
    steps = [{"name": name, "parameters": ALWAYS} for name in names]
    first, second = many(steps, (16, 16)), many(steps, (16, 16))
    expected = first(image(1, 16, 16), seed)
    first(image(1, 16, 16, seed=1), other)
    np.random.seed(other % 2**32)
    torch.manual_seed(other % 2**63)
    np.testing.assert_array_equal(first(image(1, 16, 16), seed), expected)
    np.testing.assert_array_equal(second(image(1, 16, 16), seed), expected)


@pytest.mark.parametrize("name", RANDOM)
def test_seeds_give_different_images_and_probability_nought_gives_the_same(name: str) -> None:
    source = image(1, 24, 24)
    results = {one(name, (24, 24))(source, seed).tobytes() for seed in range(30)}
    assert len(results) >= 2
    for seed in range(5):
        unchanged = one(name, (24, 24), probability="0")(source, seed)
        np.testing.assert_allclose(unchanged, source, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name not in RANDOM])
def test_preparation_does_not_know_the_seed(name: str) -> None:
    np.testing.assert_array_equal(one(name)(image(1, 32, 32), 1), one(name)(image(1, 32, 32), 2))


def by_monai(entries: Any, source: Any, seed: int) -> Any:
    """The same steps, done by MONAI to one image."""
    state, result = np.random.RandomState(seed), source
    for entry in entries:
        transform = TRANSFORMS[entry["name"]]
        step = transform.make(
            monai.transforms, fields.read(transform.parameters, entry["parameters"]), source.shape[1:]
        )
        step.set_random_state(state=state)
        result = step(result)
    return np.asarray(result)


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 24, 40), (2, 12, 16, 20)])
@pytest.mark.parametrize("name", RANDOM)
def test_a_step_does_what_MONAI_does_for_the_same_seed(name: str, shape: tuple[int, ...]) -> None:
    source = image(*shape, seed=2) - 0.25
    for parameters in ({}, ALWAYS, *({**ALWAYS, "edge": edge} for edge in ("zeros", "reflection") if name in TURNS)):
        entries = [{"name": name, "parameters": parameters}]
        entries.append({"name": "gaussian_noise", "parameters": ALWAYS})  # which shows that as much was drawn before it
        for seed in range(5):
            found = many(entries, shape[1:])(source, seed)
            np.testing.assert_allclose(found, by_monai(entries, source, seed), atol=2e-5)


def test_a_mask_goes_where_MONAI_takes_it() -> None:
    """But for pixels that lie half way between two of the source's."""
    mask, turn = np.random.default_rng(3).integers(0, 4, (40, 48)).astype(np.uint8), math.radians(20)
    for seed in range(5):
        theirs = monai.transforms.RandAffine(
            1.0, turn, None, [0.1 * 40, 0.1 * 48], [0.2, 0.2], (40, 48), "nearest", "border"
        )
        theirs.set_random_state(state=np.random.RandomState(seed))
        ours = one("random_affine", (40, 48), degrees="20", shift="0.1", zoom="0.2", **ALWAYS)
        found = ours(mask[None].astype(np.float32), seed, mask)[1]
        assert (found == np.asarray(theirs(mask[None].astype(np.float32)))[0]).mean() > 0.999


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(RANDOM), min_size=1, max_size=4),
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=9),
    st.sampled_from([(15, 17), (5, 7, 6)]),
)
def test_an_image_does_not_notice_what_else_is_in_its_batch(names: Any, seeds: Any, size: tuple[int, ...]) -> None:
    """To the last bit, or a patient's clipped gradient would depend on who else was sampled (RULES N4)."""
    augment = transforms.augmenting([{"name": name, "parameters": {}} for name in names], size)
    images = torch.from_numpy(image(len(seeds), 2, *size))
    masks = (images[:, 0] > 0.5).to(torch.uint8)
    before = images.clone(), masks.clone()
    together, labels = augment(images, seeds, masks)
    for place, seed in enumerate(seeds):
        alone, label = augment(images[place : place + 1], [seed], masks[place : place + 1])
        assert torch.equal(together[place], alone[0])
        assert torch.equal(labels[place], label[0])
    assert torch.equal(images, before[0])
    assert torch.equal(masks, before[1])


def test_threads_that_augment_with_the_same_steps_do_not_disturb_each_other() -> None:
    """A batch that a stopped training no longer wants may still be under way when the next one begins."""
    augment = transforms.augmenting([{"name": name} for name in ("random_affine", "random_elastic")], (12, 12))
    images = torch.from_numpy(image(16, 1, 12, 12))
    expected = [augment(images, list(range(start, start + 16)))[0] for start in range(8)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda turn: augment(images, list(range(turn % 8, turn % 8 + 16)))[0], range(64)))
    assert all(torch.equal(one, expected[turn % 8]) for turn, one in enumerate(found))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("size", [(32, 40), (12, 16, 16)])
def test_on_a_gpu_a_batch_is_augmented_as_on_the_processor(size: tuple[int, ...]) -> None:
    names = [name for name in RANDOM if transforms.augmenting([{"name": name}], size).anywhere]
    assert {"random_flip", "random_affine", "random_contrast"} <= set(names)
    for name in names:
        augment = transforms.augmenting([{"name": name, "parameters": ALWAYS}], size)
        images, seeds = torch.from_numpy(image(8, 1, *size)), list(range(8))
        masks = (images[:, 0] > 0.5).to(torch.uint8)
        there, moved = augment(images.cuda(), seeds, masks.cuda())
        here, labels = augment(images, seeds, masks)
        assert there.is_cuda
        torch.testing.assert_close(there.cpu(), here, atol=1e-4, rtol=1e-4)
        assert (moved.cpu() == labels).float().mean() > 0.999


EXPECTED = [
    ("scale_intensity", {}, [[2.0, 4.0], [6.0, 6.0]], [[0.0, 0.5], [1.0, 1.0]]),
    ("scale_intensity", {"low": "-1", "high": "1"}, [[2.0, 4.0], [6.0, 6.0]], [[-1.0, 0.0], [1.0, 1.0]]),
    ("window", {"low": "-100", "high": "100"}, [[-500.0, 0.0], [50.0, 900.0]], [[0.0, 0.5], [0.75, 1.0]]),
    ("normalise", {"mean": "3", "std": "2"}, [[3.0, 5.0], [1.0, 7.0]], [[0.0, 1.0], [-1.0, 2.0]]),
    ("contrast", {"gamma": "2"}, [[0.0, 0.5], [1.0, 1.0]], [[0.0, 0.25], [1.0, 1.0]]),
    ("random_flip", ALWAYS, [[1.0, 2.0], [3.0, 4.0]], [[2.0, 1.0], [4.0, 3.0]]),
    ("random_flip", {**ALWAYS, "axis": "vertical"}, [[1.0, 2.0], [3.0, 4.0]], [[3.0, 4.0], [1.0, 2.0]]),
]


@pytest.mark.parametrize(("name", "parameters", "before", "after"), EXPECTED)
def test_worked_by_hand(name: str, parameters: Any, before: Any, after: Any) -> None:
    result = one(name, (2, 2), **parameters)(np.array([before], np.float32))
    np.testing.assert_allclose(result[0], after, atol=1e-5)


def test_a_flat_image_stays_finite() -> None:
    for name in TRANSFORMS:
        assert np.isfinite(one(name)(np.full((1, 32, 32), 7, np.float32))).all(), name


def test_a_turn_of_half_a_circle_is_found_again() -> None:
    """The angle drawn is in degrees and within the bound: 180 or less, never radians taken for degrees."""
    source = np.zeros((1, 33, 33), np.float32)
    source[0, 4, 16] = 1
    angles = []
    for seed in range(60):
        turned = one("random_rotate", (33, 33), degrees="20")(source, seed)[0]
        row, column = np.unravel_index(turned.argmax(), turned.shape)
        angles.append(abs(np.degrees(np.arctan2(column - 16, 16 - row))))
    assert 12 < max(angles) <= 23


def test_a_shift_is_a_share_of_the_image() -> None:
    source = np.zeros((1, 41, 41), np.float32)
    source[0, 20, 20] = 1
    moves = []
    for seed in range(60):
        place = np.unravel_index(one("random_shift", (41, 41), shift="0.25")(source, seed)[0].argmax(), (41, 41))
        moves.append(max(abs(place[0] - 20), abs(place[1] - 20)))
    assert 8 <= max(moves) <= 11


@pytest.mark.parametrize("shape", [(1, 50, 70), (1, 8, 200), (1, 32, 32)])
def test_preparation_ends_in_the_size_of_the_network(spec_with: Any, shape: tuple[int, ...]) -> None:
    prepare = transforms.preparation(spec_with())
    assert prepare(image(*shape)).shape == (1, 32, 32)
    np.testing.assert_array_equal(prepare(image(*shape)), prepare(image(*shape)))


def test_steps_work_in_their_order() -> None:
    steps = [
        {"name": "scale_intensity", "parameters": {}},
        {"name": "normalise", "parameters": {"mean": "1", "std": "1"}},
    ]
    source = image(1, 8, 8)
    forward, backward = many(steps, (8, 8))(source), many(steps[::-1], (8, 8))(source)
    assert (float(forward.min()), float(backward.min())) == pytest.approx((-1, 0))


def test_monai_is_left_as_it_was(spec_with: Any) -> None:
    from monai.data.meta_obj import get_track_meta

    before = get_track_meta()
    transforms.augmentation(spec_with())(torch.from_numpy(image(1, 1, 32, 32)), [1])
    assert get_track_meta() == before


@pytest.mark.parametrize(
    ("build", "entry", "words"),
    [
        (transforms.augmenting, {"name": "random_filp"}, "Did you mean random_flip"),
        (Preparation, {"name": "window", "parameters": {"low": "1"}}, "missing"),
        (transforms.augmenting, {"name": "gaussian_noise", "parameters": {"std": "-1"}}, "a number from 0"),
        (transforms.augmenting, {"name": "scale_intensity"}, "is not random"),
        (Preparation, {"name": "random_flip"}, "is random"),
    ],
)
def test_a_step_that_does_not_exist_or_belongs_elsewhere_is_refused(build: Any, entry: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build([entry], (8, 8))


MOVES = [name for name, transform in TRANSFORMS.items() if transform.moves]


@pytest.mark.parametrize("size", [(32, 32), (16, 24, 24)])
@pytest.mark.parametrize("name", RANDOM)
def test_a_mask_follows_its_image(name: str, size: tuple[int, ...]) -> None:
    """The image is the mask itself, so wherever the moved image is surely inside or outside, so is the moved mask."""
    mask = np.zeros(size, np.uint8)
    mask[tuple(slice(side // 4, side // 2) for side in size)] = 3
    before, step, moved = mask.copy(), one(name, size, **ALWAYS), 0
    mask.flags.writeable = False
    for seed in range(6):
        picture = (mask > 0).astype(np.float32)[None]
        image, labels = step(picture, seed, mask)
        np.testing.assert_array_equal(image, step(picture, seed))
        assert (labels.dtype, labels.shape) == (np.uint8, size)
        assert set(np.unique(labels)) <= {0, 3}
        assert not np.shares_memory(labels, mask)
        if name in MOVES:
            sure = (image[0] > 0.8) | (image[0] < 0.2)
            assert ((labels > 0) == (image[0] > 0.5))[sure].mean() > 0.995
            moved += not np.array_equal(labels, before)
        else:
            np.testing.assert_array_equal(labels, before)
    assert moved or name not in MOVES
    np.testing.assert_array_equal(mask, before)


def test_several_steps_move_a_mask_as_one() -> None:
    steps = [{"name": name, "parameters": ALWAYS} for name in MOVES]
    pipeline, mask = many(steps, (32, 32)), np.zeros((32, 32), np.uint8)
    mask[8:20, 10:24] = 1
    for seed in range(10):
        image, labels = pipeline(mask[None].astype(np.float32), seed, mask)
        sure = (image[0] > 0.9) | (image[0] < 0.1)
        assert ((labels > 0) == (image[0] > 0.5))[sure].mean() > 0.99


def test_no_step_gives_copies() -> None:
    mask = np.ones((8, 8), np.uint8)
    picture, labels = many([], (8, 8))(image(1, 8, 8), 0, mask)
    assert not np.shares_memory(labels, mask)
    np.testing.assert_array_equal(labels, mask)
    assert picture.shape == (1, 8, 8)


def test_a_bend_is_a_share_of_the_image() -> None:
    for size in ((64, 64), (32, 32, 32)):
        moves = []
        for seed in range(8):
            mask = np.zeros(size, np.uint8)
            mask[tuple(slice(side // 4, 3 * side // 4) for side in size)] = 1
            labels = one("random_elastic", size, bend="0.1", probability="1")(
                mask[None].astype(np.float32), seed, mask
            )[1]
            moves.append((labels != mask).mean() / mask.mean())
        assert 0.01 < float(np.mean(moves)) < 0.5


def test_a_volume_is_flipped_along_each_of_its_axes() -> None:
    source = image(1, 4, 5, 6)
    for axis, number in (("depth", 1), ("vertical", 2), ("horizontal", 3)):
        flipped = one("random_flip", (4, 5, 6), axis=axis, **ALWAYS)(source)
        np.testing.assert_array_equal(flipped, np.flip(source, number))
