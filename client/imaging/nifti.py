"""What image or label map does a NIfTI file hold? Turned so that every hospital's volumes lie the same way.

Arrays come out as [slices, rows, columns] with slices from the feet to the head, rows from the front to the back and
columns from the right to the left of the patient, as axial DICOM slices lie; the header's affine says how. A fourth
axis holds channels.

Source: the NIfTI-1 standard, https://nifti.nimh.nih.gov/nifti-1; orientations by nibabel.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.imaging.display import in_range
from client.imaging.geometry import Grid
from client.imaging.header import MAX_VALUES, guarded, guarded_mask
from client.imaging.records import Picture, Reason, Unusable, Wanted
from client.imaging.values import finite, in_channels

# nibabel tells of every header that it corrects; here a header is good enough or its file is left out.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)

ENDINGS = (".nii", ".nii.gz")


def examine_nifti(path: Path) -> dict[str, Any]:
    """[slices, rows, columns] of a file by its header, for the index; raises `Unusable`."""
    return guarded(lambda: {"shape": list(_turned_shape(_opened(path)))}, Reason.DAMAGED)


def read_nifti(path: Path, wanted: Wanted) -> Picture:
    """One volume: float32 [channels, slices, rows, columns] in [0, 1] (the header's window, or the whole range), or
    in the file's own units. Raises `Unusable`."""
    return guarded(lambda: _read(path, wanted), Reason.TRUNCATED)


def read_label_map(path: Path, grid: Grid | None = None) -> NDArray[Any]:
    """A label map's values [slices, rows, columns], as `read_nifti` turns them or on the grid of a DICOM volume.

    Raises:
        Unusable: MASK; also where the map does not lie on the grid.
    """
    return guarded_mask(lambda: _label_map(path, grid))


def _opened(path: Path) -> Any:
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    if not path.name.lower().endswith(ENDINGS):
        raise Unusable(Reason.NOT_IMAGE)
    try:
        image: Any = nibabel.load(path)
    except (ImageFileError, nibabel.spatialimages.HeaderDataError):
        raise Unusable(Reason.NOT_IMAGE) from None
    if not isinstance(image, nibabel.Nifti1Image):
        raise Unusable(Reason.NOT_IMAGE)
    if len(image.shape) not in (2, 3, 4) or min(image.shape) < 1:
        raise Unusable(Reason.DAMAGED, f"{len(image.shape)} axes")
    if math.prod(image.shape) > MAX_VALUES:
        raise Unusable(Reason.BOMB, " x ".join(str(side) for side in image.shape))
    header: Any = image.header
    if header.get_data_dtype().kind not in "uif":
        raise Unusable(Reason.CHANNELS, "colour or complex values")
    return image


def _turns() -> Any:
    import nibabel.orientations

    return nibabel.orientations


def _turn(image: Any) -> NDArray[Any]:
    affine = image.affine
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise Unusable(Reason.DAMAGED, "no orientation")
    return np.asarray(_turns().ornt_transform(_turns().io_orientation(affine), _turns().axcodes2ornt(("L", "P", "S"))))


def _turned_shape(image: Any) -> tuple[int, ...]:
    shape = (*image.shape[:3], *[1] * (3 - len(image.shape)))
    turn = _turn(image)
    turned = [0, 0, 0]
    for axis, (place, _) in enumerate(turn):
        turned[int(place)] = shape[axis]
    return tuple(turned[::-1])


def _turned(image: Any) -> tuple[NDArray[Any], tuple[float, ...]]:
    """[slices, rows, columns, ...] and the mm between neighbours along the first three."""
    values = np.asanyarray(image.dataobj)
    if values.ndim == 2:
        values = values[..., None]
    zooms = (*[float(zoom) for zoom in image.header.get_zooms()[:3]], 1.0)[:3]
    turn = _turn(image)
    values = _turns().apply_orientation(values, turn)
    sides = [1.0, 1.0, 1.0]
    for axis, (place, _) in enumerate(turn):
        sides[int(place)] = zooms[axis] if math.isfinite(zooms[axis]) and zooms[axis] > 0 else 1.0
    return values.transpose(2, 1, 0, *range(3, values.ndim)), tuple(sides[::-1])


def _read(path: Path, wanted: Wanted) -> Picture:
    image = _opened(path)
    values, spacing = _turned(image)
    if values.ndim == 4 and values.shape[3] != wanted.channels:
        raise Unusable(Reason.CHANNELS, f"{values.shape[3]} channels")
    if values.ndim == 3 and wanted.channels not in (1, 3):
        raise Unusable(Reason.CHANNELS, "one channel")
    if not np.isfinite(values).all():
        raise Unusable(Reason.NON_FINITE)
    planes = np.moveaxis(values, 3, 0) if values.ndim == 4 else values[None]
    shown = finite(planes if wanted.units else _shown(planes, image))
    return Picture(in_channels(shown, wanted.channels), None, spacing)


def _shown(planes: NDArray[Any], image: Any) -> NDArray[np.float64]:
    low, high = float(image.header["cal_min"]), float(image.header["cal_max"])
    planes = planes.astype(np.float64)
    if math.isfinite(low) and math.isfinite(high) and high > low:
        return np.clip((planes - low) / (high - low), 0.0, 1.0)
    return np.stack([in_range(plane) for plane in planes])  # channels are sequences of their own ranges


def _label_map(path: Path, grid: Grid | None) -> NDArray[Any]:
    image = _opened(path)
    if len(image.shape) == 4:
        raise Unusable(Reason.MASK, "four axes")
    return _turned(image)[0] if grid is None else _on_grid(image, grid)


def _on_grid(image: Any, grid: Grid) -> NDArray[Any]:
    values = np.asanyarray(image.dataobj)
    turn = _turns().ornt_transform(_turns().io_orientation(image.affine), _turns().io_orientation(grid.affine()))
    affine = image.affine @ _turns().inv_ornt_aff(turn, values.shape)
    values = _turns().apply_orientation(values, turn)
    corners = np.array([[x, y, z, 1.0] for x in (0, 1) for y in (0, 1) for z in (0, 1)]).T
    corners[:3] *= np.array(values.shape)[:, None] - 1
    apart = np.abs((affine - grid.affine()) @ corners).max()
    if not apart < min(grid.spacing) / 2:
        raise Unusable(Reason.MASK, "it does not lie where the image lies")
    placed: NDArray[Any] = values.transpose(2, 1, 0)
    return placed
