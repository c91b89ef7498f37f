"""How are the training images of a batch changed at random, all at once and on their own device?

MONAI draws the numbers of every image, each from its own seed, and MONAI says what they mean; what a flip, an affine
move, a contrast, a brightness and a noise then do is done here for the whole batch in a few operations, because done
image by image it costs a millisecond each, for which a GPU would wait. The rarer steps are MONAI's own, image by image
on the processor (`Each`). Tests hold every step to MONAI's result for the same seed.

An image's result depends on the image and its seed alone, to the last bit on one device: no operation mixes images,
and a power, whose last bit depends on where in memory a number lies, is taken image by image.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

States = Sequence[np.random.RandomState]
_ALONE = threading.RLock()


class Step(ABC):
    """One random step of a study over the images of a batch.

    Args:
        transform: MONAI's, which draws.
        moves: label maps are moved with their images.

    Attributes:
        anywhere: it works on a GPU as well as on the processor.
    """

    anywhere: ClassVar[bool] = True

    def __init__(self, transform: Any, *, moves: bool) -> None:
        self._transform, self._moves = transform, moves

    @abstractmethod
    def __call__(self, images: Tensor, masks: Tensor | None, states: States) -> None:
        """Change a batch in place.

        Args:
            images: float32 [n, C, *size].
            masks: float32 [n, 1, *size], whole numbers, or None.
            states: what each image draws from.
        """


class Together(Step):
    """One that changes all images of a batch at once."""

    def __call__(self, images: Tensor, masks: Tensor | None, states: States) -> None:
        """Change a batch in place."""
        import torch

        drawn = [self._draw(images[0], state) for state in states]
        if not (hit := [place for place, numbers in enumerate(drawn) if numbers is not None]):
            return
        at, numbers = torch.tensor(hit, device=images.device), [drawn[place] for place in hit]
        images[at] = self._changed(images[at], numbers)
        if self._moves and masks is not None:
            masks[at] = self._changed(masks[at], numbers, nearest=True)

    def _draw(self, like: Tensor, state: np.random.RandomState) -> Any:
        self._transform.set_random_state(state=state)
        self._transform.randomize(like)
        return self._drawn() if self._transform._do_transform else None

    @abstractmethod
    def _drawn(self) -> Any:
        """What MONAI drew for one image."""

    @abstractmethod
    def _changed(self, images: Tensor, drawn: list[Any], *, nearest: bool = False) -> Tensor:
        """The images [k, C, *size] with what was drawn for each; `nearest`: they are label maps."""


class Flip(Together):
    """MONAI's RandFlip along one axis."""

    def _drawn(self) -> Any:
        return True

    def _changed(self, images: Tensor, drawn: list[Any], *, nearest: bool = False) -> Tensor:
        return images.flip(self._transform.flipper.spatial_axis)


class Affine(Together):
    """MONAI's RandAffine that turns in the plane of the last two axes, shifts and zooms, in one interpolation."""

    def _drawn(self) -> Any:
        drawn = self._transform.rand_affine_grid
        drawn.randomize()  # when called, MONAI's draws twice and takes the second
        return drawn.rotate_params[0], drawn.translate_params, drawn.scale_params

    def _changed(self, images: Tensor, drawn: list[Any], *, nearest: bool = False) -> Tensor:
        import torch

        matrix = torch.from_numpy(_matrices(drawn).astype(np.float32)).to(images.device)
        size = images.shape[2:]
        sides = [torch.arange(side, dtype=torch.float32, device=images.device) - (side - 1) / 2 for side in size]
        places = torch.meshgrid(*sides, indexing="ij")
        free = (slice(None), *(None,) * len(size))
        found = []
        for row, side in enumerate(size):
            # Products and sums one after the other: each is rounded in the same way wherever it lies in memory.
            place = matrix[:, row, -1][free]
            for column, base in enumerate(places):
                place = place + matrix[:, row, column][free] * base
            found.append(place * (2 / max(2, side)))
        mode = "nearest" if nearest else "bilinear"
        grid = torch.stack(found[::-1], dim=-1)
        return torch.nn.functional.grid_sample(
            images, grid, mode=mode, padding_mode=self._transform.padding_mode, align_corners=False
        )


class Contrast(Together):
    """MONAI's RandAdjustContrast: the image between its least and greatest value, to a power."""

    def _drawn(self) -> Any:
        return self._transform.gamma_value

    def _changed(self, images: Tensor, drawn: list[Any], *, nearest: bool = False) -> Tensor:
        import torch

        made = []
        for image, gamma in zip(images, drawn, strict=True):
            low = image.min()
            span = image.max() - low
            made.append(((image - low) / (span + 1e-7)) ** gamma * span + low)
        return torch.stack(made)


class Brightness(Together):
    """MONAI's RandShiftIntensity: one number is added to the whole image."""

    def _drawn(self) -> Any:
        return self._transform._offset

    def _changed(self, images: Tensor, drawn: list[Any], *, nearest: bool = False) -> Tensor:
        import torch

        offsets = torch.tensor(drawn, dtype=torch.float32, device=images.device)
        return images + offsets.view(-1, *[1] * (images.dim() - 1))


class Noise(Together):
    """MONAI's RandGaussianNoise: its own number for every pixel."""

    def _drawn(self) -> Any:
        return self._transform.noise

    def _changed(self, images: Tensor, drawn: list[Any], *, nearest: bool = False) -> Tensor:
        import torch

        return images + torch.from_numpy(np.stack(drawn)).to(images.device)


class Each(Step):
    """Any other step of MONAI's, image by image; where it interpolates, its call takes `mode`."""

    anywhere = False

    def __call__(self, images: Tensor, masks: Tensor | None, states: States) -> None:
        """Change a batch in place."""
        import torch

        for place, state in enumerate(states):
            self._transform.set_random_state(state=state)
            before = state.get_state()
            spared = state.rand() >= self._transform.prob  # MONAI's first draw is this coin
            state.set_state(before)
            if spared:
                self._transform.randomize(None)  # draws what it would have drawn, and does nothing
                continue
            images[place] = torch.as_tensor(self._transform(images[place].clone()))
            if masks is not None and self._moves:
                # Drawn again from the same state: with randomize=False, MONAI's Rand2DElastic bends anew.
                after = state.get_state()
                state.set_state(before)
                masks[place] = torch.as_tensor(self._transform(masks[place].clone(), mode="nearest"))
                state.set_state(after)


class Augmentation:
    """The random steps of a study in their order. Equal images with equal seeds give equal results.

    Attributes:
        anywhere: all steps work on a GPU; otherwise the images must be on the processor.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps, self._states = steps, list[np.random.RandomState]()
        self.anywhere = all(step.anywhere for step in steps)

    def __call__(
        self, images: Tensor, seeds: Sequence[int], masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Change the images of a batch, and move their label maps with them.

        Args:
            images: float32 [n, C, *input.size], left as they are.
            seeds: n whole numbers.
            masks: labels uint8 [n, *input.size], left as they are.

        Returns:
            Of the same shapes, dtypes and device.
        """
        import torch

        images = images.clone(memory_format=torch.contiguous_format)
        labels = None if masks is None else masks[:, None].to(torch.float32)
        with bare_arrays():
            # Kept for the next batch: to make one takes longer than to seed it.
            self._states += [np.random.RandomState() for _ in range(len(seeds) - len(self._states))]
            states = self._states[: len(seeds)]
            for state, seed in zip(states, seeds, strict=True):
                state.seed(seed % 2**32)
            for step in self._steps:
                step(images, labels, states)
        return images, None if labels is None or masks is None else labels[:, 0].to(masks.dtype)


def _matrices(drawn: list[Any]) -> Any:
    """[k, dims, dims + 1]: turn @ shift @ zoom of centred coordinates, as MONAI's AffineGrid multiplies them."""
    turns, shifts, zooms = (np.array(part, np.float64) for part in zip(*drawn, strict=True))
    dims = shifts.shape[1]
    turn = np.zeros((len(drawn), dims, dims))
    turn[:, range(dims), range(dims)] = 1.0
    turn[:, -1, -1] = turn[:, -2, -2] = np.cos(turns)
    turn[:, -1, -2] = np.sin(turns)
    turn[:, -2, -1] = -np.sin(turns)
    return np.concatenate([turn * zooms[:, None, :], turn @ shifts[:, :, None]], axis=2)


@contextmanager
def bare_arrays() -> Iterator[None]:
    """Without MONAI's metadata, which nothing here reads and which takes half of the time.

    One thread at a time: MONAI's switch is the whole process's, and its transforms keep what they drew.
    """
    from monai.data.meta_obj import get_track_meta, set_track_meta

    with _ALONE:
        before = get_track_meta()
        set_track_meta(False)
        try:
            yield
        finally:
            set_track_meta(before)
