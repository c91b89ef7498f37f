"""What pictures does one DICOM file, or one stack of them, hold?

Nothing is decoded before the compressed stream's own size has been checked against the header's. Grey images come out
as a display shows them (rescaled, windowed, inverted where bright means dark) or in the scanner's units; colour comes
out as RGB. Every way in which a file can be bad ends as `Unusable`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, FileDataset, dcmread
from pydicom.encaps import generate_frames
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import UID

from client.imaging.codestream import decoder, stream_size
from client.imaging.display import display, first, modality_values, number, of_frame, padding, text
from client.imaging.geometry import Grid, stacks
from client.imaging.header import guarded, pixel_spacing, plane_of
from client.imaging.records import Image, Mask, Picture, Reason, Unusable, Wanted
from client.imaging.values import finite, in_channels

_PIXEL_WORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


def read_images(path: Path, wanted: Wanted, mask: Mask | None = None) -> list[Picture]:
    """Decodes one file.

    Args:
        mask: uint8 [frames, rows, columns], handed out with the frames.

    Returns:
        For 2-D: one picture for each frame, float32 [channels, rows, columns]. For 3-D: one for each volume that the
        frames make up, float32 [channels, slices, rows, columns]. In [0, 1], 1 brightest (the file's window, or its
        whole range of values where it names none), or in the scanner's units.

    Raises:
        Unusable: truncated, undecodable, of the wrong kind, no volume, or not finite after rescaling.
    """
    return guarded(lambda: _read_images(path, wanted, mask), Reason.CODEC)


def read_volume(paths: Sequence[Path], grid: Grid, wanted: Wanted) -> Picture:
    """Decodes single-frame files, already in order, into one volume: float32 [channels, slices, rows, columns].

    Raises:
        Unusable: as `read_images`; SLICES where the files differ in size.
    """
    return guarded(lambda: _read_volume(paths, grid, wanted), Reason.CODEC)


def _read_images(path: Path, wanted: Wanted, mask: Mask | None) -> list[Picture]:
    dataset = _opened(path, wanted)
    if _is_colour(dataset):
        if wanted.dims == 3:
            raise Unusable(Reason.NO_VOLUME, "colour frames")
        spacing = pixel_spacing(dataset) or None
        frames = [_colour(stored, dataset) for stored in _frames(dataset)]
        return [Picture(frame, _part(mask, index), spacing) for index, frame in enumerate(frames)]
    stored_frames = [(of_frame(dataset, index), stored) for index, stored in enumerate(_frames(dataset))]
    if wanted.dims == 2:
        return [
            Picture(_grey(modality_values(stored, about), stored, about, wanted), _part(mask, index),
                    pixel_spacing(about) or None)
            for index, (about, stored) in enumerate(stored_frames)
        ]  # fmt: skip
    found = stacks([plane_of(about) for about, _ in stored_frames])
    return [
        _volume([stored_frames[index] for index in stack.order], stack.grid, wanted, _part(mask, list(stack.order)))
        for stack in found
    ]


def _read_volume(paths: Sequence[Path], grid: Grid, wanted: Wanted) -> Picture:
    slices: list[tuple[Dataset, NDArray[Any]]] = []
    for path in paths:
        dataset = _opened(path, wanted)
        if _is_colour(dataset):
            raise Unusable(Reason.NO_VOLUME, "colour slices")
        (stored,) = list(_frames(dataset))
        slices.append((_without_pixels(dataset), stored))
    return _volume(slices, grid, wanted, None)


def _volume(slices: Sequence[tuple[Dataset, NDArray[Any]]], grid: Grid, wanted: Wanted, mask: Mask | None) -> Picture:
    """One window, that of the middle slice, for the whole volume: slices must stay comparable."""
    if len({stored.shape for _, stored in slices}) != 1:
        raise Unusable(Reason.SLICES, "slices of several sizes")
    values = np.stack([modality_values(stored, about) for about, stored in slices])
    stored = np.stack([stored for _, stored in slices])
    middle = slices[len(slices) // 2][0]
    return Picture(_grey(values, stored, middle, wanted), mask, grid.spacing)


def _part(mask: Mask | None, index: int | list[int]) -> Mask | None:
    return None if mask is None else mask[index]


def _grey(values: NDArray[np.float64], stored: NDArray[Any], about: Dataset, wanted: Wanted) -> Image:
    return in_channels(_shown(values, stored, about, wanted)[None], wanted.channels)


def _shown(values: NDArray[np.float64], stored: NDArray[Any], about: Dataset, wanted: Wanted) -> Image:
    if wanted.units:
        return finite(values)
    return display(values, about, padding(stored, about))


def _opened(path: Path, wanted: Wanted) -> FileDataset:
    dataset = dcmread(path)
    if not any(word in dataset for word in _PIXEL_WORDS):
        raise Unusable(Reason.TRUNCATED)
    if _is_colour(dataset) and (wanted.channels != 3 or number(dataset, "SamplesPerPixel", 1) not in (1, 3)):
        raise Unusable(Reason.CHANNELS)
    if not _is_colour(dataset) and wanted.channels not in (1, 3):
        raise Unusable(Reason.CHANNELS)
    _check_stream(dataset)
    return dataset


def _frames(dataset: FileDataset) -> Iterator[NDArray[Any]]:
    return iter_pixels(dataset, decoding_plugin=decoder(str(dataset.file_meta.TransferSyntaxUID)))


def _without_pixels(dataset: FileDataset) -> FileDataset:
    for word in _PIXEL_WORDS:
        if word in dataset:
            del dataset[word]
    return dataset


def _is_colour(dataset: Dataset) -> bool:
    return number(dataset, "SamplesPerPixel", 1) > 1 or text(dataset, "PhotometricInterpretation") == "PALETTE COLOR"


def _colour(stored: NDArray[Any], dataset: Dataset) -> Image:
    """RGB in [0, 1]: pydicom has undone YBR, a palette is looked up here."""
    if text(dataset, "PhotometricInterpretation") == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        most = np.iinfo(stored.dtype).max
    else:
        bits = first(dataset, "BitsStored") or 8
        most = min(np.iinfo(stored.dtype).max, 2 ** int(bits) - 1)
    values: Image = np.clip(stored[..., :3].astype(np.float32) / np.float32(most), 0.0, 1.0)
    return np.ascontiguousarray(np.moveaxis(values, -1, 0))


def _check_stream(dataset: FileDataset) -> None:
    """Native pixels must all be there; a compressed stream must be as large inside as the header says."""
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    frames = max(1, number(dataset, "NumberOfFrames", 1))
    data = next((dataset[word].value for word in _PIXEL_WORDS if word in dataset), b"") or b""
    if not syntax.is_compressed:
        bits = int(dataset.BitsAllocated) * rows * columns * frames * number(dataset, "SamplesPerPixel", 1)
        if dataset.get("PhotometricInterpretation") == "YBR_FULL_422":
            bits = bits * 2 // 3
        if len(data) < (bits + 7) // 8:
            raise Unusable(Reason.TRUNCATED)
        return
    for stream in generate_frames(data, number_of_frames=frames):
        found = stream_size(stream)
        if found is not None and found != (rows, columns):
            raise Unusable(Reason.BOMB, f"{found[0]} x {found[1]} inside, {rows} x {columns} outside")
