"""What the tests of the models floor share: a good specification to change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

GOOD: dict[str, Any] = {
    "task": {"kind": "classification", "classes": ["normal", "pneumonia"]},
    "network": {"name": "resnet-small", "norm": "group", "parameters": {}},
    "input": {
        "channels": 1,
        "size": [32, 32],
        "transforms": [{"name": "scale_intensity", "parameters": {}}],
        "augmentation": [{"name": "random_affine", "parameters": {"shift": "0.05"}}],
    },
    "optimiser": {
        "name": "adamw",
        "learning_rate": 0.001,
        "momentum": 0.0,
        "weight_decay": 0.01,
        "batch_size": 8,
        "schedule": "cosine",
    },
}


@pytest.fixture(scope="session")
def spec_with() -> Callable[..., dict[str, Any]]:
    """A good specification with some entries replaced: spec_with(**{"network.name": "plain-cnn"})."""

    def change(**entries: Any) -> dict[str, Any]:
        spec = copy.deepcopy(GOOD)
        for path, value in entries.items():
            section, _, key = path.partition(".")
            if key:
                spec[section][key] = value
            elif value is None:
                spec.pop(section, None)
            else:
                spec[section] = value
        return spec

    return change


@pytest.fixture(scope="session")
def spec_for(spec_with: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A good specification of a network, with a task that it fits: spec_for("unet", **{"input.size": [16, 16]})."""
    from models.networks import NETWORKS

    def change(name: str, **entries: Any) -> dict[str, Any]:
        kind = "segmentation" if NETWORKS[name].answers == "pixels" else "classification"
        return spec_with(**{"network.name": name, "task.kind": kind, **entries})

    return change
