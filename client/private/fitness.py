"""Can a network be trained with per-patient gradients? What speaks against it, and what was changed so that it can.

What is asked: no layer mixes the images of a batch or writes over what a hook has seen, every trained parameter belongs
to exactly one layer, and that layer is one for which `client.private.layers` knows how its gradient is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from client.private import layers
from models import weights
from models.frozen import FrozenNorm
from privacy.errors import ConsiliumError


@dataclass(frozen=True)
class Finding:
    """What a person has to know of one module.

    Attributes:
        module: its name in the network.
        what: what it is or does.
        remedy: what to do; "" where there is nothing to do.
    """

    module: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"module {self.module!r} {self.what}" + (f": {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Fitness:
    """What `check` found.

    Attributes:
        unsupported: why the network cannot be used; () when it can.
        changed: modules that are ours in place of the library's, and what they do otherwise.
    """

    unsupported: tuple[Finding, ...]
    changed: tuple[Finding, ...]

    def changes(self) -> list[str]:
        """What was changed, for a person: a sentence for each kind of change."""
        kinds: dict[str, list[str]] = {}
        for found in self.changed:
            kinds.setdefault(found.what, []).append(found.module)
        return [
            f"The network is not quite the library's: module {names[0]!r} {what}"
            + (f", and so are {len(names) - 1} more." if names[1:] else ".")
            for what, names in kinds.items()
        ]


def check(network: nn.Module) -> Fitness:
    """Look at every module of a network; nothing is changed."""
    unsupported: list[Finding] = []
    changed: list[Finding] = []
    modules: dict[int, str] = {}
    owners: dict[int, str] = {}
    for name, part in network.named_modules(remove_duplicate=False):
        if id(part) in modules:
            what = f"is the same as {modules[id(part)]!r}"
            unsupported.append(Finding(name, what, "build each layer once and reach it by one name"))
            continue
        modules[id(part)] = name
        unsupported += [Finding(name, *said) for said in _objections(part)]
        if type(part).__module__.startswith("models."):
            base = next(kind for kind in type(part).__mro__ if not kind.__module__.startswith("models."))
            instead = "a batch norm of the initial weights" if isinstance(part, FrozenNorm) else base.__name__
            changed.append(Finding(name, f"is our {type(part).__name__} in place of {instead}"))
        for own, value in part.named_parameters(recurse=False):
            if id(value) in owners and value.requires_grad:
                what = f"shares its parameter {own!r} with {owners[id(value)]!r}"
                unsupported.append(Finding(name, what, "give each layer its own"))
            owners[id(value)] = name
    kept = weights.local_names(network)
    if kept:
        what = f"keeps {len(kept)} parameters at the site, such as {min(kept)!r}, which no noise protects"
        unsupported.append(Finding("", what, 'write [local] norms = "shared"'))
    return Fitness(tuple(unsupported), tuple(changed))


def demand(network: nn.Module) -> None:
    """Refuse a network that `check` finds unfit.

    Raises:
        ConsiliumError: names every module and remedy.
    """
    unsupported = check(network).unsupported
    if unsupported:
        named = "; ".join(f"module {found.module!r} {found.what}" for found in unsupported)
        remedies = "; ".join(dict.fromkeys(found.remedy for found in unsupported))
        raise ConsiliumError(
            "Gradients of single patients cannot be taken of this network",
            named,
            f"{remedies[0].upper()}{remedies[1:]}.",
        )


def approvable(spec: Mapping[str, Any]) -> list[str]:
    """What a person who approves a study with noise should know of its network; it is not allocated.

    Args:
        spec: of the study.

    Raises:
        ConsiliumError: as `demand`.
    """
    from models import networks

    with torch.device("meta"):
        network = networks.build(spec)
    demand(network)
    return check(network).changes()


def _objections(part: nn.Module) -> list[tuple[str, str]]:
    """What speaks against one module, and the remedy."""
    kind, found = type(part).__name__, []
    if "BatchNorm" in kind or (isinstance(part, _NormBase) and part.track_running_stats):
        found.append((f"is a {kind}, whose statistics mix patients", "use a group norm"))
    elif layers.trained(part):
        if next(part.children(), None) is not None:
            what = f"is a {kind} with parameters of its own ({', '.join(layers.trained(part))}) beside other layers"
            found.append((what, "move them into a layer that torch has, or freeze them"))
        elif not layers.known(part):
            what = f"is a {kind}, whose gradient we do not know how to take patient by patient"
            found.append((what, "use a layer that torch has, add it to client/private/layers.py, or freeze it"))
    if getattr(part, "inplace", False) or kind == "MemoryEfficientSwish":
        found.append((f"({kind}) writes in place", "build it with inplace=False"))
    return found
