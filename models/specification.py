"""Can a model be built and trained as a specification says?

The specification is the part of a study that speaks of learning:

    {"task": {"kind", "classes"}, "network": {"name", "norm", "parameters"},
     "input": {"channels", "size", "transforms", "augmentation"}, "transfer": {"train", "rank"},
     "optimiser": {"name", "learning_rate", "momentum", "weight_decay", "batch_size", "schedule"}}

`validate` collects everything that is wrong instead of stopping at the first, so that a person corrects a study once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from models import networks, tasks, transfer, transforms
from models.fields import Choice, Field, Problem, Real, Whole, unknown

OPTIMISERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine")
LARGEST_SIDE = 4096
LARGEST_IMAGE = 2**25
"""Pixels times channels of one image: 128 MiB as float32."""

_OPTIMISER: dict[str, Field] = {
    "learning_rate": Real(0.001, 0.0, 10.0, above=True),
    "momentum": Real(0.0, 0.0, 0.9999),
    "weight_decay": Real(0.0, 0.0, 10.0),
    "batch_size": Whole(32, 1, 4096),
    "schedule": Choice("constant", SCHEDULES),
}


def validate(spec: Mapping[str, Any]) -> list[Problem]:
    """Everything that is wrong with a specification; an empty list means that it can be built and trained.

    Sections of a study that do not concern learning are passed over.
    """
    problems = []
    for section in ("task", "network", "input"):
        if not isinstance(spec.get(section), Mapping):
            problems.append(Problem(section, "this section is missing", f"Write a [{section}] section."))
    if problems:
        return problems
    image, size = _image(spec["input"])
    return [
        *tasks.problems(spec["task"]),
        *image,
        *networks.problems(spec, size, tasks.target(spec["task"])),
        *transfer.problems(spec),
        *transforms.problems(spec["input"], size),
        *_optimiser(spec.get("optimiser", {})),
    ]


def _image(section: Mapping[str, Any]) -> tuple[list[Problem], tuple[int, ...]]:
    """Problems of channels and size, and the size where it is good, else ()."""
    problems = []
    channels, size = section.get("channels", 1), section.get("size")
    try:
        channels = Whole(1, 1, 16).read(channels)
    except ValueError as error:
        remedy = f"Write {error}; 1 for X-ray, CT and MR, 3 for colour."
        problems.append(Problem("input.channels", f"{channels!r} cannot be used", remedy))
        channels = 1
    sides = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else ()
    if not 2 <= len(sides) <= 3 or any(isinstance(side, bool) or not isinstance(side, int) for side in sides):
        problems.append(Problem("input.size", f"{size!r} cannot be used", "Write [height, width] in pixels: [64, 64]."))
        return problems, ()
    if min(sides) < 8 or max(sides) > LARGEST_SIDE or channels * math.prod(sides) > LARGEST_IMAGE:
        remedy = f"Write sides from 8 to {LARGEST_SIDE} px, in all at most {LARGEST_IMAGE:,} values."
        problems.append(Problem("input.size", f"{list(sides)} is too small or too large", remedy))
        return problems, ()
    return problems, sides


def _optimiser(section: Any) -> list[Problem]:
    if not isinstance(section, Mapping):
        return [Problem("optimiser", "a table is expected", "Write an [optimiser] section or leave it out.")]
    problems = []
    name = section.get("name", "adamw")
    if name not in OPTIMISERS:
        problems.append(unknown("optimiser.name", "optimiser", str(name), OPTIMISERS))
    for key, field in _OPTIMISER.items():
        if key not in section:
            continue
        try:
            value = field.read(section[key])
        except ValueError as error:
            remedy = f"Write {error}; {field.default} is the default."
            problems.append(Problem(f"optimiser.{key}", f"{section[key]!r} cannot be used", remedy))
            continue
        if key == "momentum" and value and name != "sgd":
            remedy = 'Leave it out, or write name = "sgd".'
            problems.append(Problem("optimiser.momentum", f"{name} has no momentum to set", remedy))
    return problems
