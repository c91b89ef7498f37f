"""How does a batch of patients become one sum in which nobody weighs more than C? *Group-mean, then clip*, exactly.

Patient p's vector is the mean over his images in the batch (augmentations count as images) of the gradients of their
terms of the loss, with a few extra numbers behind it where they are asked for. It is multiplied by min(1, C' / its
norm) with C' = C (1 − 2⁻¹⁰), and the vectors of all patients are added up. One forward and one backward pass serve all:
the backward pass makes the gradients of each layer's outputs but of no parameter, each layer then gives every patient's
squared norm, and once the norms are known, the weighted sum (`client.private.layers`; Bu 2023, arXiv 2210.00038).

Formal guarantees, for a network that `fitness.demand` lets pass and a task whose terms depend on one image each:

- Adding or removing one patient, all his images in *one* call, changes the sum by a vector of norm at most C' and what
  float32 rounds; 2⁻¹⁰ of C is kept free for that, and for it alone.
- A patient whose norm is not finite counts as zero, and no number of his reaches another's: every operation here works
  on one patient's rows, and his rows are overwritten before the rows of several are added.
- Nothing else that depends on patients is returned. The shapes of the work depend on the shape of the batch and on
  how many patients have how many images, not on what they show.

What is not held here: that a patient's images come in one call (the sampler's part), and time (docs/privacy.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from client.feed import compute
from client.private import fitness, layers
from client.private.groups import Groups, Owner, per_group, per_image
from models.tasks import Task
from models.weights import Layout
from privacy.errors import ConsiliumError

SLACK = 2.0**-10
"""Share of C that is left free for rounding (RULES N2)."""
KEPT_BYTES = 1 << 29
"""Most memory for gradients of single patients that wait for their factors; what is beyond is made a second time."""
CANCELLED = 128.0
"""Most that a patient's reach (`client.private.layers`) may exceed his norm before he is clipped further.

A weight's sum over N terms in float32 is off by 2⁻²⁴ √N times the reach (Higham & Mary 2019, doi:10.1137/18M1226312);
with this and N up to 2¹² that is at most 2⁻¹¹ of C for each patient. Ordinary gradients stay below 10."""
_WRITE = 16.0
"""Multiplications that take as long as keeping one number of a patient's gradient: measured; only speed rests on it."""

Sum = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Extra:
    """Numbers that stand behind a patient's gradient and are clipped with it as one vector (RULES N6).

    Attributes:
        count: how many.
        of: from the mean of the patient's terms of the loss, float64 [], to float64 [count]. It is called for all
            patients at once through torch.func.vmap, so that it cannot see two of them together.
    """

    count: int
    of: Callable[[Tensor], Tensor]


def capped_loss(cap: float, scale: float = 1.0) -> Extra:
    """One extra number: the patient's mean loss, at least 0 and at most `cap`, times `scale`."""
    return Extra(1, lambda loss: (scale * loss.clamp(0.0, cap)).reshape(1))


class PatientGradients:
    """Turns batches of one network and task into clipped sums.

    Attributes:
        layout: the order of the vector.
        size: d + e, numbers of a sum: trainable parameters in the order of the layout, then the extra numbers.
        clip_norm: C.
    """

    def __init__(
        self, network: nn.Module, task: Task, clip_norm: float, extra: Extra | None = None, kept_bytes: int = KEPT_BYTES
    ) -> None:
        """Take a network on its device; it stays the caller's, in whichever mode, and is left as it was.

        Args:
            clip_norm: C, which bounds what one patient adds.
            extra: numbers clipped along.
            kept_bytes: see KEPT_BYTES.

        Raises:
            ConsiliumError: the network cannot be used (`fitness.demand`), or C is not a positive number.
        """
        fitness.demand(network)
        if not (math.isfinite(clip_norm) and clip_norm > 0):
            raise ConsiliumError(
                "The clip norm is not a positive number", str(clip_norm), "Write a number such as 1.0."
            )
        self._network, self._task, self._extra, self._kept_bytes = network, task, extra, kept_bytes
        self.clip_norm, self.layout = float(clip_norm), Layout.of(network)
        self._slices: dict[str, slice] = {}
        at = 0
        for name, shape, trainable in zip(self.layout.names, self.layout.shapes, self.layout.trainable, strict=True):
            if trainable:
                self._slices[name] = slice(at, at + math.prod(shape))
                at += math.prod(shape)
        self.size = at + (extra.count if extra else 0)

    def sum(self, images: Tensor, targets: Tensor, owner: Owner) -> Sum:
        """The clipped sum of one batch: float64 [d + e], zeros for padding alone.

        Args:
            images: float32 [n, C, *size] on the network's device; padding is computed like the rest.
            targets: [n, ...] as the task has them.
            owner: int64 [n], the patient of each image, -1 for padding. *All* of a patient's images in one call.

        Raises:
            ValueError: the arrays do not belong together.
            ConsiliumError: a layer was called with something else than one row an image, or the task does not give
                one term an image.
        """
        if not len(images) == len(targets) == len(owner):
            raise ValueError(f"{len(images)} images, {len(targets)} targets and {len(owner)} owners are no batch")
        groups = Groups.of(owner)
        device = images.device
        total = torch.from_numpy(np.zeros(self.size)).to(device)  # numpy's zeros cost nothing until they are written
        if len(images):
            order = torch.from_numpy(groups.order).to(device)
            with ExitStack() as stack:
                if device.type == "cuda":  # TensorFloat-32 has an error of the size of SLACK
                    stack.enter_context(_whole_float32())
                _Batch(self, groups, total).run(images[order], targets[order])
        found: Sum = total.cpu().numpy()
        return found

    def _parameters(self) -> Iterator[tuple[str, nn.Module, dict[str, slice]]]:
        """Each layer that trains: its name, itself, and where its parameters stand in the vector."""
        for name, part in self._network.named_modules():
            own = layers.trained(part)
            if own:
                yield name, part, {key: self._slices[f"{name}.{key}" if name else key] for key in own}


@dataclass
class _Record:
    """One layer during one batch: what it was called with, and what waits for the patients' factors.

    Attributes:
        where: its trainable parameters in the vector.
        calls: how often it was called.
        seen: inputs of each call and the gradients of its outputs; gone once used.
        kept: by name of the parameter the first group and [c, *shape], gradients of c groups after another.
        later: a weight whose sum is made when the factors are known.
        again: a weight whose patients' gradients are then made a second time.
    """

    name: str
    layer: nn.Module
    where: dict[str, slice]
    calls: int = 0
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = field(default_factory=list)
    kept: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    later: list[layers.Product] = field(default_factory=list)
    again: list[layers.Product] = field(default_factory=list)


class _Batch:
    """One batch on its way through the network and back."""

    def __init__(self, owner: PatientGradients, groups: Groups, total: Tensor) -> None:
        self._owner, self._groups, self._total = owner, groups, total
        self._squares = torch.zeros(groups.count, dtype=torch.float64, device=total.device)
        self._reaches = torch.zeros_like(self._squares)
        self._room = owner._kept_bytes
        self._roots: list[Tensor] = []
        self._forward = True
        self.records = [_Record(name, layer, where) for name, layer, where in owner._parameters()]

    def run(self, images: Tensor, targets: Tensor) -> None:
        """Forward, backward, norms, sum."""
        network, task, groups = self._owner._network, self._owner._task, self._groups
        weights = torch.from_numpy(groups.weights).to(images.device)
        with self._recording():
            losses = task.losses(compute(network, images), targets)
            self._forward = False
            if losses.shape != (len(images),):
                what = "The task does not give one term of the loss for each image"
                raise ConsiliumError(what, f"{tuple(losses.shape)} for {len(images)} images", "Mend its `losses`.")
            if self._roots and losses.requires_grad:
                torch.autograd.grad((losses * weights.to(losses.dtype)).sum(), self._roots, allow_unused=True)
        with torch.no_grad():
            for record in self.records:
                if record.seen:  # called more than once, and at least one of the outputs mattered
                    self._form(record)
            extra = self._extra(losses.detach().double() * weights)
            factors = self._factors(extra)
            self._add(factors, extra)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Hooks on every layer that trains. Parameters ask for no gradient meanwhile, so that none is made."""
        hooks, parameters = [], []
        try:
            for record in self.records:
                hooks.append(record.layer.register_forward_hook(partial(self._called, record), with_kwargs=True))
                parameters += [value for value in record.layer.parameters(recurse=False) if value.requires_grad]
            for value in parameters:
                value.requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            for value in parameters:
                value.requires_grad_(True)
            for hook in hooks:
                hook.remove()

    def _called(
        self, record: _Record, layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], output: Tensor
    ) -> None:
        if not self._forward:  # torch.func calls the layer again to derive it
            return
        images = len(self._groups.order)
        whole = [isinstance(part, Tensor) and len(part) == images for part in (*inputs, output)]
        if named or not all(whole):
            what = "A layer was not called with one row for each image"
            raise ConsiliumError(what, f"module {record.name!r}", "Freeze it, or let images stay apart in its input.")
        record.calls += 1
        if not output.requires_grad:  # nothing before it trains: the backward pass ends here
            output.requires_grad_(True)
            self._roots.append(output)
        given = tuple(part.detach() for part in inputs)
        arrived = partial(self._arrived, record, given, [part._version for part in given])
        output.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _arrived(self, record: _Record, inputs: tuple[Tensor, ...], versions: list[int], g: Tensor) -> None:
        """The gradient of one output. A layer that is called once is worked on now, which frees what it held."""
        if [part._version for part in inputs] != versions:
            what = "The input of a layer was written over after the layer had read it"
            raise ConsiliumError(what, f"module {record.name!r}", "Add and activate out of place in this network.")
        record.seen.append((inputs, g.detach()))
        if record.calls == 1:
            with torch.no_grad():
                self._form(record)

    def _form(self, record: _Record) -> None:
        """Squared norms of one layer's parameters, and what their sum will be made of."""
        runs, calls = self._groups.runs, [(tuple(map(layers.wide, given)), layers.wide(g)) for given, g in record.seen]
        record.seen = []
        with torch.autocast(self._total.device.type, enabled=False):
            weights = [layers.product(record.layer, record.where, *call) for call in calls]
            values: dict[str, Tensor] = {}
            for call in calls:
                for name, each in layers.small(record.layer, record.where, *call, runs).items():
                    values[name] = values[name] + each if name in values else each
            for name, each in values.items():
                self._keep(record, name, 0, each)
            found = [weight for weight in weights if weight is not None]
            if len(found) == 1:
                self._form_weight(record, found[0])
            elif found:
                self._keep(record, "weight", 0, self._all(found))

    def _form_weight(self, record: _Record, weight: layers.Product) -> None:
        runs, where = self._groups.runs, record.where["weight"]
        numbers = self._groups.count * (where.stop - where.start)
        if weight.cost(runs) <= _WRITE * numbers:
            squares, reaches = weight.squares(runs)
            self._squares += squares
            self._reaches += reaches.square()
            record.later.append(weight)
            return
        size = 4 * numbers
        keep = size <= self._room
        if keep:
            self._room -= size
        else:
            record.again.append(weight)
        for first, each in weight.patients(runs):
            self._keep(record, "weight", first, each, keep=keep)

    def _all(self, weights: list[layers.Product]) -> Tensor:
        """Gradients of a weight that was used more than once: [G, *shape], the calls added up."""
        calls = []
        for weight in weights:
            parts = sorted(weight.patients(self._groups.runs), key=lambda part: part[0])
            calls.append(torch.cat([each for _, each in parts]))
        return torch.stack(calls).sum(0)

    def _keep(self, record: _Record, name: str, first: int, each: Tensor, *, keep: bool = True) -> None:
        norms = torch.linalg.vector_norm(each.flatten(1), dim=1).double()
        self._squares[first : first + len(each)] += norms.square()
        if keep:
            record.kept.setdefault(name, []).append((first, each))

    def _extra(self, losses: Tensor) -> Tensor:
        """The extra numbers, float64 [patients, e], of weighted terms [n] in the new order."""
        extra, count = self._owner._extra, self._groups.patients
        if extra is None or not count:
            return losses.new_zeros((count, extra.count if extra else 0))
        found: Tensor = torch.func.vmap(extra.of)(per_group(losses, self._groups.runs)[:count])
        if found.shape != (count, extra.count):
            raise ValueError(f"{extra.count} extra numbers were promised, {tuple(found.shape[1:])} came")
        return found.double()

    def _factors(self, extra: Tensor) -> Tensor:
        """What each group's vector is multiplied by: float64 [G], 0 for padding and what is not finite."""
        bound, count = self._owner.clip_norm * (1 - SLACK), len(extra)
        norms = torch.maximum(
            (self._squares[:count] + extra.square().sum(1)).sqrt(), self._reaches[:count].sqrt() / CANCELLED
        )
        factors = torch.zeros_like(self._squares)
        factors[:count] = torch.where(norms.isfinite(), bound / norms.clamp(min=bound), 0.0)
        return factors

    def _add(self, factors: Tensor, extra: Tensor) -> None:
        """The sum over patients, into the vector."""
        total, listed = self._total, factors.tolist()
        if extra.shape[1] and len(extra):
            own = factors[: len(extra)]
            total[-extra.shape[1] :] = own @ extra.masked_fill((own == 0)[:, None], 0)
        scale = per_image(factors, self._groups.runs)
        for record in self.records:
            for name, where in record.where.items():
                parts = record.kept.pop(name, None)
                if parts:
                    total[where] = _weighted(parts, factors, listed)
            for weight in record.later:
                total[record.where["weight"]] = weight.total(scale, scale == 0).flatten()
            for weight in record.again:
                for part in weight.patients(self._groups.runs):
                    total[record.where["weight"]] += _weighted([part], factors, listed)
            record.later, record.again = [], []


def _weighted(parts: list[tuple[int, Tensor]], factors: Tensor, listed: list[float]) -> Tensor:
    """The sum of patients' gradients times their factors, [size]; what has the factor 0 may hold anything."""
    total = torch.zeros_like(parts[0][1][0]).flatten()
    for first, each in parts:
        if len(each) == 1:
            if listed[first]:
                total.add_(each.flatten(), alpha=listed[first])
            continue
        own, rows = factors[first : first + len(each)], each.flatten(1)
        if 0.0 in listed[first : first + len(each)]:
            rows = rows.masked_fill((own == 0)[:, None], 0)
        total.addmv_(rows.T, own.to(rows.dtype))
    return total


@contextmanager
def _whole_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
