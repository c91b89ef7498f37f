"""The functional optimisers are torch's own, to the bit, without torch's compiler."""

import subprocess
import sys

import pytest
import torch

from client.optimiser import Optimiser

CLASSES = {
    "sgd": lambda p, rate: torch.optim.SGD(p, rate, momentum=0.9, weight_decay=0.01),
    "adam": lambda p, rate: torch.optim.Adam(p, rate, weight_decay=0.01),
    "adamw": lambda p, rate: torch.optim.AdamW(p, rate, weight_decay=0.01),
}


def network() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 2))


@pytest.mark.parametrize("name", CLASSES)
def test_every_step_equals_torchs_to_the_bit(name):
    ours, theirs = network(), network()
    optimiser = Optimiser(name, ours.parameters(), momentum=0.9, weight_decay=0.01)
    reference = CLASSES[name](theirs.parameters(), 0.1)
    generator = torch.Generator().manual_seed(5)
    for number in range(6):
        images = torch.randn(4, 1, 8, 8, generator=generator)
        rate = 0.1 / (number + 1)
        for group in reference.param_groups:
            group["lr"] = rate
        optimiser.clear()
        reference.zero_grad()
        for module in (ours, theirs):
            module(images).square().mean().backward()
        optimiser.step(rate)
        reference.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", CLASSES)
def test_a_parameter_without_a_gradient_stays_and_joins_later(name):
    module = network()
    first, last = module[0].weight, module[2].weight
    optimiser = Optimiser(name, module.parameters(), momentum=0.9, weight_decay=0.0)
    before = first.detach().clone()
    last.square().sum().backward()
    optimiser.step(0.1)
    assert torch.equal(first, before)
    optimiser.clear()
    first.square().sum().backward()
    optimiser.step(0.1)
    assert not torch.equal(first, before)


def test_torchs_compiler_is_never_loaded():
    """It would cost every agent 70 MB and seconds at start."""
    script = """
import sys, torch
from client.optimiser import Optimiser
layer = torch.nn.Linear(2, 2)
for name in ("sgd", "adam", "adamw"):
    optimiser = Optimiser(name, layer.parameters(), 0.9, 0.01)
    layer(torch.ones(1, 2)).sum().backward()
    optimiser.step(0.1)
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
