"""How do images reach the network without letting it wait?

On a GPU the images of a cohort stay there from their first use, as long as they fit, and are augmented there
(`models.augmentation`). Where one of a study's steps works on the processor only, and where there is no GPU, batches
are gathered and augmented up to two ahead by a second thread, if there is a second core, and come from pinned memory.
Convolutions on a GPU run in bfloat16 with channels last; weights, gradients and losses stay float32, without a loss
scale, which would be state computed from patients (RULES N3). What is drawn does not depend on which thread does it.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from client.imaging import Cohort
from models.tasks import Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Batch = tuple["Tensor", "Tensor"]
_Taken = tuple["Tensor", "Tensor", "list[int] | None"]
"""Images, targets, and the seeds of what is still to be done to them."""
Indices = npt.NDArray[np.int64]

AHEAD = 2
RESIDENT_SHARE = 0.4
"""At most this share of the GPU's free memory holds images."""


class Dice(Protocol):
    """What seeds are drawn from: numpy's generator, or `client.private.sample.Seeds`."""

    def integers(self, low: int, high: int, size: int) -> npt.NDArray[np.int64]:
        """`size` whole numbers from `low` to `high` - 1."""
        ...


class Augment(Protocol):
    """What training images go through, as `models.transforms.augmentation` gives it."""

    anywhere: bool

    def __call__(self, images: Tensor, seeds: Sequence[int], masks: Tensor | None = None) -> tuple[Tensor, Any]:
        """Images float32 [n, C, *size], n seeds and uint8 [n, *size] -> images and masks of the same shapes."""
        ...


class Feed:
    """The images of one cohort on their way to one device.

    Attributes:
        seconds: how long the last walk through `batches` took.
        waited: how much of that the network waited for images.
    """

    def __init__(self, cohort: Cohort, task: Task, device: torch.device, augment: Augment | None = None) -> None:
        self._cohort, self._device, self._augment = cohort, device, augment
        self._together = task.target == "mask"  # an image moves with its mask
        self._late = device.type == "cuda" and augment is not None and augment.anywhere
        self.seconds = self.waited = 0.0

    def batch(self, chosen: Indices, generator: Dice | None = None) -> Batch:
        """Images float32 [n, C, *size] and their targets on the device, augmented with seeds from `generator`."""
        return self._finished(*self._taken(chosen, generator))

    def batches(
        self, drawn: Iterator[Indices], generator: np.random.Generator, count: int
    ) -> Generator[Batch, None, None]:
        """`count` batches of the positions in `drawn`."""
        begun, self.waited = time.monotonic(), 0.0
        ready: Generator[_Taken, None, None] = (self._taken(next(drawn), generator) for _ in range(count))
        if self._kept() is None and len(os.sched_getaffinity(0)) > 1:
            ready = _ahead(ready, pinned=self._device.type == "cuda")
        with closing(ready):
            for _ in range(count):
                asked = time.monotonic()
                images, targets = self._finished(*next(ready))
                self.waited += time.monotonic() - asked
                yield images, targets
        self.seconds = time.monotonic() - begun

    def _taken(self, chosen: Indices, generator: Dice | None) -> _Taken:
        """The images as they lie where they are kept, augmented if that has to happen there."""
        import torch

        if (kept := self._kept()) is not None:
            at = torch.from_numpy(chosen).to(self._device)
            images, targets = kept[0][at], kept[1][at]
        else:
            images, targets = (torch.from_numpy(part[chosen]) for part in (self._cohort.images, self._cohort.targets))
        if self._augment is None or generator is None:
            return images, targets, None
        seeds: list[int] = generator.integers(0, 2**32, size=len(chosen)).tolist()
        return (images, targets, seeds) if self._late else (*self._augmented(images, targets, seeds), None)

    def _finished(self, images: Tensor, targets: Tensor, seeds: list[int] | None) -> Batch:
        images, targets = self._send(images), self._send(targets)
        return (images, targets) if seeds is None else self._augmented(images, targets, seeds)

    def _augmented(self, images: Tensor, targets: Tensor, seeds: list[int]) -> Batch:
        assert self._augment is not None
        if self._together:
            return self._augment(images, seeds, targets)
        return self._augment(images, seeds)[0], targets

    def _send(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda" or tensor.is_cuda:
            return tensor
        return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(self._device, non_blocking=True)

    def _kept(self) -> Batch | None:
        """The whole cohort on the GPU; None where there is none, it has no room, or the processor has to augment."""
        if self._device.type != "cuda" or (self._augment is not None and not self._late):
            return None
        import torch

        kept: dict[str, Batch] = self._cohort.__dict__.setdefault("_resident", {})
        name = str(self._device)
        if name not in kept:
            free, _ = torch.cuda.mem_get_info(self._device)
            if self._cohort.images.nbytes > RESIDENT_SHARE * free:
                return None
            images = torch.from_numpy(np.array(self._cohort.images)).to(self._device)
            kept[name] = (images, torch.from_numpy(np.array(self._cohort.targets)).to(self._device))
        return kept[name]


def place(network: nn.Module, device: str) -> nn.Module:
    """A network on its device; on a GPU with the channels of images last."""
    import torch

    network = network.to(device)
    if device == "cuda":
        sides = {parameter.dim() for parameter in network.parameters()}
        form = torch.channels_last_3d if 5 in sides else torch.channels_last
        network = network.to(memory_format=form)  # type: ignore[call-overload]
    return network


def compute(network: nn.Module, images: Tensor) -> Tensor:
    """The network's float32 outputs for a batch; on a GPU through bfloat16."""
    import torch

    if images.device.type != "cuda":
        outputs: Tensor = network(images)
        return outputs
    form = torch.channels_last_3d if images.dim() == 5 else torch.channels_last
    with torch.autocast("cuda", torch.bfloat16):
        outputs = network(images.contiguous(memory_format=form))
    return outputs.float()


def _ahead(made: Iterator[_Taken], *, pinned: bool) -> Generator[_Taken, None, None]:
    """The same batches, prepared by a thread that is up to two ahead."""
    waiting: queue.Queue[_Taken | BaseException | None] = queue.Queue(AHEAD)
    ended = threading.Event()

    def work() -> None:
        try:
            for images, targets, seeds in made:
                parts = (images.pin_memory(), targets.pin_memory()) if pinned else (images, targets)
                _offer(waiting, (*parts, seeds), ended)
                if ended.is_set():
                    return
            _offer(waiting, None, ended)
        except BaseException as error:  # noqa: BLE001  it is raised again where the batches are wanted
            _offer(waiting, error, ended)

    threading.Thread(target=work, name="images", daemon=True).start()
    try:
        while (found := waiting.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        ended.set()


def _offer(waiting: queue.Queue[Any], item: Any, ended: threading.Event) -> None:
    while not ended.is_set():
        try:
            waiting.put(item, timeout=0.5)
            return
        except queue.Full:
            continue
