"""Which real sets does bench-learning train on, at which hospitals, and with which plan? All of it is fixed here.

Each set becomes one folder for each hospital, with an npz and its declaration, as `consilium-coordinator simulate
--data` takes it. Some are made smaller before the study resizes them, most to fit in memory: moles to 64 × 48 pixels,
white cells to 96 × 96, retinas to 192 × 192, breasts to 28 × 28, hippocampi cut or padded to 40 × 56 × 40 voxels. A
pixel of a smaller retina is vessel where 40 % of it was (`_covered`), or thin vessels would break; the study itself
would take the nearest pixel.

The hospitals are the sets' own wherever they name them; sets of one hospital are dealt out by patient. Which side of
the split a patient is on is a keyed hash of the patient, except where the set's authors published a split.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client import dealing
from client.imaging import Source

DATA = Path(os.environ.get("CONSILIUM_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
Rows = list[dict[str, str]]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Bench:
    """One set and its plan.

    Attributes:
        make: writes the hospitals' folders below a folder and returns their names.
        plan: the study without its sites, as TOML.
        margin: how far below the pooled figure the federated one may be, in points of the study's metric.
        published: a figure to reach, in points, or 0.
    """

    folder: str
    make: Callable[[Path, Path], tuple[str, ...]]
    plan: str
    margin: float
    published: float = 0.0

    @property
    def there(self) -> bool:
        """Whether the real data are on this machine."""
        return (DATA / self.folder).exists()

    def hospitals(self, build: Path) -> tuple[str, ...]:
        """The hospitals' names; their folders are below `build`, made once."""
        ready = build / ".ready"
        if not ready.exists():
            shutil.rmtree(build, ignore_errors=True)
            build.mkdir(parents=True)
            ready.write_text("\n".join(self.make(DATA / self.folder, build)))
        return tuple(ready.read_text().split())


# ---- the sets ------------------------------------------------------------------------------------------------


def _chest(data: Path, out: Path) -> tuple[str, ...]:
    """5,856 X-rays of one hospital by patient group over five; with and without pneumonia."""
    names = ("north", "east", "south", "west", "centre")
    dealing.deal(data, out, names)
    return names


def _medmnist(data: Path, out: Path) -> tuple[str, ...]:
    """A MedMNIST set with its published split over three hospitals."""
    names = ("north", "east", "south")
    dealing.deal(data, out, names)
    return names


def _breast(data: Path, out: Path) -> tuple[str, ...]:
    """BreastMNIST as published but for its size: made 28 px wide by cubic splines, as its authors made theirs."""
    arrays: dict[str, NDArray[Any]] = dict(np.load(data))
    for part in ("train", "val", "test"):
        pictures = (Image.fromarray(picture) for picture in arrays[f"{part}_images"])
        resized = [np.asarray(picture.resize((28, 28), Image.Resampling.BICUBIC)) for picture in pictures]
        arrays[f"{part}_images"] = np.stack(resized)
    smaller = out / "breastmnist.npz"
    np.savez(smaller, **arrays)
    return _medmnist(smaller, out)


def _ham(data: Path, out: Path) -> tuple[str, ...]:
    """10,015 images of moles by the four sites that took them; the patient is the lesion.

    Nine lesions were seen at two sites. They stay with the first, or one could train where the other tests.
    """
    rows, home = _rows(data / "metadata.csv"), dict[str, str]()
    rows = [row for row in rows if home.setdefault(row["lesion_id"], row["site"]) == row["site"]]
    for site in sorted({row["site"] for row in rows}):
        mine = [row for row in rows if row["site"] == site]
        images = np.stack([_picture(data / "images" / f"{row['image_id']}.jpg", (64, 48)) for row in mine])
        _keep(out, _name(site), images=images, labels=_column(mine, "dx"), patients=_column(mine, "lesion_id"))
    return _made(out)


def _lgg(data: Path, out: Path) -> tuple[str, ...]:
    """MR slices of 95 patients with glioma by the three hospitals that have more than one."""
    found: dict[str, list[Path]] = {}
    for path in sorted((data / "volumes").glob("*.npz")):
        found.setdefault({"DU": "duke", "HT": "henry-ford", "CS": "jefferson"}.get(path.name[5:7], ""), []).append(path)
    for site, paths in found.items():
        if not site:
            continue
        volumes = [np.load(path) for path in paths]
        _keep(
            out, site,
            images=np.concatenate([volume["image"] for volume in volumes]),
            masks=np.concatenate([(volume["mask"] > 0).astype(np.uint8) for volume in volumes]),
            patients=np.concatenate([[p.stem] * len(v["mask"]) for p, v in zip(paths, volumes, strict=True)]),
        )  # fmt: skip
    return _made(out)


def _wbc(data: Path, out: Path) -> tuple[str, ...]:
    """White blood cells by laboratory: cytoplasm and nucleus."""
    for folder, site in (("site1_jiangxi_tecom", "jiangxi-tecom"), ("site2_cellavision", "cellavision")):
        files = [path for path in sorted((data / folder).iterdir()) if "mask" not in path.stem]
        pairs = [(path, _mask_of(path)) for path in files]
        _keep(
            out, site,
            images=np.stack([_picture(path, (96, 96)) for path, _ in pairs]),
            masks=np.stack([_levels(_mask(mask, (96, 96))) for _, mask in pairs]),
            patients=np.array([path.stem for path, _ in pairs]),
        )  # fmt: skip
    return _made(out)


def _retina(data: Path, out: Path) -> tuple[str, ...]:
    """Fundus photographs by source; both eyes of a person are one patient."""
    for folder, site in (("chasedb1", "chase"), ("stare", "stare")):
        files = sorted(path for path in (data / folder).iterdir() if path.suffix == ".jpg")
        masks = [path.with_name(f"{path.stem}_vessels.png") for path in files]
        _keep(
            out, site,
            images=np.stack([_picture(path, (192, 192)) for path in files]),
            masks=np.stack([_covered(path, (192, 192)) for path in masks]),
            patients=np.array([path.stem.rstrip("LR") for path in files]),
        )  # fmt: skip
    return _made(out)


def _hippocampus(data: Path, out: Path) -> tuple[str, ...]:
    """Hippocampi in 260 MR volumes of one hospital, over three by patient: anterior and posterior part."""
    import nibabel

    names = ("north", "east", "south")
    files = sorted((data / "images").glob("*.nii*"))
    at = [dealing.hospital_of(path.name, 0, 7, len(names)) for path in files]
    for number, site in enumerate(names):
        mine = [path for path, where in zip(files, at, strict=True) if where == number]
        volumes = [np.asarray(nibabel.load(path).dataobj, np.float32) for path in mine]
        labels = [np.asarray(nibabel.load(data / "labels" / path.name).dataobj, np.uint8) for path in mine]
        _keep(
            out, site,
            images=np.stack([_whole(volume / max(float(volume.max()), 1.0)) for volume in volumes]),
            masks=np.stack([_whole(label) for label in labels]),
            patients=np.array([path.name for path in mine]),
            spacing=np.ones(3),
        )  # fmt: skip
    return names


# ---- how they are read ---------------------------------------------------------------------------------------


def _rows(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        return list(csv.DictReader(stream))


def _column(rows: Rows, name: str) -> NDArray[Any]:
    return np.array([row[name].strip() for row in rows])


def _name(site: str) -> str:
    return site.replace("_", "-")


def _made(out: Path) -> tuple[str, ...]:
    return dealing.own_folders(out)


def _picture(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BOX))


def _mask(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L").resize(size, Image.Resampling.NEAREST))


def _covered(path: Path, size: tuple[int, int], share: float = 0.4) -> NDArray[np.uint8]:
    """1 where at least `share` of a pixel was marked before it was made smaller, so that thin vessels stay whole."""
    with Image.open(path) as picture:
        grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.BOX))
    return (grey >= 255 * share).astype(np.uint8)


def _mask_of(path: Path) -> Path:
    found = [other for other in path.parent.iterdir() if other.stem.startswith(path.stem) and "mask" in other.stem]
    return found[0]


def _levels(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Background 0, cytoplasm (128) 1, nucleus (255) 2."""
    return (mask > 64).astype(np.uint8) + (mask > 192)


def _whole(volume: NDArray[Any], sides: tuple[int, int, int] = (40, 56, 40)) -> NDArray[Any]:
    """A volume in the middle of a box, what lies outside cut off."""
    box = np.zeros(sides, volume.dtype)
    spare = [(have - want) // 2 for have, want in zip(volume.shape, sides, strict=True)]
    cut = tuple(slice(max(0, first), max(0, first) + want) for first, want in zip(spare, sides, strict=True))
    part = volume[cut]
    room = [(want - have) // 2 for have, want in zip(part.shape, sides, strict=True)]
    box[tuple(slice(first, first + have) for first, have in zip(room, part.shape, strict=True))] = part
    return box


def _keep(out: Path, site: str, **arrays: NDArray[Any]) -> None:
    folder = out / site
    folder.mkdir()
    np.savez(folder / "images.npz", **arrays)
    (folder / dealing.DECLARATION).write_text(Source(kind="npz", path=Path("images.npz")).to_toml())


# ---- the plans -----------------------------------------------------------------------------------------------

_PLAN = """
schema = 1
[study]
name = "{name}"
title = "{name}"
purpose = "Compare local, federated and pooled training on a real set."
[task]
kind = "{kind}"
classes = [{classes}]
[network]
name = "{network}"
[input]
channels = {channels}
size = [{size}]
transforms = [{{ name = "normalise", parameters = {{ mean = "0.5", std = "0.25" }} }}]
augmentation = [{augmentation}]
[optimiser]
name = "adamw"
learning_rate = {rate}
weight_decay = 0.01
batch_size = {batch}
schedule = "cosine"
[rounds]
count = {rounds}
local_steps = {steps}
deadline_seconds = 3600
[split]
validation = 0.1
test = 0.25
[publish]
choose = "last"
"""
_AFFINE, _FLIP = '{ name = "random_affine" }', '{ name = "random_flip" }'
_FREE = (
    '{ name = "random_affine", parameters = { degrees = "15", shift = "0.1", zoom = "0.15" } }, '
    '{ name = "random_flip" }'
)
_HALF = '{ name = "random_affine", parameters = { probability = "0.5" } }'


def _plan(name: str, classes: str, size: str, **changes: Any) -> str:
    values: dict[str, Any] = {
        "kind": "classification", "network": "resnet-small", "channels": 1, "augmentation": _AFFINE, "rate": "0.002",
        "batch": 32, "rounds": 15, "steps": 20, **changes,
    }  # fmt: skip
    quoted = ", ".join(f'"{word}"' for word in classes.split())
    return _PLAN.format(name=name, classes=quoted, size=size, **values)


_MASK = {"kind": "segmentation", "network": "unet", "rate": "0.003"}

SETS: dict[str, Bench] = {
    "chest-xray": Bench(
        "chest_xray_pneumonia", _chest,
        _plan("chest-xray", "normal pneumonia", "48, 48", rounds=10, steps=15, augmentation=_HALF), 1.0,
    ),
    "pneumoniamnist": Bench(
        "medmnist/pneumoniamnist_reconstructed.npz", _medmnist,
        _plan("pneumoniamnist", "normal pneumonia", "28, 28", rounds=10, steps=40, augmentation=_HALF), 1.0, 94.4,
    ),
    "breastmnist": Bench(
        "medmnist/breastmnist_64.npz", _breast,
        _plan("breastmnist", "malignant benign", "28, 28", rounds=34, steps=10, augmentation=_FREE), 1.0, 90.1,
    ),
    "ham10000": Bench(
        "ham10000", _ham,
        _plan(
            "ham10000", "akiec bcc bkl df mel nv vasc", "48, 64",
            channels=3, rounds=60, steps=5, augmentation=_FLIP,
        ), 1.0,
    ),
    "lgg-mri": Bench(
        "lgg_mri", _lgg, _plan("lgg-mri", "background tumour", "64, 64", **_MASK, channels=3, batch=16, steps=10), 2.0,
    ),
    "wbc": Bench(
        "wbc_segmentation", _wbc,
        _plan("wbc", "background cytoplasm nucleus", "64, 64", **_MASK, channels=3, batch=8, rounds=100, steps=5), 2.0,
    ),
    "retina": Bench(
        "retina_vessels", _retina,
        _plan(
            "retina", "background vessel", "192, 192", **(_MASK | {"rate": "0.006"}), channels=3, batch=2,
            rounds=60, steps=5,
        ), 2.0,
    ),
    "hippocampus": Bench(
        "hippocampus_msd04", _hippocampus,
        _plan(
            "hippocampus", "background anterior posterior", "32, 48, 32",
            **(_MASK | {"rate": "0.009"}), batch=2, rounds=300, steps=2, augmentation=_FLIP,
        ), 2.0,
    ),
}  # fmt: skip
