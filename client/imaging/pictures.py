"""What does a PNG or JPEG file show? Sizes from the header first, then pixels as float32 or a mask's own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.imaging.header import MAX_VALUES, guarded, guarded_mask
from client.imaging.records import Picture, Reason, Unusable, Wanted
from client.imaging.values import in_channels

FORMATS = ("PNG", "JPEG")
_START = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_GREY_16 = frozenset(("I;16", "I;16B", "I;16L", "I"))


def examine_picture(path: Path) -> dict[str, Any]:
    """Size of a file by its header, for the index; raises `Unusable`."""
    return guarded(lambda: _examine(path), Reason.DAMAGED)


def read_picture(path: Path, wanted: Wanted) -> Picture:
    """One image: float32 [channels, height, width] in [0, 1], upright as its camera held it.

    A colour file whose three channels are equal is grey. Transparency is dropped. Raises `Unusable`.
    """
    return guarded(lambda: _read(path, wanted), Reason.TRUNCATED)


def read_picture_mask(path: Path) -> NDArray[Any]:
    """A mask's own numbers [height, width]: grey values, or the numbers of palette entries. Raises `Unusable`."""
    return guarded_mask(lambda: _mask(path))


def _open(path: Path) -> Any:
    from PIL import Image as Pillow

    with path.open("rb") as stream:
        if not stream.read(8).startswith(_START):
            raise Unusable(Reason.NOT_IMAGE)
    try:
        image = Pillow.open(path, formats=FORMATS)
    except Pillow.DecompressionBombError:
        raise Unusable(Reason.BOMB) from None
    if image.width * image.height * max(1, len(image.getbands())) > MAX_VALUES:
        raise Unusable(Reason.BOMB, f"{image.height} x {image.width} x {len(image.getbands())}")
    return image


def _examine(path: Path) -> dict[str, Any]:
    with _open(path) as image:
        return {"shape": [image.height, image.width], "mode": image.mode}


def _read(path: Path, wanted: Wanted) -> Picture:
    from PIL import ImageOps

    with _open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode in _GREY_16 or image.mode in ("1", "L", "LA"):
            grey = np.asarray(image.convert("L") if image.mode in ("1", "LA") else image)
            most = 65535 if image.mode in _GREY_16 else 255
            planes = grey[None].astype(np.float32) / np.float32(most)
        else:
            colour = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
            same = bool((colour[0] == colour[1]).all() and (colour[1] == colour[2]).all())
            planes = (colour[:1] if same else colour).astype(np.float32) / np.float32(255)
    if planes.shape[0] not in (1, wanted.channels) or wanted.channels not in (1, 3):
        raise Unusable(Reason.CHANNELS, f"{planes.shape[0]} channels")
    return Picture(in_channels(planes, wanted.channels))


def _mask(path: Path) -> NDArray[Any]:
    with _open(path) as image:
        if image.mode in ("1", "L", "P") or image.mode in _GREY_16:
            values: NDArray[Any] = np.asarray(image)
            return values.astype(np.uint8) if values.dtype == np.bool_ else values
        bands = np.asarray(image.convert("RGB"))
    if not ((bands[..., 0] == bands[..., 1]).all() and (bands[..., 1] == bands[..., 2]).all()):
        raise Unusable(Reason.MASK, "colours where numbers are expected")
    return bands[..., 0]
