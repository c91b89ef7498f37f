"""What happens to an image between the file and the network?

Two lists of a study name steps of `TRANSFORMS`: `input.transforms` prepares every image in the same way, and
`input.augmentation` changes training images at random. The steps are MONAI's; this file holds their names, what a
study may set, and the order. Constants come from the study and never from the images of a site, so that what is done
to one patient does not depend on another.

Prepared images are float32 arrays [channels, height, width] (or [channels, depth, height, width]) in and out; how a
batch is augmented stands in `models.augmentation`. The same image and the same seed give the same result, on every call
and in every process of the same version of MONAI. Where a step moves the image, a label map that comes with it is moved
by the same drawn numbers, taking the nearest label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import radians
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import fields
from models.augmentation import Affine, Augmentation, Brightness, Contrast, Each, Flip, Noise, Step, bare_arrays
from models.fields import Choice, Field, Problem, Real

Image = NDArray[np.float32]
_Maker = Callable[[Any, dict[str, Any], tuple[int, ...]], Any]


@dataclass(frozen=True)
class Transform:
    """One entry of the table.

    Attributes:
        step: how a random step, under input.augmentation, is done; None for one under input.transforms.
        parameters: what a study may set.
        make: (the module monai.transforms, parameters, size of the network's input) -> a MONAI transform.
        rising: two parameters of which the first must be below the second.
        moves: a random step moves the image, and so its label map.
    """

    step: type[Step] | None
    parameters: Mapping[str, Field]
    make: _Maker
    rising: tuple[str, str] | None = None
    moves: bool = False

    @property
    def random(self) -> bool:
        """Whether it draws."""
        return self.step is not None


def _share(default: float) -> Real:
    return Real(default, 0.0, 1.0)


_EDGE = Choice("border", ("border", "zeros", "reflection"))


def _affine(monai: Any, given: dict[str, Any], size: tuple[int, ...]) -> Any:
    """Rotation in the image plane, shift and zoom in one interpolation (three would blur thrice)."""
    turn = radians(given["degrees"])
    return monai.RandAffine(
        prob=given["probability"],
        rotate_range=turn if len(size) == 2 else (turn, 0.0, 0.0),
        translate_range=[given["shift"] * side for side in size],
        scale_range=[given["zoom"]] * len(size),
        mode="bilinear",
        padding_mode=given["edge"],
        spatial_size=size,
        cache_grid=True,
    )


def _rotate(monai: Any, given: dict[str, Any], size: tuple[int, ...]) -> Any:
    return _affine(monai, {**given, "shift": 0.0, "zoom": 0.0}, size)


def _shift(monai: Any, given: dict[str, Any], size: tuple[int, ...]) -> Any:
    return _affine(monai, {**given, "degrees": 0.0, "zoom": 0.0}, size)


def _zoom(monai: Any, given: dict[str, Any], size: tuple[int, ...]) -> Any:
    return _affine(monai, {**given, "degrees": 0.0, "shift": 0.0}, size)


def _elastic(monai: Any, given: dict[str, Any], size: tuple[int, ...]) -> Any:
    """A smooth displacement of a share of the smallest side (Simard 2003)."""
    bend = given["bend"] * min(size)
    common = {"prob": given["probability"], "padding_mode": given["edge"], "spatial_size": size, "mode": "bilinear"}
    if len(size) == 3:
        # MONAI smooths uniform noise of this range; sigma 4 to 6 leaves about a hundredth of it.
        return monai.Rand3DElastic(sigma_range=(4.0, 6.0), magnitude_range=(50 * bend, 100 * bend), **common)
    spacing = max(4.0, min(size) / 8)
    return monai.Rand2DElastic(spacing=(spacing, spacing), magnitude_range=(0.5 * bend, bend), **common)


_AXES = {"horizontal": -1, "vertical": -2, "depth": -3}
_PROBABILITY, _DEGREES, _SHIFT, _ZOOM = _share(1.0), Real(6.0, 0.0, 180.0), Real(0.05, 0.0, 0.5), Real(0.1, 0.0, 0.5)

TRANSFORMS: dict[str, Transform] = {
    "scale_intensity": Transform(
        None, {"low": Real(0.0), "high": Real(1.0)},
        lambda monai, p, _: monai.ScaleIntensity(p["low"], p["high"]), ("low", "high")),
    "scale_percentiles": Transform(
        None, {"lower": Real(1.0, 0.0, 100.0), "upper": Real(99.0, 0.0, 100.0)},
        lambda monai, p, _: monai.ScaleIntensityRangePercentiles(p["lower"], p["upper"], 0.0, 1.0, clip=True),
        ("lower", "upper")),
    "window": Transform(
        None, {"low": Real(None), "high": Real(None)},
        lambda monai, p, _: monai.ScaleIntensityRange(p["low"], p["high"], 0.0, 1.0, clip=True), ("low", "high")),
    "normalise": Transform(
        None, {"mean": Real(None), "std": Real(None, 0.0, above=True)},
        lambda monai, p, _: monai.NormalizeIntensity(p["mean"], p["std"])),
    "equalise": Transform(
        None, {}, lambda monai, p, _: monai.HistogramNormalize(num_bins=256, min=0.0, max=1.0)),
    "contrast": Transform(
        None, {"gamma": Real(None, 0.1, 10.0)}, lambda monai, p, _: monai.AdjustContrast(p["gamma"])),
    "resize": Transform(
        None, {"mode": Choice("area", ("area", "bilinear", "nearest"))},
        lambda monai, p, size: _resize(monai, size, p["mode"])),
    "random_flip": Transform(
        Flip, {"probability": _share(0.5), "axis": Choice("horizontal", tuple(_AXES))},
        lambda monai, p, _: monai.RandFlip(p["probability"], _AXES[p["axis"]]), moves=True),
    "random_rotate": Transform(
        Affine, {"probability": _PROBABILITY, "degrees": _DEGREES, "edge": _EDGE}, _rotate, moves=True),
    "random_shift": Transform(
        Affine, {"probability": _PROBABILITY, "shift": _SHIFT, "edge": _EDGE}, _shift, moves=True),
    "random_zoom": Transform(
        Affine, {"probability": _PROBABILITY, "zoom": _ZOOM, "edge": _EDGE}, _zoom, moves=True),
    "random_affine": Transform(
        Affine, {"probability": _PROBABILITY, "degrees": _DEGREES, "shift": _SHIFT, "zoom": _ZOOM, "edge": _EDGE},
        _affine, moves=True),
    "random_elastic": Transform(
        Each, {"probability": _share(0.3), "bend": Real(0.03, 0.0, 0.2), "edge": _EDGE}, _elastic,
        moves=True),
    "random_contrast": Transform(
        Contrast, {"probability": _share(0.5), "low": Real(0.8, 0.1, 10.0), "high": Real(1.25, 0.1, 10.0)},
        lambda monai, p, _: monai.RandAdjustContrast(p["probability"], (p["low"], p["high"])), ("low", "high")),
    "random_brightness": Transform(
        Brightness, {"probability": _share(0.5), "offset": Real(0.1, 0.0, 10.0)},
        lambda monai, p, _: monai.RandShiftIntensity(p["offset"], prob=p["probability"])),
    "random_blur": Transform(
        Each, {"probability": _share(0.2), "sigma": Real(0.7, 0.0, 10.0, above=True)},
        lambda monai, p, _: monai.RandGaussianSmooth(*[(0.01, p["sigma"])] * 3, prob=p["probability"])),
    "random_low_resolution": Transform(
        Each, {"probability": _share(0.25), "least": Real(0.5, 0.1, 1.0)},
        lambda monai, p, size: monai.RandSimulateLowResolution(
            p["probability"], upsample_mode="bilinear" if len(size) == 2 else "trilinear",
            zoom_range=(p["least"], 1.0))),
    "random_bias_field": Transform(
        Each, {"probability": _share(0.2), "strength": Real(0.1, 0.0, 1.0)},
        lambda monai, p, _: monai.RandBiasField(coeff_range=(0.0, p["strength"]), prob=p["probability"])),
    "gaussian_noise": Transform(
        Noise, {"probability": _share(0.5), "std": Real(0.05, 0.0, 10.0)},
        lambda monai, p, _: monai.RandGaussianNoise(p["probability"], 0.0, p["std"])),
}  # fmt: skip
"""Every step that a study can name. Shifts and zooms are shares of the image, angles are degrees, both ways."""


def _resize(monai: Any, size: tuple[int, ...], mode: str) -> Any:
    mode = {"bilinear": "bilinear" if len(size) == 2 else "trilinear"}.get(mode, mode)
    return monai.Resize(size, mode=mode)


class Preparation:
    """Some steps in their order, the same for every image.

    Args:
        entries: steps as a study writes them: {"name": ..., "parameters": {...}}.
        size: the network's input in pixels.

    Raises:
        ValueError: a step or a parameter does not exist, or the step does not belong here.
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]], size: Sequence[int]) -> None:
        self._size = tuple(size)
        self._steps = [made for made, _ in _made(entries, self._size, random=False)]
        self._resize: Any = None

    def __call__(self, image: Image) -> Image:
        """float32 [C, *any size] -> float32 [C, *input.size], never a view of what came in.

        Where no step has brought the image to the network's size it is resized, by area.
        """
        result: Any = np.array(image, dtype=np.float32)
        with bare_arrays():
            for step in self._steps:
                result = step(result)
            if tuple(result.shape[1:]) != self._size:
                self._resize = self._resize or _resize(_monai(), self._size, "area")
                result = self._resize(result)
        return np.array(result, dtype=np.float32)


def preparation(spec: Mapping[str, Any]) -> Preparation:
    """What every image of a study goes through."""
    return Preparation(spec["input"].get("transforms", ()), spec["input"]["size"])


def augmentation(spec: Mapping[str, Any]) -> Augmentation:
    """What the training images of a study go through."""
    return augmenting(spec["input"].get("augmentation", ()), spec["input"]["size"])


def augmenting(entries: Sequence[Mapping[str, Any]], size: Sequence[int]) -> Augmentation:
    """Random steps, as a study writes them, for images of this size.

    Raises:
        ValueError: a step or a parameter does not exist, or the step does not belong here.
    """
    made = _made(entries, tuple(size), random=True)
    return Augmentation([entry.step(step, moves=entry.moves) for step, entry in made if entry.step is not None])


def _made(entries: Sequence[Mapping[str, Any]], size: tuple[int, ...], *, random: bool) -> list[tuple[Any, Transform]]:
    """MONAI's transform for each entry."""
    made = []
    for entry in entries:
        if wrong := _step(entry, "name", random=random):
            raise ValueError(str(wrong[0]))
        transform = TRANSFORMS[entry["name"]]
        given = fields.read(transform.parameters, entry.get("parameters", {}))
        made.append((transform.make(_monai(), given, size), transform))
    return made


def problems(section: Mapping[str, Any], size: tuple[int, ...]) -> list[Problem]:
    """What is wrong with input.transforms and input.augmentation."""
    found = []
    for key, random in (("transforms", False), ("augmentation", True)):
        steps = section.get(key, ())
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            found.append(Problem(f"input.{key}", "a list of steps is expected", f"Write [[input.{key}]] entries."))
            continue
        for index, entry in enumerate(steps):
            found += _step(entry, f"input.{key}[{index}]", random=random)
            if len(size) == 2 and not found and entry.get("parameters", {}).get("axis") == "depth":
                where = f"input.{key}[{index}].parameters.axis"
                found.append(Problem(where, "an image has no depth", 'Write "horizontal" or "vertical".'))
    return found


def _step(entry: Any, where: str, *, random: bool) -> list[Problem]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        return [Problem(where, "a step needs a name", 'Write { name = "scale_intensity" }.')]
    name, given = entry["name"], entry.get("parameters", {})
    allowed = {key: transform for key, transform in TRANSFORMS.items() if transform.random == random}
    if name not in TRANSFORMS:
        return [fields.unknown(where, "transform", name, allowed)]
    if name not in allowed:
        what = f"{name} is random, and every image must be prepared in the same way" if not random else ""
        other = "input.augmentation" if not random else "input.transforms"
        return [Problem(where, what or f"{name} is not random, so it augments nothing", f"Put it under {other}.")]
    extra = sorted(set(entry) - {"name", "parameters"})
    if extra:
        return [Problem(f"{where}.{extra[0]}", "there is no such entry", "Write it inside parameters = { ... }.")]
    transform = TRANSFORMS[name]
    found = fields.check(transform.parameters, given, f"{where}.parameters")
    if not found and transform.rising:
        low, high = transform.rising
        values = fields.read(transform.parameters, given)
        if values[low] >= values[high]:
            what = f"{low} ({values[low]:g}) is not below {high} ({values[high]:g})"
            found.append(Problem(f"{where}.parameters.{low}", what, f"Write a {low} below {high}."))
    return found


def _monai() -> Any:
    import monai.transforms

    return monai.transforms
