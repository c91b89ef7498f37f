"""What does a chest phantom look like? Attenuation of a drawn chest, with or without a focal opacity.

Nothing here comes from a patient. A `Chest` is a handful of random numbers (how broad, how large the heart, where
the ribs run, where the opacity sits if there is one); `attenuation` draws it as a frontal radiograph would see it:
sums along the beam of soft tissue, air, bone and vessels. Shapes are smooth formulas over the whole picture, so
edges are anti-aliased at any size and a picture costs milliseconds.

Directions are a radiologist's: the patient faces us, so the patient's left is on the right of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.floating[Any]]

_LETTER_L = ("1...", "1...", "1...", "1...", "1111")


@dataclass(frozen=True)
class Opacity:
    """A patch of lung filled with fluid: where, how large, how dense, how ragged."""

    x: float
    y: float
    radius: float
    density: float
    lobes: tuple[float, ...]


@dataclass(frozen=True)
class Chest:
    """One patient's anatomy in units of half the picture; drawn by `draw_chest`."""

    breadth: float
    heart: float
    heart_tilt: float
    ribs: float
    rib_phase: float
    rib_contrast: float
    diaphragm: float
    bases: tuple[float, float]
    vessels: tuple[float, ...]
    vessel_density: float
    soft_tissue: float
    breast: float
    gas: float
    nipple: tuple[float, float, float]
    opacity: Opacity | None


@dataclass(frozen=True)
class Pose:
    """How the patient stood this time: turned (radians), moved and scaled; `leads`: bed-side, with ECG leads."""

    turn: float
    right: float
    down: float
    scale: float
    leads: float


def draw_chest(rng: np.random.Generator, *, opacity: bool, density: tuple[float, float]) -> Chest:
    """A random patient; `density` is the range from which an opacity's density is drawn."""
    finding = None
    if opacity:
        side = rng.choice([-1.0, 1.0])
        finding = Opacity(
            x=float(side * rng.uniform(0.33, 0.56)),
            y=float(rng.uniform(-0.38, 0.34)),
            radius=float(rng.uniform(0.13, 0.22)),
            density=float(rng.uniform(*density)),
            lobes=tuple(float(value) for value in rng.uniform(-1, 1, 6)),
        )
    return Chest(
        breadth=float(rng.normal(1.0, 0.05)),
        heart=float(rng.normal(1.0, 0.11)),
        heart_tilt=float(rng.normal(0.55, 0.12)),
        ribs=float(rng.normal(0.175, 0.008)),
        rib_phase=float(rng.uniform(0, 1)),
        rib_contrast=float(rng.uniform(0.7, 1.25)),
        diaphragm=float(rng.normal(0.46, 0.05)),
        bases=(float(rng.normal(0.0, 0.02)), float(rng.normal(0.07, 0.02))),
        vessels=tuple(float(value) for value in rng.uniform(-1, 1, 28)),
        vessel_density=float(rng.uniform(0.7, 1.3)),
        soft_tissue=float(rng.uniform(0.85, 1.2)),
        breast=float(rng.choice([0.0, rng.uniform(0.4, 1.0)])),
        gas=float(rng.uniform(0.3, 1.0)),
        nipple=(float(rng.uniform(0.35, 0.55)), float(rng.uniform(0.1, 0.3)), float(rng.choice([0.0, 0.0, 1.0]))),
        opacity=finding,
    )


def draw_pose(rng: np.random.Generator, *, bedside: bool) -> Pose:
    """A random position; bed-side pictures are turned and moved more, and show leads."""
    much = 1.6 if bedside else 1.0
    return Pose(
        turn=float(rng.normal(0, 0.03 * much)),
        right=float(rng.normal(0, 0.025 * much)),
        down=float(rng.normal(0, 0.03 * much)),
        scale=float(rng.normal(1.08 if bedside else 1.0, 0.03)),
        leads=float(rng.uniform(0.5, 1.0)) if bedside else 0.0,
    )


def attenuation(chest: Chest, pose: Pose, size: int, rng: np.random.Generator) -> Plane:
    """The picture as summed attenuation, float32 [size, size], about 0 (air) to 2.5 (spine).

    `rng` draws only what differs between two pictures of one patient: texture and the way of the leads.
    """
    grid = np.linspace(-1, 1, size, dtype=np.float32)
    across, along = np.meshgrid(grid, grid)
    turned = np.cos(pose.turn), np.sin(pose.turn)
    x = (turned[0] * across + turned[1] * along - pose.right) / (pose.scale * chest.breadth)
    y = (turned[0] * along - turned[1] * across - pose.down) / pose.scale
    t = np.abs(x)
    blur = 2.2 / size  # one and a half pixels: nothing is drawn sharper than the grid can show

    body = _body(x, y, blur)
    lungs = _lungs(chest, x, y, blur)
    thick = body * chest.soft_tissue * (0.95 + 0.25 * _step(y - 0.55, 0.15))
    picture = thick - lungs * 0.78 * chest.soft_tissue
    picture += body * (_spine(x, y) + _mediastinum(chest, x, y, blur))
    picture += _bones(chest, t, y, blur) * body
    picture += _vessels(chest, x, y) * lungs
    picture += chest.breast * 0.15 * body * _disc((t - 0.46) / 0.34, (y - 0.36) / 0.27, 0.12)
    picture -= chest.gas * 0.30 * body * _disc((x - 0.36) / 0.16, (y - 0.72 - chest.bases[1]) / 0.09, 0.18)
    across_nipple, down_nipple, has = chest.nipple
    picture += has * 0.13 * _disc((t - across_nipple) / 0.035, (y - down_nipple) / 0.035, 0.4)
    if chest.opacity is not None:
        picture += _consolidation(chest.opacity, x, y, _texture(rng, size)) * lungs
    picture += 0.035 * _texture(rng, size) * body
    if pose.leads:
        picture += pose.leads * _leads(rng, across, along, blur)
    result: Plane = np.maximum(picture, 0).astype(np.float32)
    return result


def marker(size: int) -> Plane:
    """The side marker, a lead letter L in the upper right corner: bool-like float32 [size, size]."""
    plane = np.zeros((size, size), dtype=np.float32)
    zoom = max(1, size // 64)
    letter = np.kron([[cell == "1" for cell in row] for row in _LETTER_L], np.ones((zoom, zoom)))
    top, left = size // 16, size - size // 14 - letter.shape[1]
    plane[top : top + letter.shape[0], left : left + letter.shape[1]] = letter
    return plane


def _step(distance: Plane, softness: float) -> Plane:
    """0 to 1 across `distance` = 0, over about `softness`."""
    result: Plane = 0.5 + 0.5 * np.tanh(distance / softness)
    return result


def _disc(u: Plane, v: Plane, softness: float) -> Plane:
    """1 inside the unit circle of (u, v), 0 outside."""
    return _step(1 - np.sqrt(u * u + v * v), softness)


def _body(x: Plane, y: Plane, blur: float) -> Plane:
    shoulder = _step(y + 0.80 - 0.10 * np.abs(x), 0.10)
    half_width = 0.24 + 0.74 * shoulder - 0.05 * _step(y - 0.2, 0.3)
    edge = half_width - np.abs(x)
    return _step(edge, 3 * blur) * (0.72 + 0.28 * np.clip(edge / 0.35, 0, 1))


def _lungs(chest: Chest, x: Plane, y: Plane, blur: float) -> Plane:
    total = np.zeros_like(x)
    for side, lift in ((-1.0, chest.bases[0]), (1.0, chest.bases[1])):
        t = side * x
        u, v = (t - 0.43) / 0.37, (y - 0.10) / 0.88
        oval = _step(1 - (np.abs(u) ** 2.3 + np.abs(v) ** 2.3), 4.5 * blur)
        dome = chest.diaphragm + lift + 0.75 * (t - 0.36) ** 2 + 0.5 * np.maximum(t - 0.55, 0) ** 1.5
        total += oval * _step(dome - y, 1.5 * blur)
    result: Plane = total * (0.90 + 0.10 * _step(y + 0.3, 0.3))
    return result


def _spine(x: Plane, y: Plane) -> Plane:
    discs = 0.5 + 0.5 * np.cos(2 * np.pi * y / 0.125)
    result: Plane = (0.17 + 0.09 * discs) * np.exp(-((x / 0.085) ** 4))
    return result


def _mediastinum(chest: Chest, x: Plane, y: Plane, blur: float) -> Plane:
    cos, sin = np.cos(chest.heart_tilt), np.sin(chest.heart_tilt)
    right, down = x - 0.13, y - 0.25
    heart = _disc(
        (cos * right + sin * down) / (0.37 * chest.heart),
        (cos * down - sin * right) / (0.26 * chest.heart),
        5 * blur,
    )
    vessels = _step(0.145 - np.abs(x - 0.01), 1.6 * blur) * _step(0.25 - y, 0.1)
    heart *= _step(chest.diaphragm + 0.5 * chest.bases[1] + 0.06 - y, 0.07)
    knob = _disc((x - 0.13) / 0.085, (y + 0.30) / 0.10, 8 * blur)
    whole = np.maximum(np.maximum(0.62 * heart, 0.44 * vessels), 0.50 * knob)
    windpipe = np.exp(-(((x - 0.01) / 0.045) ** 4)) * _step(-0.16 - y, 0.04)
    bronchi = np.exp(-(((np.abs(x) - 0.5 * (y + 0.20)) / 0.030) ** 2)) * _step(y + 0.2, 0.03) * _step(0.0 - y, 0.04)
    result: Plane = whole - 0.26 * windpipe - 0.12 * bronchi
    return result


def _bones(chest: Chest, t: Plane, y: Plane, blur: float) -> Plane:
    cage = _step(0.86 - 0.30 * np.clip(-0.25 - y, 0, 1) - t, 0.03) * _step(y + 0.84, 0.05) * _step(0.58 - y, 0.12)
    behind = _bars(y - (-0.16 * np.sin(np.pi * np.clip(t / 0.62, 0, 1.2)) + 0.42 * t * t), chest, 0.23, blur)
    before = _bars(y - (0.20 + 0.62 * np.maximum(0.84 - t, 0) ** 1.1), chest, 0.20, blur) * _step(t - 0.36, 0.07)
    ribs = chest.rib_contrast * cage * (0.21 * behind * _step(t - 0.07, 0.03) + 0.11 * before)
    run = y + 0.60 + 0.20 * t - 0.05 * np.sin(7.5 * t)
    clavicle = _band(run / 0.040, blur / 0.040) * _step(t - 0.07, 0.015) * _step(0.82 - t, 0.03)
    scapula = _step(t - 0.70 - 0.18 * (y + 0.2), 0.02) * _step(0.25 - y, 0.08) * _step(y + 0.62, 0.06)
    result: Plane = ribs + 0.26 * clavicle + 0.10 * scapula
    return result


def _bars(height: Plane, chest: Chest, share: float, blur: float) -> Plane:
    """Ribs: bars of `share` of the spacing, one below the other."""
    turns = height / chest.ribs + chest.rib_phase
    return _band((turns - np.round(turns)) / share, blur / (share * chest.ribs))


def _band(d: Plane, softness: float) -> Plane:
    """A bar of half-width 1, denser towards its edges as cortical bone is."""
    return _step(1 - np.abs(d), max(softness, 0.25)) * (0.72 + 0.38 * np.minimum(d * d, 1))


def _vessels(chest: Chest, x: Plane, y: Plane) -> Plane:
    total = np.zeros_like(x)
    for side, wander in ((-1.0, chest.vessels[:14]), (1.0, chest.vessels[14:])):
        right, down = side * x - 0.15, y - 0.02
        far = np.sqrt(right * right + down * down)
        turn = np.arctan2(down, right)
        total += 0.22 * np.exp(-((far / 0.13) ** 2))
        apart = 1 - np.exp(-((far / 0.14) ** 2))  # vessels part from the hilum, they do not meet in a point
        for k in range(7):
            bend = 0.9 * far + 0.25 * np.sin(9 * far + 6 * wander[2 * k])
            way = -1.25 + 2.5 * k / 6 + 0.16 * wander[2 * k] + wander[2 * k + 1] * bend
            width = np.maximum(0.030 * (1 - 0.7 * far), 0.012)
            total += 0.28 * apart * np.exp(-((far * (turn - way) / width) ** 2) - 1.9 * far)
    result: Plane = chest.vessel_density * total
    return result


def _consolidation(spot: Opacity, x: Plane, y: Plane, texture: Plane) -> Plane:
    right, down = x - spot.x, y - spot.y
    turn = np.arctan2(down, right)
    a, b, c, d, e, f = spot.lobes
    ragged = (
        1 + 0.20 * a * np.cos(turn + 3 * b) + 0.16 * c * np.cos(2 * turn + 3 * d) + 0.14 * e * np.cos(3 * turn + 3 * f)
    )
    far = np.sqrt(right * right + down * down) / (spot.radius * ragged)
    result: Plane = spot.density * np.exp(-(far**2.6)) * (1 + 0.35 * texture)
    return result


def _texture(rng: np.random.Generator, size: int) -> Plane:
    """Smooth cloudy noise of unit variance, two octaves."""
    total = np.zeros((size, size), dtype=np.float32)
    for cells, weight in ((9, 0.8), (23, 0.6)):
        knots = rng.standard_normal((cells, cells)).astype(np.float32)
        at = np.linspace(0, cells - 1.001, size)
        low = at.astype(int)
        part = (at - low).astype(np.float32)
        ease = part * part * (3 - 2 * part)
        rows = knots[low] * (1 - ease)[:, None] + knots[low + 1] * ease[:, None]
        total += weight * 1.5 * (rows[:, low] * (1 - ease) + rows[:, low + 1] * ease)
    return total


def _leads(rng: np.random.Generator, x: Plane, y: Plane, blur: float) -> Plane:
    """ECG electrodes and their wires, as on a picture taken in bed."""
    total = np.zeros_like(x)
    for side in (-1.0, 1.0):
        ex, ey = side * rng.uniform(0.45, 0.7), rng.uniform(-0.55, 0.5)
        bend = rng.uniform(-0.3, 0.3)
        far = np.sqrt((x - ex) ** 2 + (y - ey) ** 2)
        total += 0.45 * _step(0.035 - np.abs(far - 0.02), blur)
        wire = x - ex - bend * (y - ey) * (y + 1) - 0.04 * np.sin(5 * (y - ey))
        total += 0.30 * np.exp(-((wire / (0.9 * blur)) ** 2)) * _step(ey - y, blur)
    return total
