"""How does a published model become a bundle that MONAI's tools open?

The folder follows MONAI's bundle specification (docs.monai.io, mb_specification): configs/metadata.json says what the
model is and what goes in and out, configs/inference.json how it is run, docs/README.md is the card. The weights are
models/model.safetensors, never a pickled model.pt. Networks are built by this package, since MONAI's own would have
batch norms where the trained ones mostly have none, so `consilium` stands among the packages that a bundle needs.

MONAI evaluates text in these files that begins with "$", "@" or "%". Nothing that a study says is put where it could
be taken for that: what the network needs lies in a file of its own, configs/specification.json, which is only data.
Writing needs neither torch nor MONAI.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from models import card

if TYPE_CHECKING:
    from torch import Tensor, nn

SPECIFICATION, WEIGHTS = Path("configs/specification.json"), Path("models/model.safetensors")
_SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
_RUN = {
    "imports": ["$import torch"],
    "bundle_root": ".",
    "dataset_dir": "$@bundle_root + '/images'",
    "output_dir": "$@bundle_root + '/eval'",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "network_def": {"_target_": "models.bundle.network", "root": "@bundle_root"},
    "network": "$@network_def.to(@device).eval()",
    "preprocessing": {"_target_": "models.bundle.preparation", "root": "@bundle_root"},
    "inferer": {"_target_": "monai.inferers.SimpleInferer"},
    "postprocessing": {"_target_": "models.bundle.probabilities", "root": "@bundle_root"},
    "run": {
        "_target_": "models.bundle.run",
        "module": "@network",
        "prepare": "@preprocessing",
        "finish": "@postprocessing",
        "source": "@dataset_dir",
        "target": "@output_dir",
        "device": "@device",
    },
}


class Data(BaseModel):
    """One tensor that goes in or comes out."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["image", "probabilities", "tuples", "heatmap", "metadata"]
    format: Literal["magnitude", "classes", "labels", "segmentation", "hounsfield", "raw"]
    num_channels: int = Field(ge=1)
    spatial_shape: list[int]
    dtype: Literal["float32"]
    value_range: list[float]
    is_patch_data: bool
    channel_def: dict[str, str]
    modality: str = "n/a"


class DataFormat(BaseModel):
    """What goes in and what comes out."""

    model_config = ConfigDict(extra="forbid")

    inputs: dict[Literal["image"], Data]
    outputs: dict[Literal["pred"], Data]


class Metadata(BaseModel):
    """configs/metadata.json, as far as the specification asks for it; the local stand-in for the schema's address."""

    model_config = ConfigDict(extra="forbid")

    schema_: str = Field(alias="schema", pattern="^https://")
    version: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    changelog: dict[str, str] = Field(min_length=1)
    monai_version: str = Field(pattern=r"^\d+(\.\w+)+")
    pytorch_version: str = Field(pattern=r"^\d+(\.\w+)+")
    numpy_version: str = Field(pattern=r"^\d+(\.\w+)+")
    required_packages_version: dict[str, str]
    task: str = Field(min_length=1)
    description: str = Field(min_length=1)
    authors: str = Field(min_length=1)
    copyright: str
    intended_use: str
    data_source: str
    data_type: str
    eval_metrics: dict[str, float]
    references: list[str]
    network_data_format: DataFormat


def write(folder: Path, spec: Mapping[str, Any], state: Path, facts: card.Facts) -> None:
    """Write the bundle; the same arguments give the same files.

    Args:
        folder: replaced as a whole.
        spec: the specification that the network is built from.
        state: the full state, as `models.weights` saves it; linked where the file system can, else copied.
        facts: as for the card.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name in ("configs", "models", "docs"):
        (part / name).mkdir(parents=True)
    own = {key: spec[key] for key in ("task", "network", "input", "transfer", "local") if key in spec}
    for path, content in (
        (Path("configs/metadata.json"), metadata(spec, facts).model_dump(by_alias=True)),
        (Path("configs/inference.json"), _RUN),
        (SPECIFICATION, own),
    ):
        (part / path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (part / "docs" / "README.md").write_text(card.write(facts), encoding="utf-8")
    try:
        os.link(state, part / WEIGHTS)
    except OSError:
        shutil.copyfile(state, part / WEIGHTS)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def metadata(spec: Mapping[str, Any], facts: card.Facts) -> Metadata:
    """What the bundle says of itself, checked."""
    image, classes = spec["input"], list(spec["task"]["classes"])
    kind, versions = spec["task"].get("kind", "classification"), facts.versions
    masks = kind == "segmentation"
    measured = facts.metrics.get("test", {})
    return Metadata(
        schema=_SCHEMA,
        version="1.0.0",
        changelog={"1.0.0": f"study {facts.hashes.get('study', '')}"},
        monai_version=versions.get("monai", "1.6.0"),
        pytorch_version=versions.get("torch", "2.9.0"),
        numpy_version=versions.get("numpy", "2.0.0"),
        required_packages_version={"consilium": versions.get("consilium", "0.1.0")},
        task=_text(facts.title),
        description=_text(f"{facts.purpose} Network {spec['network']['name']}, {facts.parameters:,} parameters."),
        authors=_text(", ".join(facts.sites)),
        copyright="The hospitals of the study",
        intended_use="Research. Not a medical device, and not approved for decisions about a patient.",
        data_source=f"Images of {len(facts.sites)} hospitals, which never left them",
        data_type="array: float32, channels first, then (depth,) height, width",
        eval_metrics={_text(name).replace("#", "-").replace("::", ":"): value for name, value in measured.items()},
        references=[f"SHA-256 of {_text(name)}: {value}" for name, value in facts.hashes.items()],
        network_data_format=DataFormat(
            inputs={
                "image": Data(
                    type="image",
                    format="magnitude",
                    num_channels=image["channels"],
                    spatial_shape=list(image["size"]),
                    dtype="float32",
                    value_range=[],
                    is_patch_data=False,
                    channel_def={str(index): f"channel {index}" for index in range(image["channels"])},
                )
            },
            outputs={
                "pred": Data(
                    type="image" if masks else "probabilities",
                    format="segmentation" if masks else "classes",
                    num_channels=len(classes),
                    spatial_shape=list(image["size"]) if masks else [],
                    dtype="float32",
                    value_range=[],
                    is_patch_data=False,
                    channel_def={str(index): _text(name) for index, name in enumerate(classes)},
                )
            },
        ),
    )


def network(root: str) -> nn.Module:
    """The bundle's network with its weights."""
    from models import networks, weights

    module = networks.build(_specification(root))
    weights.load_state(module, Path(root) / WEIGHTS)
    return module


def preparation(root: str) -> Any:
    """What an image goes through before the network: float32 [C, *any size] -> float32 [C, *input.size]."""
    from models import transforms

    return transforms.preparation(_specification(root))


def probabilities(root: str) -> Any:
    """Raw scores -> probabilities: a softmax over classes, or a sigmoid for each finding."""
    import torch

    several = _specification(root)["task"].get("kind") == "multilabel"

    def apply(scores: Tensor) -> Tensor:
        return torch.sigmoid(scores) if several else torch.softmax(scores, 1)

    return apply


def run(module: nn.Module, prepare: Any, finish: Any, source: str, target: str, device: Any) -> list[Path]:
    """Probabilities of every image in a folder: <name>.npy [C, *any size] -> <name>.npy [K] or [K, *input.size]."""
    import numpy as np
    import torch

    written = []
    Path(target).mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        for path in sorted(Path(source).glob("*.npy")):
            image = torch.from_numpy(prepare(np.load(path, allow_pickle=False)))[None]
            np.save(Path(target) / path.name, finish(module(image.to(device)))[0].cpu().numpy())
            written.append(Path(target) / path.name)
    return written


def _specification(root: str) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads((Path(root) / SPECIFICATION).read_text(encoding="utf-8"))
    return spec


def _text(words: str) -> str:
    """Text of a study that MONAI's parser takes for text."""
    line = " ".join(words.split()).replace("@", "(at)")
    return f"“{line}”" if line[:1] in {"$", "%"} else line
