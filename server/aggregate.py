"""How do many answers become one update, without trusting any and without holding more than one?

A payload streams into one scratch buffer and is judged whole: length, SHA-256 against the signed answer, every number
finite, a sane number of examples. Only then is it added, weighted, in float64. Whatever is refused has changed nothing.
Memory is the scratch (one model, float32), the sum (two, float64) and what the sum rounded off (one, float32), at any
number of sites: four models. The model itself and the optimiser's memory pass through the step in blocks.

The order in which answers arrive must not show, or a simulation could not repeat a study. A product of a float32 and a
whole number below 2^24 is exact in float64, and what each addition rounds off is exact too (TwoSum: Knuth, TAOCP 2,
4.2.2) and is added up on its own. What remains of the order is about n² 2^-77 of the largest term, where the next
model keeps 2^-24: it is lost when the mean is rounded to float32, unless the terms cancel by a factor of 2^50.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import ExitStack
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from privacy.errors import Refusal, RefusalCode
from privacy.messages import Answer, decode_vector
from server.blobs import PIECE, Blobs
from server.optimizers import Optimizer

BLOCK = 1 << 18
MOST_EXAMPLES = float(1 << 24)
"""Counts above this are no longer exact in float32, and no hospital has as many images."""

Doubles = npt.NDArray[np.float64]


class Total(Protocol):
    """What a slot added up to, as a step and an evaluation need it: plain (`Aggregate`) or opened (`Masked`)."""

    size: int

    @property
    def weight(self) -> float:
        """What the summed update is divided by."""
        ...

    @property
    def statistics(self) -> Doubles:
        """The summed statistics, float64 [m]."""
        ...

    @property
    def answered(self) -> int:
        """How many sites it is of."""
        ...

    def reset(self) -> None:
        """Forget everything."""
        ...

    def mean(self, start: int, stop: int) -> Doubles:
        """The weighted mean update, float64 [stop - start], as a copy."""
        ...


class Aggregate:
    """The sum over one cohort of updates [size] and statistics [statistics], whose first number is the examples."""

    def __init__(self, size: int, statistics: int, *, by_examples: bool = True) -> None:
        """Make the two buffers once; `reset` empties them for the next slot.

        Args:
            size: d, numbers of the update; 0 where answers are statistics only.
            statistics: m, at least 1.
            by_examples: weight by the number of examples; otherwise each site with any counts the same.
        """
        self.size, self._by_examples = size, by_examples
        self._scratch = np.empty(4 * (size + statistics), np.uint8)
        self._sum, self._rest = np.zeros(size, np.float64), np.zeros(size, np.float32)
        self._statistics = np.zeros((2, statistics), np.float64)
        self.weight, self.answered = 0.0, 0
        self.bytes = len(self._scratch)

    def reset(self) -> None:
        """Forget everything."""
        self._sum[...], self._rest[...] = 0.0, 0.0
        self._statistics = np.zeros_like(self._statistics)
        self.weight, self.answered = 0.0, 0

    @property
    def statistics(self) -> Doubles:
        """The summed statistics, float64 [statistics]."""
        return np.asarray(self._statistics[0] + self._statistics[1])

    def add(self, answer: Answer, chunks: Iterable[bytes]) -> None:
        """Take one answer's payload.

        Args:
            answer: verified: signed by its site, for this very request.
            chunks: the payload's bytes in order; not read when the announced sizes are wrong already.

        Raises:
            Refusal: MODEL_SHAPE (announced or real length), MODEL_HASH, NON_FINITE, or MALFORMED (examples); then
                nothing has changed.
        """
        if answer.payload_bytes != self.bytes or answer.statistics != self._statistics.shape[1]:
            raise Refusal(RefusalCode.MODEL_SHAPE)
        receive(self._scratch, answer, chunks)
        vector = decode_vector(self._scratch, self.bytes // 4)
        statistics = vector[self.size :].astype(np.float64)
        examples = float(statistics[0])
        if not 0.0 <= examples <= MOST_EXAMPLES or examples != int(examples):
            raise Refusal(RefusalCode.MALFORMED)
        weight = examples if self._by_examples else float(examples > 0)
        for start in range(0, self.size, BLOCK):
            block = vector[start : min(start + BLOCK, self.size)].astype(np.float64)
            block *= weight
            part = slice(start, start + len(block))
            self._rest[part] += _add(self._sum[part], block)
        self._statistics[1] += _add(self._statistics[0], statistics)
        self.weight += weight
        self.answered += weight > 0

    def mean(self, start: int, stop: int) -> Doubles:
        """The weighted mean update, float64 [stop - start], as a copy.

        Raises:
            ValueError: no weight came in.
        """
        if not self.weight > 0:
            raise ValueError("nothing was added, or nothing with weight")
        return np.asarray((self._sum[start:stop] + self._rest[start:stop]) / self.weight)


def receive(scratch: npt.NDArray[np.uint8], answer: Answer, chunks: Iterable[bytes]) -> None:
    """Fill a scratch buffer with a payload of exactly its length.

    Raises:
        Refusal: MODEL_SHAPE, MODEL_HASH, or MALFORMED when the chunks break off.
    """
    digest, position, target = hashlib.sha256(), 0, scratch.data
    try:
        for chunk in chunks:
            end = position + len(chunk)
            if end > len(scratch):
                raise Refusal(RefusalCode.MODEL_SHAPE)
            target[position:end] = chunk
            digest.update(chunk)
            position = end
    except ValueError as error:
        raise Refusal(RefusalCode.MALFORMED) from error
    if position != len(scratch):
        raise Refusal(RefusalCode.MODEL_SHAPE)
    if digest.hexdigest() != answer.payload_sha256:
        raise Refusal(RefusalCode.MODEL_HASH)


def _add(total: Doubles, term: Doubles) -> Doubles:
    """Add in place, and return exactly what the rounded sum left out (TwoSum); `term` is overwritten."""
    before = total.copy()
    total += term
    added = total - before
    term -= added
    before -= total - added
    before += term
    return before


def advance(
    blobs: Blobs, optimizer: Optimizer, aggregate: Total, weights: str, memory: tuple[str, ...]
) -> tuple[str, tuple[str, ...]]:
    """The next model and the optimiser's memory, as new blobs; the old ones stay as they are.

    Args:
        weights: blob of the model, float32 [d].
        memory: one blob per remembered array, or () before the first round.

    Raises:
        Refusal: NON_FINITE, when the step leads out of float32; then no blob was made.
    """
    size = aggregate.size // (1 + optimizer.sent)
    with ExitStack() as stack:
        files = [stack.enter_context(open(blobs.path(name), "rb")) for name in (weights, *memory)]
        writers = [stack.enter_context(blobs.writer()) for _ in range(1 + optimizer.memory)]
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            arrays = [_read(file, stop - start) for file in files]
            if not memory:
                arrays += optimizer.fresh(arrays[0])
            update = np.stack([aggregate.mean(at + start, at + stop) for at in range(0, aggregate.size, size)])
            with np.errstate(over="ignore", invalid="ignore"):
                optimizer.step(arrays[0], update, arrays[1:], aggregate.answered)
            for array, writer in zip(arrays, writers, strict=True):
                if not bool(np.isfinite(array).all()):
                    raise Refusal(RefusalCode.NON_FINITE)
                writer.write(array.data.cast("B"))
        names = [writer.commit() for writer in writers]
    return names[0], tuple(names[1:])


def payload(blobs: Blobs, optimizer: Optimizer, weights: str, memory: tuple[str, ...]) -> str:
    """The blob that a training request carries: the model, with the memory that the rule sends behind it.

    It is `weights` itself for a rule that sends none; otherwise a new blob, which the caller deletes after the round.
    """
    if not optimizer.sent:
        return weights
    with blobs.writer() as writer, open(blobs.path(weights), "rb") as model:
        for name in (weights, *memory[: optimizer.sent]):
            with open(blobs.path(name), "rb") as file:
                while piece := file.read(PIECE):
                    writer.write(piece)
        if not memory:
            size = blobs.size(weights) // 4
            for start in range(0, size, BLOCK):
                for array in optimizer.fresh(_read(model, min(BLOCK, size - start)))[: optimizer.sent]:
                    writer.write(array.data.cast("B"))
        return writer.commit()


def _read(file: BinaryIO, count: int) -> npt.NDArray[np.float32]:
    data = file.read(4 * count)
    if len(data) != 4 * count:
        raise Refusal(RefusalCode.MODEL_SHAPE)
    return np.frombuffer(bytearray(data), dtype="<f4")
