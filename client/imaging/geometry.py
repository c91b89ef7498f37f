"""Where does each slice lie, and which slices make a volume? Pure geometry, without files.

Slices of one orientation are ordered by their distance along the normal of their plane (the cross product of the row
and the column direction, so that axial slices run from the feet to the head). Places that are taken several times,
as in diffusion and functional series, give as many volumes. A gap gives none: a volume with a hole is not what the
scanner saw.

Source: DICOM PS3.3 C.7.6.2.1.1 (image position and orientation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.imaging.records import Reason, Unusable

GAP = 1.5
"""A step between neighbours of more than this many median steps is a gap."""
SAME_PLACE = 0.05
"""Two slices nearer than this share of the median step are in one place."""
_NO_STEP = 0.01


@dataclass(frozen=True)
class Plane:
    """Where one slice lies: position (x, y, z) of its first pixel, directions of rows and columns, and the distances
    between rows and between columns; all in millimetres, in the patient's system (left, posterior, head)."""

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]


@dataclass(frozen=True)
class Grid:
    """Where a volume [slices, rows, columns] lies: its first slice, and mm between slices, rows and columns."""

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, float, float]

    def affine(self) -> NDArray[np.float64]:
        """From (column, row, slice) to millimetres towards right, front and head: NIfTI's system, 4 x 4."""
        along_row, along_column = np.array(self.orientation[:3]), np.array(self.orientation[3:])
        step, row, column = self.spacing
        whole = np.eye(4)
        whole[:3, 0], whole[:3, 1] = along_row * column, along_column * row
        whole[:3, 2], whole[:3, 3] = np.cross(along_row, along_column) * step, self.position
        mirrored: NDArray[np.float64] = np.diag([-1.0, -1.0, 1.0, 1.0]) @ whole
        return mirrored


@dataclass(frozen=True)
class Stack:
    """The slices of one volume: their indices in order, and where they lie."""

    order: tuple[int, ...]
    grid: Grid


def stacks(planes: Sequence[Plane | None]) -> list[Stack]:
    """The volumes that some slices make up, those of one place in the order given.

    Raises:
        Unusable: NO_VOLUME without positions, of several orientations, or of one place only; SLICES where steps are
            missing, or where places are taken a different number of times.
    """
    known = [plane for plane in planes if plane is not None]
    if len(known) != len(planes) or len(known) < 2:
        raise Unusable(Reason.NO_VOLUME, "slices without positions" if len(planes) > 1 else "one slice")
    turns = np.array([plane.orientation for plane in known])
    if np.abs(turns - turns[0]).max() > 1e-3:
        raise Unusable(Reason.NO_VOLUME, "slices of several orientations")
    normal = np.cross(turns[0][:3], turns[0][3:])
    if not np.isfinite(normal).all() or abs(np.linalg.norm(normal) - 1) > 0.1:
        raise Unusable(Reason.NO_VOLUME, "rows and columns are not at right angles")
    along = np.array([plane.position for plane in known]) @ normal
    order = np.argsort(along, kind="stable")
    steps = np.diff(along[order])
    wide = steps[steps > _NO_STEP]
    if not len(wide):
        raise Unusable(Reason.NO_VOLUME, "all slices in one place")
    median = float(np.median(wide))
    borders = np.flatnonzero(steps > SAME_PLACE * median) + 1
    places = np.split(order, borders)
    repeats = {len(place) for place in places}
    if len(repeats) > 1:
        raise Unusable(Reason.SLICES, "some places are taken more often than others")
    middles = np.array([along[place].mean() for place in places])
    gaps = np.diff(middles)
    median = float(np.median(gaps))
    holes = int(np.sum(gaps > GAP * median))
    if holes:
        raise Unusable(Reason.SLICES, f"{holes} gaps in {len(places)} places")
    spacing = (median, float(known[0].spacing[0]), float(known[0].spacing[1]))
    grid = Grid(known[int(places[0][0])].position, known[0].orientation, spacing)
    return [Stack(tuple(int(place[turn]) for place in places), grid) for turn in range(repeats.pop())]
