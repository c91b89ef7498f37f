"""`models.validate` finds what is wrong, names the entry, and says what to write instead."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import models
from models import fields, networks, transforms

BAD = [
    # entry changed, its new value, where the problem is, words the remedy or the finding must hold
    ("task.kind", "segmentatoin", "task.kind", ["classification"]),
    ("task.classes", ["normal"], "task.classes", ["1 class"]),
    ("task.classes", ["a", "b", "a"], "task.classes", ["a stands there twice"]),
    ("task.classes", "ab", "task.classes", ["list of names"]),
    ("task.classes", [str(number) for number in range(101)], "task.classes", ["at most 100"]),
    ("network.name", "densnet-small", "network.name", ["Did you mean densenet-small?"]),
    ("network.name", "vit", "network.name", ["densenet-small", "densenet121", "plain-cnn", "resnet-small"]),
    ("network.name", "unet", "network.name", ["unet gives a mask", "resnet-small", "task.kind"]),
    ("task.kind", "segmentation", "network.name", ["resnet-small gives one answer an image", "Take unet"]),
    ("network.norm", "batc", "network.norm", ["Did you mean batch?"]),
    ("network.norm", "grup", "network.norm", ["Did you mean group?"]),
    ("network.parameters", {"widht": 2}, "network.parameters.widht", ["Did you mean width?"]),
    ("network.parameters", {"width": "2"}, "network.parameters.width", ["whole number from 1", "1 is the default"]),
    ("network.parameters", {"width": 0}, "network.parameters.width", ["whole number from 1 to 32"]),
    ("network.parameters", [1], "network.parameters", ["table"]),
    ("input.channels", 0, "input.channels", ["whole number from 1 to 16"]),
    ("input.channels", True, "input.channels", ["whole number from 1 to 16"]),
    ("input.size", [4, 4], "input.size", ["from 8 to 4096"]),
    ("input.size", [64], "input.size", ["[height, width]"]),
    ("input.size", "64", "input.size", ["[height, width]"]),
    ("input.size", [4096, 4096, 4096], "input.size", ["too large"]),
    ("input.transforms", [{"name": "scale_intensty"}], "input.transforms[0]", ["Did you mean scale_intensity?"]),
    ("input.transforms", [{"name": "random_flip"}], "input.transforms[0]", ["input.augmentation"]),
    ("input.transforms", [{}], "input.transforms[0]", ["needs a name"]),
    ("input.transforms", {"name": "resize"}, "input.transforms", ["[[input.transforms]]"]),
    ("input.transforms", [{"name": "normalise", "parameters": {"mean": "0.5"}}],
     "input.transforms[0].parameters.std", ["missing", "a number above 0"]),
    ("input.transforms", [{"name": "normalise", "parameters": {"mean": "0.5", "std": "0"}}],
     "input.transforms[0].parameters.std", ["a number above 0"]),
    ("input.transforms", [{"name": "window", "parameters": {"low": "40", "high": "40"}}],
     "input.transforms[0].parameters.low", ["not below", "Write a low below high"]),
    ("input.transforms", [{"name": "resize", "parameters": {"mode": "cubic"}}],
     "input.transforms[0].parameters.mode", ["area, bilinear, nearest"]),
    ("input.transforms", [{"name": "resize", "mode": "area"}], "input.transforms[0].mode", ["parameters = {"]),
    ("input.transforms", [{"name": "equalise", "parameters": {"bins": 3}}],
     "input.transforms[0].parameters.bins", ["takes no parameters"]),
    ("input.augmentation", [{"name": "resize"}], "input.augmentation[0]", ["augments nothing", "input.transforms"]),
    ("input.augmentation", [{"name": "random_flip", "parameters": {"probability": "1.5"}}],
     "input.augmentation[0].parameters.probability", ["up to 1", "0.5 is the default"]),
    ("input.augmentation", [{"name": "random_flip", "parameters": {"axis": "depth"}}],
     "input.augmentation[0].parameters.axis", ["has no depth", "horizontal"]),
    ("input.augmentation", [{"name": "random_rotate", "parameters": {"degres": "5"}}],
     "input.augmentation[0].parameters.degres", ["Did you mean degrees?"]),
    ("optimiser.name", "adam-w", "optimiser.name", ["adamw"]),
    ("optimiser.learning_rate", 0, "optimiser.learning_rate", ["above 0", "0.001 is the default"]),
    ("optimiser.learning_rate", -0.1, "optimiser.learning_rate", ["above 0"]),
    ("optimiser.learning_rate", float("nan"), "optimiser.learning_rate", ["a number"]),
    ("optimiser.momentum", 0.9, "optimiser.momentum", ["adamw has no momentum", "sgd"]),
    ("optimiser.weight_decay", -1.0, "optimiser.weight_decay", ["a number from 0"]),
    ("optimiser.batch_size", 0, "optimiser.batch_size", ["whole number from 1"]),
    ("optimiser.batch_size", 2.5, "optimiser.batch_size", ["whole number from 1"]),
    ("optimiser.schedule", "step", "optimiser.schedule", ["constant, cosine"]),
    ("optimiser", "adamw", "optimiser", ["[optimiser] section"]),
    ("task", None, "task", ["[task] section"]),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "value", "where", "words"), BAD)
def test_each_problem_names_entry_and_remedy(
    spec_with: Any, entry: str, value: Any, where: str, words: list[str]
) -> None:
    problems = models.validate(spec_with(**{entry: value}))
    assert [problem.where for problem in problems] == [where]
    for word in words:
        assert word in str(problems[0])
    assert problems[0].remedy.endswith((".", "?"))


def test_a_good_specification_has_no_problem(spec_with: Any) -> None:
    assert models.validate(spec_with()) == []
    assert models.validate(spec_with(optimiser=None)) == []


def test_all_problems_come_at_once(spec_with: Any) -> None:
    spec = spec_with(**{"task.classes": ["a"], "network.name": "x", "input.size": [1], "optimiser.learning_rate": 0})
    assert {problem.where.split(".")[0] for problem in models.validate(spec)} == {
        "task",
        "network",
        "input",
        "optimiser",
    }


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_an_image_too_small_for_the_network_names_the_size_needed(spec_for: Any, name: str) -> None:
    least, divisor = networks.NETWORKS[name].minimum, networks.NETWORKS[name].divisor
    assert models.validate(spec_for(name, **{"input.size": [least, least + divisor]})) == []
    problems = models.validate(spec_for(name, **{"input.size": [least - 1, 64]}))
    assert [problem.where for problem in problems] == ["input.size"]
    assert str(least) in problems[0].remedy


def test_a_smaller_network_is_offered_for_a_small_image(spec_with: Any) -> None:
    (problem,) = models.validate(spec_with(**{"network.name": "densenet121", "input.size": [28, 28]}))
    assert "resnet-small" in problem.remedy


def test_a_network_that_halves_images_names_the_next_size_that_fits(spec_for: Any) -> None:
    (problem,) = models.validate(spec_for("unet", **{"input.size": [100, 36]}))
    assert (problem.where, problem.remedy) == ("input.size", "Write [96, 32].")
    assert models.validate(spec_for("unet", **{"input.size": [96, 32]})) == []
    assert models.validate(spec_for("unet", **{"input.size": [96, 32, 16]})) == []


def test_a_network_that_takes_no_colour_names_those_that_do(spec_for: Any) -> None:
    (problem,) = models.validate(spec_for("vnet", **{"input.channels": 3}))
    assert problem.where == "input.channels"
    assert "unet" in problem.remedy


@pytest.mark.parametrize(
    ("section", "where", "words"),
    [
        ({"train": "haed"}, "transfer.train", "one of all, head"),
        ({"train": "lora", "rank": 0}, "transfer.rank", "1 to 64"),
        ({"freeze": True}, "transfer.freeze", "Known here: train, rank"),
        ([], "transfer", "table"),
    ],
)
def test_transfer_is_checked(spec_with: Any, section: Any, where: str, words: str) -> None:
    (problem,) = models.validate(spec_with(transfer=section))
    assert problem.where == where
    assert words in str(problem)


def test_adapters_need_norms(spec_with: Any) -> None:
    (problem,) = models.validate(spec_with(transfer={"train": "adapters"}, **{"network.norm": "none"}))
    assert problem.where == "transfer.train"
    assert 'Write train = "head"' in problem.remedy


def test_an_instance_norm_needs_more_than_one_pixel_to_look_at(spec_with: Any) -> None:
    changes = {"network.name": "densenet121", "network.norm": "instance"}
    (problem,) = models.validate(spec_with(**changes, **{"input.size": [32, 32]}))
    assert 'norm = "instance"' in problem.what
    assert models.validate(spec_with(**changes, **{"input.size": [64, 64]})) == []


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from(
        ["transfer",
         "task", "network", "input", "optimiser", "task.classes", "task.kind", "network.name", "network.norm",
         "network.parameters", "input.size", "input.channels", "input.transforms", "input.augmentation",
         "optimiser.name", "optimiser.learning_rate", "optimiser.batch_size"]
    ),
)  # fmt: skip
def test_nothing_that_toml_can_say_breaks_it(spec_with: Any, value: Any, entry: str) -> None:
    for problem in models.validate(spec_with(**{entry: value})):
        assert problem.where
        assert problem.remedy


@given(st.decimals(min_value=-5, max_value=5, allow_nan=False, places=6))
def test_a_decimal_string_means_its_number(number: Any) -> None:
    field = fields.Real(None, -5, 5)
    assert field.read(str(number)) == field.read(float(number)) == float(number)


@pytest.mark.parametrize("name", transforms.TRANSFORMS)
def test_defaults_of_the_table_are_allowed_by_it(name: str) -> None:
    for field in transforms.TRANSFORMS[name].parameters.values():
        assert field.default is None or field.read(field.default) == field.default


def test_validating_loads_neither_torch_nor_monai_nor_matplotlib(spec_with: Any) -> None:
    program = (
        "import sys, models, models.tasks, models.statistics, models.weights, models.card, models.additive\n"
        f"assert models.validate({spec_with()!r}) == []\n"
        f"task = models.tasks.get({spec_with()!r})\n"
        "import numpy; task.metrics(numpy.zeros(task.size)); task.curves(numpy.zeros(task.size))\n"
        "print([name for name in ('torch', 'monai', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
