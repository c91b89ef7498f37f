"""What does a display show of stored values? Rescaled to the scanner's units, windowed, bright where bright is more.

Source: DICOM PS3.3 C.11.1 (modality LUT), C.11.2 (VOI LUT), C.7.6.3.1.2 (photometric interpretation), C.7.6.16.2.9 and
C.7.6.16.2.10 (the same for each frame of an enhanced image).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

from client.imaging.records import Reason, Unusable
from client.imaging.values import finite


def modality_values(stored: NDArray[Any], dataset: Dataset) -> NDArray[np.float64]:
    """Stored values to the scanner's unit (Hounsfield and the like), float64; Unusable where not finite."""
    values = np.asarray(apply_modality_lut(stored, dataset), dtype=np.float64)
    if not np.isfinite(values).all():
        raise Unusable(Reason.NON_FINITE)
    return values


def display(
    values: NDArray[np.float64], dataset: Dataset, padding: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """Modality values of any shape to brightness in [0, 1]: the first window or VOI LUT, then the polarity.

    Pixels in `padding` (bool, same shape) are outside the picture: they do not widen the range and come out
    black.
    """
    if "VOILUTSequence" in dataset:
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        shown = np.asarray(apply_voi_lut(np.rint(values).astype(np.int64), dataset), np.float64) / (2**bits - 1)
    else:
        shown = _windowed(values, dataset, padding)
    if text(dataset, "PhotometricInterpretation") == "MONOCHROME1":
        shown = 1.0 - shown
    if padding is not None:
        shown = np.where(padding, 0.0, shown)
    return finite(np.clip(shown, 0.0, 1.0))


def in_range(values: NDArray[Any], inside: NDArray[Any] | None = None) -> NDArray[np.float64]:
    """Values stretched so that the least is 0 and the greatest 1; zeros where all are equal."""
    chosen = values if inside is None else inside
    low, high = float(chosen.min()), float(chosen.max())
    return (values - low) / (high - low) if high > low else np.zeros(values.shape)


def _windowed(values: NDArray[np.float64], dataset: Dataset, padding: NDArray[np.bool_] | None) -> NDArray[np.float64]:
    centre, width = first(dataset, "WindowCenter"), first(dataset, "WindowWidth")
    function = text(dataset, "VOILUTFunction") or "LINEAR"
    if centre is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
        return in_range(values, None if padding is None or padding.all() else values[~padding])
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - centre) / width, -700.0, 700.0)))
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0.0, 1.0)
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return np.clip((values - (centre - 0.5)) / (width - 1.0) + 0.5, 0.0, 1.0)


def padding(stored: NDArray[Any], dataset: Dataset) -> NDArray[np.bool_] | None:
    """Where the file says there is no picture (PS3.3 C.7.5.1.1.2); None where it says nothing."""
    low = first(dataset, "PixelPaddingValue")
    if low is None:
        return None
    high = first(dataset, "PixelPaddingRangeLimit")
    ends = (low, low if high is None else high)
    return (stored >= min(ends)) & (stored <= max(ends))


def of_frame(dataset: Dataset, frame: int) -> Dataset:
    """What an enhanced image says about one of its frames, in the words of a single-frame image.

    Frame by frame before shared before the top level; a file without functional groups is returned as it is.
    """
    shared = dataset.get("SharedFunctionalGroupsSequence")
    each = dataset.get("PerFrameFunctionalGroupsSequence")
    if not shared and not each:
        return dataset
    view = Dataset()
    for word in _PLAIN:
        if word in dataset:
            view[word] = dataset[word]
    groups = [group[index] for group, index in ((shared, 0), (each, frame)) if group and len(group) > index]
    for group in groups:
        for name in _MACROS:
            for item in group.get(name, ())[:1]:
                view.update(item)
    return view


_PLAIN = (
    "PhotometricInterpretation", "PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "PixelSpacing", "PixelRepresentation", "BitsStored",
    "ImagePositionPatient", "ImageOrientationPatient",
)  # fmt: skip
_MACROS = (
    "PixelValueTransformationSequence",
    "FrameVOILUTSequence",
    "PixelMeasuresSequence",
    "PlanePositionSequence",
    "PlaneOrientationSequence",
)


def text(dataset: Dataset, word: str) -> str:
    """A tag as text, "" where it is absent or empty."""
    value = dataset.get(word)
    return "" if value is None else str(value).strip("\0 ")


def number(dataset: Dataset, word: str, default: int) -> int:
    """A tag as a whole number."""
    value = dataset.get(word)
    return default if value is None or value == "" else int(value)


def first(dataset: Dataset, word: str) -> float | None:
    """The first value of a tag as a real number; None where it is absent or empty."""
    found = numbers(dataset, word)
    return found[0] if found else None


def numbers(dataset: Dataset, word: str) -> tuple[float, ...]:
    """All values of a tag as real numbers."""
    value = dataset.get(word)
    if value is None or value == "":
        return ()
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
        return (float(value),)
    return tuple(float(item) for item in value)
