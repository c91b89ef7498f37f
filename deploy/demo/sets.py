"""Which images does the demo use, and which study suits them? Drawn chests by default, a real set by choice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client import dealing
from client.imaging import Source
from deploy.demo import phantoms
from privacy.errors import ConsiliumError

NAMES = ("northgate", "riverside", "st-elmo")
MIX = 4
"""Of each finding one hospital sees four times as many patients as each of the others."""
_TOML = """
schema = 1
sites = [{sites}]

[study]
name = "{name}"
title = "{title}"
purpose = "{purpose}"
contact = "the demo"

[task]
classes = [{classes}]

[network]
name = "resnet-small"

[input]
channels = {channels}
size = [{size}, {size}]
transforms = [{{ name = "{contrast}" }}, {{ name = "normalise", parameters = {{ mean = "0.5", std = "0.25" }} }}]
augmentation = [{{ name = "{augmentation}" }}]

[optimiser]
name = "adamw"
learning_rate = {rate}
weight_decay = 0.01
batch_size = {batch}
schedule = "cosine"

[rounds]
count = {rounds}
local_steps = {steps}
deadline_seconds = 300
seed = 1

[aggregation]
minimum_sites = 3

[secagg]
mode = "on"

[publish]
choose = "best-validation"
"""


@dataclass(frozen=True)
class Deal:
    """Three hospitals with their images, and the study that suits them.

    Attributes:
        title: of the study.
        origin: one sentence on where the images come from.
        sources: declaration by hospital; paths are absolute.
        classes: label values, in order.
        channels, size: of the network's input; pixels.
        rounds, steps: of training.
        rate, batch: learning rate and images per step.
        contrast, augmentation: the transforms.
        note: who counts as a patient, where the set leaves it open.
    """

    title: str
    origin: str
    sources: dict[str, Source]
    classes: tuple[str, ...]
    channels: int
    size: int
    rounds: int
    steps: int
    rate: str
    batch: int
    contrast: str
    augmentation: str
    note: str = ""

    def toml(self, name: str) -> str:
        """The draft of the study."""
        return _TOML.format(
            name=name,
            title=self.title,
            purpose="Show how three hospitals train one classifier.",
            sites=_quoted(tuple(self.sources)),
            classes=_quoted(self.classes),
            channels=self.channels,
            size=self.size,
            contrast=self.contrast,
            augmentation=self.augmentation,
            batch=self.batch,
            rate=self.rate,
            rounds=self.rounds,
            steps=self.steps,
        )

    def options(self, source: Source) -> list[str]:
        """What an operator types after `consilium-site data connect NAME`."""
        options = [str(source.path), "--kind", source.kind]
        if source.labels is not None:
            options += ["--labels", str(source.labels), "--image-column", source.columns.image]
            options += ["--label-column", source.columns.label]
        if source.columns.patient:
            options += ["--patient-column", source.columns.patient]
        if source.one_image_per_patient:
            options.append("--one-image-per-patient")
        return options


def deal(data: Path | None, folder: Path, rounds: int = 0) -> Deal:
    """Prepare the images of three hospitals below `folder`; drawn ones are kept from one run to the next.

    Args:
        data: a real set, or None for drawn chests.
        rounds: of training; 0 takes what suits the images.

    Raises:
        ConsiliumError: `data` is no set that can be dealt out.
    """
    if data is None:
        return _drawn(folder / "drawn", rounds)
    dealt = dealing.deal(data, folder / "real", NAMES, mix=MIX)
    if not dealt.classes:
        raise ConsiliumError(
            "The set names no classes", str(data), "The demo learns one class of each image: add labels."
        )
    first = dealt.shares[0].source.path
    with np.load(first, allow_pickle=False) as archive:
        shape = archive["images" if "images" in archive else "train_images"].shape
    return Deal(
        title=f"{dealt.name} at three hospitals",
        origin=f"The public set {dealt.name}, dealt out by patient to three made-up hospitals that see different "
        "mixtures of findings.",
        sources={share.name: share.source for share in dealt.shares},
        classes=dealt.classes,
        channels=int(shape[3]) if len(shape) == 4 else 1,
        size=int(shape[1]),
        rounds=rounds or 10,
        steps=40,
        rate="0.001",
        batch=32,
        contrast="scale_intensity",
        augmentation="random_affine",
        note=dealt.note,
    )


def _drawn(folder: Path, rounds: int) -> Deal:
    ready = folder / ".ready"
    if not ready.exists():
        phantoms.generate(folder)
        ready.touch()
    sources = {name: Source.from_file(folder / name / "source.toml") for name in phantoms.SCANNERS}
    return Deal(
        title="Chest X-rays with an opacity",
        origin="The images are drawn, not taken: no patient stands behind any of them.",
        sources=sources,
        classes=phantoms.CLASSES,
        channels=1,
        size=64,
        rounds=rounds or 10,
        steps=40,
        rate="0.002",
        batch=16,
        contrast="scale_percentiles",
        augmentation="random_flip",
    )


def _quoted(words: tuple[str, ...]) -> str:
    return ", ".join(f'"{word}"' for word in words)
