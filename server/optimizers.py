"""How does the mean of the sites' updates become the next model? One rule per strategy, applied in place.

Each rule is elementwise, so it may be given a model block by block and never needs a second copy of it. Arithmetic
is float64; what is kept between rounds is float32.

    fedavg    x ← x + η Δ                                        (McMahan 2017, doi:10.48550/arXiv.1602.05629)
    fedprox   the same at the coordinator; its proximal term acts at the sites   (Li 2020, arXiv:1812.06127)
    fedavgm   m ← β₁ m + Δ;  x ← x + η m                         (Hsu 2019, arXiv:1909.06335)
    fedadam   m ← β₁ m + (1 − β₁) Δ;  v ← β₂ v + (1 − β₂) Δ²;  x ← x + η m / (√v + τ)
    fedyogi   as fedadam, but v ← v − (1 − β₂) Δ² sign(v − Δ²)
              with m = 0 and v = τ² before the first round, no bias correction
                                                               (Reddi 2021, Algorithm 2, arXiv:2003.00295)
    scaffold  x ← x + η Δ;  c ← c + (answered / all sites) Δc    (Karimireddy 2020, Algorithm 1, arXiv:1910.06378)
              where c, zero at first, travels with the model and Δc with the update

Whatever the rule, a study may ask for the moving average of its models, which is then what it publishes:

    a ← β a + (1 − β) x, with min(β, (1 + t) / (10 + t)) for β after t rounds, and a the first x before them
                                                    (Polyak & Juditsky 1992; so warmed up: De 2022, arXiv:2204.13650)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from privacy.sections import Aggregation

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


class Optimizer(Protocol):
    """A rule with `memory` float32 arrays of the model's size, kept between rounds."""

    @property
    def memory(self) -> int:
        """How many arrays it remembers."""
        ...

    @property
    def sent(self) -> int:
        """How many of the remembered arrays travel behind the model; a site answers with as many more updates."""
        ...

    def fresh(self, weights: Floats) -> list[Floats]:
        """Those arrays before the first round, for the model `weights` float32 [n]."""
        ...

    def step(self, weights: Floats, update: Doubles, memory: Sequence[Floats], answered: int = 1) -> None:
        """Change `weights` float32 [n] and each of `memory` float32 [n] in place by the mean update.

        Args:
            update: float64 [1 + sent, n]; may be overwritten.
            answered: how many sites the mean is of.
        """
        ...


@dataclass(frozen=True)
class Averaging:
    """FedAvg, and FedProx's part at the coordinator."""

    learning_rate: float = 1.0
    memory: int = 0
    sent: int = 0

    def fresh(self, weights: Floats) -> list[Floats]:
        """No arrays."""
        return []

    def step(self, weights: Floats, update: Doubles, memory: Sequence[Floats], answered: int = 1) -> None:
        """x ← x + η Δ."""
        _move(weights, update[0], self.learning_rate)


@dataclass(frozen=True)
class Momentum:
    """FedAvgM."""

    learning_rate: float
    beta: float
    memory: int = 1
    sent: int = 0

    def fresh(self, weights: Floats) -> list[Floats]:
        """m = 0."""
        return [np.zeros_like(weights)]

    def step(self, weights: Floats, update: Doubles, memory: Sequence[Floats], answered: int = 1) -> None:
        """m ← β₁ m + Δ;  x ← x + η m."""
        velocity = self.beta * memory[0].astype(np.float64) + update[0]
        memory[0][...] = velocity
        _move(weights, velocity, self.learning_rate)


@dataclass(frozen=True)
class Adaptive:
    """FedAdam, and FedYogi with `yogi`. `tau` is the paper's τ, the degree of adaptivity."""

    learning_rate: float
    beta_1: float
    beta_2: float
    tau: float
    yogi: bool = False
    memory: int = 2
    sent: int = 0

    def fresh(self, weights: Floats) -> list[Floats]:
        """m = 0, v = τ²."""
        return [np.zeros_like(weights), np.full_like(weights, self.tau**2)]

    def step(self, weights: Floats, update: Doubles, memory: Sequence[Floats], answered: int = 1) -> None:
        """One step of Algorithm 2."""
        delta = update[0]
        mean = self.beta_1 * memory[0].astype(np.float64) + (1 - self.beta_1) * delta
        square, fresh = memory[1].astype(np.float64), delta * delta
        if self.yogi:
            square -= (1 - self.beta_2) * fresh * np.sign(square - fresh)
        else:
            square *= self.beta_2
            square += (1 - self.beta_2) * fresh
        memory[0][...], memory[1][...] = mean, square
        np.sqrt(square, out=square)
        square += self.tau
        mean /= square
        _move(weights, mean, self.learning_rate)


@dataclass(frozen=True)
class Scaffold:
    """SCAFFOLD's part at the coordinator, for a consortium of `sites`."""

    learning_rate: float
    sites: int
    memory: int = 1
    sent: int = 1

    def fresh(self, weights: Floats) -> list[Floats]:
        """c = 0."""
        return [np.zeros_like(weights)]

    def step(self, weights: Floats, update: Doubles, memory: Sequence[Floats], answered: int = 1) -> None:
        """x ← x + η Δ;  c ← c + (answered / sites) Δc."""
        _move(weights, update[0], self.learning_rate)
        _move(memory[0], update[1], answered / self.sites)


@dataclass(frozen=True)
class Averaged:
    """Any rule, and the moving average of its models behind what that remembers. Training goes on from the model.

    `done` is t: the rounds before this one, void ones too; 0 where the average begins.
    """

    rule: Optimizer
    decay: float
    done: int

    @property
    def memory(self) -> int:
        """One more than the rule's."""
        return self.rule.memory + 1

    @property
    def sent(self) -> int:
        """As the rule's: the average stays at the coordinator."""
        return self.rule.sent

    def fresh(self, weights: Floats) -> list[Floats]:
        """The rule's, and a = x."""
        return [*self.rule.fresh(weights), weights.copy()]

    def step(self, weights: Floats, update: Doubles, memory: Sequence[Floats], answered: int = 1) -> None:
        """The rule's step, then a ← β a + (1 − β) x."""
        self.rule.step(weights, update, memory[:-1], answered)
        decay = min(self.decay, (1 + self.done) / (10 + self.done))
        memory[-1][...] = decay * memory[-1].astype(np.float64) + (1 - decay) * weights.astype(np.float64)


def of(aggregation: Aggregation, sites: int = 1, done: int = 0) -> Optimizer:
    """The rule a study names, for that many sites in all and after so many rounds."""
    rule, decay = _rule(aggregation, sites), float(aggregation.ema)
    return Averaged(rule, decay, done) if decay else rule


def outcome(aggregation: Aggregation, weights: str, memory: tuple[str, ...]) -> str:
    """The blob of what a study has come to: its model, or the average of its models where it asks for that.

    Args:
        weights, memory: of a checkpoint; no memory means that no round has counted yet.
    """
    return memory[-1] if float(aggregation.ema) and memory else weights


def _rule(aggregation: Aggregation, sites: int) -> Optimizer:
    rate, strategy = float(aggregation.server_learning_rate), aggregation.strategy
    beta_1, beta_2, tau = (float(value) for value in (aggregation.beta_1, aggregation.beta_2, aggregation.tau))
    if strategy in {"fedadam", "fedyogi"}:
        return Adaptive(rate, beta_1, beta_2, tau, yogi=strategy == "fedyogi")
    if strategy == "fedavgm":
        return Momentum(rate, beta_1)
    return Scaffold(rate, sites) if strategy == "scaffold" else Averaging(rate)


def _move(weights: Floats, by: Doubles, rate: float) -> None:
    """weights + rate × by, in float64, into float32; `by` is overwritten."""
    by *= rate
    by += weights
    weights[...] = by
