"""Which pixels does a DICOM segmentation mark on an image? By the instances it names, with highdicom.

A segment counts by its label. Segments that are none of the study's classes are background; a file in which no
segment is one of them is an error, and so are two classes on one pixel.

Source: DICOM PS3.3 A.51 and C.8.20 (segmentation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.imaging.header import guarded
from client.imaging.labels import class_of
from client.imaging.records import Mask, Reason, Unusable


def marked(
    files: Sequence[Path], instances: Sequence[str], frames: int, classes: Sequence[str], own_words: Mapping[str, str]
) -> Mask:
    """The masks that some segmentation objects give to some instances.

    Args:
        instances: SOP instance UIDs of single-frame images in the order wanted, or of one image of several frames.
        frames: how many frames that one image has; 1 for single-frame images.

    Returns:
        uint8 [images or frames, rows, columns], indices into `classes`, 0 where nothing is marked.

    Raises:
        Unusable: MASK.
    """
    return guarded(lambda: _marked(files, instances, frames, classes, own_words), Reason.MASK)


def segment_labels(file: Path) -> set[str]:
    """The labels of a segmentation's segments; raises `Unusable` with MASK."""

    def labels() -> set[str]:
        seg = _opened(file, file.stat().st_mtime_ns)
        return {_label(seg, number) for number in range(1, seg.number_of_segments + 1)}

    return guarded(labels, Reason.MASK)


def _marked(
    files: Sequence[Path], instances: Sequence[str], frames: int, classes: Sequence[str], own_words: Mapping[str, str]
) -> Mask:
    whole: Mask | None = None
    for file in files:
        seg = _opened(file, file.stat().st_mtime_ns)
        numbers = {
            number: index
            for number in range(1, seg.number_of_segments + 1)
            if (index := class_of(_label(seg, number), classes, own_words))
        }
        if not numbers:
            raise Unusable(Reason.MASK, "no segment is one of the study's classes")
        options: dict[str, Any] = {
            "segment_numbers": list(numbers), "assert_missing_frames_are_empty": True, "skip_overlap_checks": True
        }  # fmt: skip
        if frames > 1:
            values = seg.get_pixels_by_source_frame(instances[0], list(range(1, frames + 1)), **options)
        else:
            values = seg.get_pixels_by_source_instance(list(instances), **options)
        whole = _added(whole, np.asarray(values), list(numbers.values()))
    if whole is None:
        raise Unusable(Reason.NO_MASK)
    return whole


def _added(whole: Mask | None, values: NDArray[Any], indices: Sequence[int]) -> Mask:
    """`values` are [frames, rows, columns, segments] of 0 and 1, or shares of 1."""
    whole = np.zeros(values.shape[:3], np.uint8) if whole is None else whole
    if whole.shape != values.shape[:3]:
        raise Unusable(Reason.MASK, "segmentations of several sizes")
    for place, index in enumerate(indices):
        here = values[..., place] >= 0.5
        if np.any(here & (whole != 0) & (whole != index)):
            raise Unusable(Reason.MASK, "two classes on one pixel")
        whole[here] = index
    return whole


def _label(seg: Any, number: int) -> str:
    return str(seg.get_segment_description(number).segment_label).strip()


@lru_cache(maxsize=2)
def _opened(file: Path, changed: int) -> Any:
    """Kept for the next slice of the same series, while the file stays as it is."""
    from highdicom.seg import segread

    return segread(file)
