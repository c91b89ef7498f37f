"""How do images reach the network without letting it wait?

Images that are augmented are prepared up to two batches ahead by a second thread, where there is a second core. On a
GPU, images that are not augmented stay there from their first use, and the others come from pinned memory.
Convolutions then run in bfloat16 with channels last; weights, gradients and losses stay float32, and there is no loss
scale, which would be state computed from patients (RULES N3). What is drawn does not depend on which thread does it.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from client.imaging import Cohort
from models.tasks import Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Augment = Callable[..., Any]
"""(image, seed) -> image, or (image, seed, mask) -> (image, mask), as `models.transforms.augmentation` gives it."""
Batch = tuple["Tensor", "Tensor"]
Indices = npt.NDArray[np.int64]

AHEAD = 2
RESIDENT_SHARE = 0.4
"""At most this share of the GPU's free memory holds images."""


class Dice(Protocol):
    """What seeds are drawn from: numpy's generator, or `client.private.sample.Seeds`."""

    def integers(self, low: int, high: int, size: int) -> npt.NDArray[np.int64]:
        """`size` whole numbers from `low` to `high` - 1."""
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
        self.seconds = self.waited = 0.0

    def batch(self, chosen: Indices, generator: Dice | None = None) -> Batch:
        """Images float32 [n, C, *size] and their targets on the device, augmented with seeds from `generator`."""
        if self._device.type == "cuda" and self._augment is None and (resident := self._resident()) is not None:
            import torch

            at = torch.from_numpy(chosen).to(self._device)
            return resident[0][at], resident[1][at]
        images, targets = self._host(chosen, generator)
        return self._send(images), self._send(targets)

    def batches(
        self, drawn: Iterator[Indices], generator: np.random.Generator, count: int
    ) -> Generator[Batch, None, None]:
        """`count` batches of the positions in `drawn`."""
        begun, self.waited = time.monotonic(), 0.0
        pinned = self._device.type == "cuda"
        if self._augment is None:
            ready = (self.batch(next(drawn)) for _ in range(count))
        else:
            made = (self._host(next(drawn), generator) for _ in range(count))
            ready = _ahead(made, pinned=pinned) if len(os.sched_getaffinity(0)) > 1 else made
        with closing(ready):
            for _ in range(count):
                asked = time.monotonic()
                images, targets = next(ready)
                images, targets = self._send(images), self._send(targets)
                self.waited += time.monotonic() - asked
                yield images, targets
        self.seconds = time.monotonic() - begun

    def _host(self, chosen: Indices, generator: Dice | None) -> Batch:
        import torch

        images, targets = self._cohort.images[chosen], self._cohort.targets[chosen]
        if self._augment is not None and generator is not None:
            seeds = generator.integers(0, 2**32, size=len(chosen)).tolist()
            if self._together:
                pairs = [self._augment(*item) for item in zip(images, seeds, targets, strict=True)]
                images, targets = (np.stack(part) for part in zip(*pairs, strict=True))
            else:
                images = np.stack([self._augment(image, seed) for image, seed in zip(images, seeds, strict=True)])
        return torch.from_numpy(images), torch.from_numpy(targets)

    def _send(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda" or tensor.device == self._device:
            return tensor
        return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(self._device, non_blocking=True)

    def _resident(self) -> Batch | None:
        """The whole cohort on the GPU; None when it would take too much of it."""
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


def _ahead(made: Iterator[Batch], *, pinned: bool) -> Generator[Batch, None, None]:
    """The same batches, prepared by a thread that is up to two ahead."""
    waiting: queue.Queue[Batch | BaseException | None] = queue.Queue(AHEAD)
    ended = threading.Event()

    def work() -> None:
        try:
            for images, targets in made:
                _offer(waiting, (images.pin_memory(), targets.pin_memory()) if pinned else (images, targets), ended)
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
