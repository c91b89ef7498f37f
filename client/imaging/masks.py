"""How do a mask's own numbers become the study's classes? By word or by number, and never by guess.

A mask value is looked up like a label: the hospital's own word for it, a class of that name, or the class's number
(0 is the background). In a study of two classes every value but 0 may also be the second one, since black-and-white
masks are written as 0 and 255, unless the hospital's own words say otherwise. A value that is none of these is an
error of the mask, and its image is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.imaging.labels import class_of
from client.imaging.records import Mask, Reason, Unusable

MOST_VALUES = 256


def classes_of(values: NDArray[Any], classes: Sequence[str], own_words: Mapping[str, str]) -> Mask:
    """A mask's values as indices into the classes: uint8, the same shape.

    Raises:
        Unusable: MASK for values that are no class, not whole, or more than 256 different ones.
    """
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or not np.array_equal(values, np.rint(values)):
            raise Unusable(Reason.MASK, "values that are not whole numbers")
        values = np.rint(values).astype(np.int64)
    if values.dtype.kind not in "uib":
        raise Unusable(Reason.MASK, f"values of type {values.dtype}")
    found = np.unique(values)
    if len(found) > MOST_VALUES:
        raise Unusable(Reason.MASK, f"{len(found)} different values")
    table = [_class(int(value), classes, own_words) for value in found]
    return np.array(table, dtype=np.uint8)[np.searchsorted(found, values)]


def _class(value: int, classes: Sequence[str], own_words: Mapping[str, str]) -> int:
    index = class_of(str(value), classes, own_words)
    if index is None and len(classes) == 2 and value != 0 and not own_words:
        return 1
    if index is None:
        raise Unusable(Reason.MASK, f"value {value} is none of the study's classes")
    return index


def resampled(mask: Mask, size: Sequence[int]) -> Mask:
    """A mask brought to another size by its nearest pixels: uint8 [*size]. Centres are aligned, as in area resizing."""
    for axis, side in enumerate(size):
        have = mask.shape[axis]
        if have != side:
            places = np.minimum(((np.arange(side) + 0.5) * have / side).astype(np.int64), have - 1)
            mask = np.take(mask, places, axis=axis)
    return np.ascontiguousarray(mask)
