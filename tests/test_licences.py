"""No dependency's licence forbids shipping: the whole runtime tree, as installed, walked from pyproject.toml."""

from __future__ import annotations

import importlib.metadata as metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

# SPDX identifiers under which a library may be shipped in, or beside, a closed or an Apache-2.0 product.
PERMISSIVE = {
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MIT-CMU",
    "MPL-2.0",  # file by file: our own files are untouched by it
    "PSF-2.0",
    "Unlicense",
    "Zlib",
}
# Libraries that are linked dynamically and replaceable by whoever installs them; said openly in the README.
LESSER: dict[str, str] = {}
CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "Public Domain": "Unlicense",
    "The Unlicense (Unlicense)": "Unlicense",
}
# Written in the free-text field, in words of their own.
FREE_TEXT = {
    "MIT": "MIT",
    "BSD-3-Clause": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache-2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
}
# What torch's CUDA build asks for on machines with a GPU: NVIDIA's own terms let anyone redistribute these run-time
# libraries unchanged, and we do not ship them: pip fetches them beside torch.
VENDOR = re.compile(r"nvidia-[a-z0-9-]+|cuda-(bindings|pathfinder|toolkit)")
# Packages whose metadata name no licence that a program can read. Each was read by a person.
READ_BY_HAND: dict[str, tuple[str, str]] = {}
FORBIDDEN = re.compile(
    r"(?<![a-z])(A?GPL|GNU (Affero )?General Public|SSPL|Server Side Public|Commons Clause|CC-BY-NC|non-?commercial"
    r"|research (use )?only|Elastic-2|BUSL|Business Source)",
    re.IGNORECASE,
)


def tree() -> dict[str, metadata.Distribution]:
    """Every distribution the project needs at run time here, by canonical name."""
    values = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pending = [(Requirement(line), "") for line in values["project"]["dependencies"]]
    found: dict[str, metadata.Distribution] = {}
    visited: set[tuple[str, str]] = set()
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        distribution = found[name] = metadata.distribution(name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in visited:
                visited.add((name, wanted))
                pending += [(Requirement(line), wanted) for line in distribution.requires or []]
    return found


def claims(distribution: metadata.Distribution) -> tuple[list[str], str]:
    """What a package says of its licence: SPDX identifiers of which every one must be shippable, and the words."""
    data = distribution.metadata
    expression = data.get("License-Expression") or ""
    if expression:
        return spdx(expression), expression
    classified = [
        line.split("::")[-1].strip() for line in data.get_all("Classifier") or [] if line.startswith("License ::")
    ]
    text = (data.get("License") or "").strip()
    words = "; ".join([*classified, text.splitlines()[0] if text else ""])
    known = [CLASSIFIERS[line] for line in classified if line in CLASSIFIERS]
    unknown = [line for line in classified if line not in CLASSIFIERS and line != "OSI Approved"]
    if known or unknown:
        return known + unknown, words
    return ([FREE_TEXT[text]] if text in FREE_TEXT else []), words


def spdx(expression: str) -> list[str]:
    """The identifiers that bind: all joined by AND; of a choice (OR) the first shippable one."""
    binding = []
    for part in re.split(r"\s+AND\s+", expression.replace("(", " ").replace(")", " ")):
        choices = [choice.strip().split(" WITH ")[0] for choice in part.split(" OR ")]
        binding.append(next((choice for choice in choices if choice in PERMISSIVE), choices[0]))
    return binding


def verdict(name: str, distribution: metadata.Distribution) -> str:
    """Empty when the package may be shipped, else why not."""
    licences, words = claims(distribution)
    if not licences and name in READ_BY_HAND:
        return ""
    if name in LESSER or VENDOR.fullmatch(name):
        return ""
    if not licences:
        return f"{name}: no licence named ({words!r}); read its LICENSE file and enter it in READ_BY_HAND"
    bad = [licence for licence in licences if licence not in PERMISSIVE]
    expression = distribution.metadata.get("License-Expression")  # exact, and may offer a choice
    if bad or (not expression and FORBIDDEN.search(words)):
        return f"{name}: {words}"
    return ""


def test_every_runtime_dependency_may_be_shipped() -> None:
    found = tree()
    assert {"torch", "flwr", "monai", "cryptography", "pydicom"} <= set(found)
    assert [reason for name in sorted(found) if (reason := verdict(name, found[name]))] == []


def test_the_list_read_by_hand_holds_no_more_than_it_must() -> None:
    found = tree()
    assert [name for name in READ_BY_HAND if name in found and claims(found[name])[0]] == []


def test_no_gpl_codec_is_installed_beside_us() -> None:
    """pylibjpeg-libjpeg is GPL-3; pydicom would use it by itself if it were there."""
    assert "pylibjpeg-libjpeg" not in {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions()}


@pytest.mark.parametrize(
    ("fields", "shippable"),
    [
        ({"License-Expression": "MIT"}, True),
        ({"License-Expression": "GPL-3.0-or-later"}, False),
        ({"License-Expression": "MIT OR GPL-3.0-only"}, True),
        ({"License-Expression": "MIT AND GPL-3.0-only"}, False),
        ({"License-Expression": "Apache-2.0 WITH LLVM-exception"}, True),
        ({"Classifier": "License :: OSI Approved :: GNU General Public License v3 (GPLv3)"}, False),
        ({"Classifier": "License :: OSI Approved :: MIT License"}, True),
        ({"License": "SSPL-1.0"}, False),
        ({"License": "Free for non-commercial use"}, False),
        ({}, False),
    ],
)
def test_the_judge_of_licences(fields: dict[str, str], shippable: bool, tmp_path: Path) -> None:
    folder = tmp_path / "thing-1.0.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.4", "Name: thing", "Version: 1.0"]
    lines += [f"{key}: {value}" for key, value in fields.items()]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    assert (verdict("thing", metadata.PathDistribution(folder)) == "") is shippable
    assert verdict("nvidia-cudnn-cu13", metadata.PathDistribution(folder)) == "", "torch's CUDA build, for a GPU"
