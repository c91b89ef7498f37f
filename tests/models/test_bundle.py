"""The bundle of a model is one that MONAI's own tools open, offline, and nothing that a study says can run in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from models import bundle, card, networks, weights

CASES = [
    ("classification", "resnet-small", ["normal", "pneumonia"], [32, 32]),
    ("multilabel", "densenet-small", ["effusion"], [32, 32]),
    ("segmentation", "unet", ["background", "tumour"], [32, 16]),
    ("segmentation", "segresnet", ["background", "front", "back"], [16, 16, 16]),
    ("classification", "resnet10", ["normal", "pneumonia"], [32, 32], {"network.weight_standardisation": True}),
    ("segmentation", "dynunet", ["background", "tumour"], [32, 32], {"network.weight_standardisation": True}),
    ("classification", "resnet10", ["normal", "pneumonia"], [32, 32], {"network.norm": "frozen"}),
    ("classification", "resnet-small", ["normal", "pneumonia"], [32, 32], {"transfer": {"train": "lora", "rank": 2}}),
    ("segmentation", "unet", ["background", "tumour"], [32, 32], {"local": {"norms": "local"}}),
]


def facts_of(spec: Any, **changes: Any) -> card.Facts:
    words = {
        "name": "study-1", "title": "A study", "purpose": "To learn.", "spec": spec, "sites": ("north", "south"),
        "trained": {}, "metrics": {"test": {"dice:tumour": 0.8}}, "parameters": 1234, "hashes": {"study": "ab" * 32},
        "versions": {"torch": "2.13.0+cpu", "monai": "1.6.1", "numpy": "2.4.6", "consilium": "0.1.0"},
    }  # fmt: skip
    return card.Facts(**{**words, **changes})


@pytest.fixture
def made(spec_with: Any, tmp_path: Path) -> Any:
    def make(
        kind: str, name: str, classes: list[str], size: list[int], sections: Any = None, **changes: Any
    ) -> tuple[Path, Any]:
        spec = spec_with(
            **{"task.kind": kind, "network.name": name, "task.classes": classes, "input.size": size},
            **{"transfer": {"train": "all", "rank": 4}, **(sections or {})},
        )
        module = networks.build(spec).eval()
        state = tmp_path / "model.safetensors"
        state.write_bytes(weights.state_bytes(module))
        bundle.write(tmp_path / "bundle", spec, state, facts_of(spec, **changes))
        return tmp_path / "bundle", module

    return make


@pytest.mark.parametrize("case", CASES)
def test_monai_finds_in_and_outputs_as_the_metadata_says(made: Any, case: Any) -> None:
    from monai.bundle import verify_net_in_out

    root, _ = made(*case)
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(root / "configs/metadata.json"),
        config_file=str(root / "configs/inference.json"),
        device="cpu",
        bundle_root=str(root),
    )


@pytest.mark.parametrize("case", CASES)
def test_it_runs_and_gives_the_probabilities_of_the_network(made: Any, case: Any, tmp_path: Path) -> None:
    from monai.bundle import ConfigParser

    root, module = made(*case)
    images = tmp_path / "in"
    images.mkdir()
    image = np.random.default_rng(0).random((1, *(side + 8 for side in case[3])), dtype=np.float32)
    np.save(images / "one.npy", image)
    parser = ConfigParser()
    parser.read_config(str(root / "configs/inference.json"))
    parser.read_meta(str(root / "configs/metadata.json"))
    parser.update({"bundle_root": str(root), "dataset_dir": str(images), "output_dir": str(tmp_path / "out")})
    (written,) = parser.get_parsed_content("run")
    found = np.load(written)
    prepared = torch.from_numpy(bundle.preparation(str(root))(image))[None]
    with torch.no_grad():
        scores = module(prepared)
    expected = torch.sigmoid(scores) if case[0] == "multilabel" else torch.softmax(scores, 1)
    np.testing.assert_allclose(found, expected[0].numpy(), rtol=1e-4, atol=1e-6)


def test_the_metadata_has_what_monai_asks_for(made: Any) -> None:
    from monai.bundle.properties import MetaProperties
    from monai.utils import BundleProperty, BundlePropertyConfig

    root, _ = made(*CASES[2])
    found = json.loads((root / "configs/metadata.json").read_text())
    for entry in MetaProperties.values():
        value: Any = found
        for key in entry[BundlePropertyConfig.ID].split("::")[1:]:
            value = value.get(key) if isinstance(value, dict) else None
        assert value is not None or not entry[BundleProperty.REQUIRED], entry
    assert bundle.Metadata.model_validate(found).network_data_format.outputs["pred"].channel_def["1"] == "tumour"
    assert found["eval_metrics"] == {"dice:tumour": 0.8}
    del found["monai_version"]
    with pytest.raises(ValidationError, match="monai_version"):
        bundle.Metadata.model_validate(found)


WORDS = [
    "$__import__('pathlib').Path('/tmp/consilium-was-here').touch()",
    "@run",
    "%metadata.json",
    "a @### b",
    "a::b#c",
]


def test_words_of_a_study_are_never_evaluated(made: Any) -> None:
    """Titles and class names are free text, and MONAI's parser runs text that begins with a dollar sign."""
    from monai.bundle import ConfigParser

    metrics = {"test": {f"dice:{name}": 0.5 for name in WORDS}}
    root, _ = made(
        "segmentation", "unet", ["background", *WORDS], [16, 16], title=WORDS[0], purpose=WORDS[1], metrics=metrics
    )
    parser = ConfigParser()
    parser.read_config(str(root / "configs/inference.json"))
    parser.read_meta(str(root / "configs/metadata.json"))
    parser["bundle_root"] = str(root)
    parsed = parser.get_parsed_content("_meta_")
    assert not Path("/tmp/consilium-was-here").exists()
    assert parsed["task"] == f"“{WORDS[0]}”"
    assert set(parsed["network_data_format"]["outputs"]["pred"]["channel_def"]) == {str(n) for n in range(6)}
    assert parser.get_parsed_content("network_def")(torch.zeros(1, 1, 16, 16)).shape == (1, 6, 16, 16)


def test_the_same_model_gives_the_same_bundle_and_replaces_an_older_one(made: Any) -> None:
    root, _ = made(*CASES[0])
    (root / "left.txt").write_text("of an older version")
    files = {path: path.read_bytes() for path in root.rglob("*.json")}
    spec = json.loads((root / "configs/specification.json").read_text())
    bundle.write(root, spec, root.parent / "model.safetensors", facts_of({**spec, "optimiser": {}}))
    assert not (root / "left.txt").exists()
    assert {path: path.read_bytes() for path in root.rglob("*.json")} == files
    assert (root / bundle.WEIGHTS).read_bytes() == (root.parent / "model.safetensors").read_bytes()
