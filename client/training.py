"""How does a hospital learn between two messages? The local step, and the measurement beside it.

Sampling, shuffling, augmentation and dropout draw from the hospital's operating system, never from anything that the
coordinator sent (RULES N1); only a study without noise may name a seed instead, and then trains alike in every run.
The optimiser starts fresh in every round: what it gathered belongs to a model that the server has since replaced,
would make a site's update depend on rounds it missed, and would be state computed from patients that outlives a
release (RULES N3).
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from client.feed import Augment, Feed, compute
from client.imaging import Cohort, Membership
from client.optimiser import Optimiser
from models import schedule, transfer
from models.tasks import Task
from models.weights import Layout
from privacy.errors import Refusal, RefusalCode
from privacy.study import Study

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Check = Callable[[], None]
"""Called between batches; raises to stop the work."""

Vector = npt.NDArray[np.float32]

EVALUATION_BATCH = 64
EVALUATION_VALUES = 2**21
"""Images and their values in one step of an evaluation, whichever is fewer: a volume is measured alone."""


@dataclass(frozen=True)
class Plan:
    """The public constants of local training, all of them from the signed study."""

    optimiser: str
    learning_rate: float
    momentum: float
    weight_decay: float
    batch_size: int
    schedule: str
    local_steps: int
    rounds: int
    proximal_mu: float
    seed: int = 0

    @classmethod
    def of(cls, study: Study) -> Plan:
        """The plan of a study."""
        return cls(
            optimiser=study.optimiser.name,
            learning_rate=float(study.optimiser.learning_rate),
            momentum=float(study.optimiser.momentum),
            weight_decay=float(study.optimiser.weight_decay),
            batch_size=study.optimiser.batch_size,
            schedule=study.optimiser.schedule,
            local_steps=study.rounds.local_steps,
            rounds=study.rounds.count,
            proximal_mu=float(study.aggregation.proximal_mu) if study.aggregation.strategy == "fedprox" else 0.0,
            seed=study.rounds.seed,
        )

    def chance(self, site: str, what: str, round_number: int) -> np.random.Generator:
        """What one local training draws from: (seed, site, what, round) where there is a seed, else the system."""
        if not self.seed:
            return np.random.Generator(np.random.PCG64(secrets.randbits(128)))
        names = "\0".join(("consilium/v1/chance", str(self.seed), site, what, str(round_number)))
        return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(names.encode()).digest()[:16])))

    def travelled(self, round_number: int) -> float:
        """Sum of the learning rates of a round's steps."""
        return sum(self.rate(round_number, step) for step in range(self.local_steps))

    def rate(self, round_number: int, step: int) -> float:
        """The learning rate of a step (from 0) of a round (from 1); a schedule spans all steps of all rounds."""
        position = ((round_number - 1) * self.local_steps + step) / (self.rounds * self.local_steps)
        return schedule.rate(self.learning_rate, self.schedule, position)


@dataclass(frozen=True)
class Trained:
    """What the site tells beside its update: images it trained on, sum of the batches' mean losses, steps.

    `seconds` the training took and those it `waited` for images stay at the site.
    """

    examples: int
    loss_sum: float
    steps: int
    seconds: float = 0.0
    waited: float = 0.0


def batches(indices: npt.NDArray[np.int64], size: int, generator: np.random.Generator) -> Iterator[Any]:
    """Endless batches of exactly `size` positions, int64.

    Every image comes once before any comes again; a batch may span two shuffles, so that none is ever short.
    """
    ahead = np.empty(0, dtype=np.int64)
    while True:
        while len(ahead) < size:
            ahead = np.concatenate([ahead, generator.permutation(indices)])
        yield ahead[:size]
        ahead = ahead[size:]


def train(
    network: nn.Module,
    task: Task,
    cohort: Cohort,
    plan: Plan,
    round_number: int,
    vector: Vector,
    *,
    augment: Augment | None = None,
    check: Check = lambda: None,
    chance: np.random.Generator | None = None,
    anchor: Vector | None = None,
    shift: Vector | None = None,
) -> Trained:
    """Train on from the received model and write the update over it.

    Args:
        network: on its device; its trainable parameters are the received ones already.
        vector: float32 [d], the parameters it starts from; on return the update, trained minus that.
        augment: for training images.
        check: raises to stop.
        chance: what sampling, augmentation and dropout draw from; the operating system where it is None.
        anchor: float32 [d], what the plan's proximal term holds the parameters to; `vector` where it is None.
        shift: float32 [d], added to every gradient there is (SCAFFOLD's c − c_i).

    Raises:
        Refusal: NO_DATA without training images, NON_FINITE when the loss is not finite; whatever `check` raises.
    """
    import torch

    indices = cohort.indices(Membership.TRAIN)
    if len(indices) == 0:
        raise Refusal(RefusalCode.NO_DATA)
    generator = chance or plan.chance("", "", round_number)
    torch.manual_seed(int(generator.integers(2**63)))
    device = next(network.parameters()).device
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimiser = Optimiser(plan.optimiser, parameters, plan.momentum, plan.weight_decay)
    anchors = _parts(network, vector if anchor is None else anchor, device) if plan.proximal_mu else []
    shifts = _parts(network, shift, device) if shift is not None else []
    transfer.training_mode(network)
    loss_sum, feed = torch.zeros((), device=device), Feed(cohort, task, device, augment)
    drawn = feed.batches(batches(indices, plan.batch_size, generator), generator, plan.local_steps)
    with repeatable(plan.seed > 0), closing(drawn):
        for step, (images, targets) in enumerate(drawn):
            check()
            optimiser.clear()
            loss = task.loss(compute(network, images), targets)
            torch.autograd.backward(loss)
            for parameter, held in anchors:
                if parameter.grad is None:  # statistics of a batch norm
                    continue
                parameter.grad.add_(parameter.detach(), alpha=plan.proximal_mu).add_(held, alpha=-plan.proximal_mu)
            for parameter, moved in shifts:
                if parameter.grad is not None:
                    parameter.grad.add_(moved)
            optimiser.step(plan.rate(round_number, step))
            loss_sum += loss.detach()
    optimiser.clear()
    total = float(loss_sum)
    if not math.isfinite(total):
        raise Refusal(RefusalCode.NON_FINITE)
    state = network.state_dict()
    for name, part in Layout.of(network).split(vector).items():
        np.subtract(state[name].detach().cpu().numpy(), part, out=part)
    return Trained(len(indices), total, plan.local_steps, feed.seconds, feed.waited)


def evaluate(
    network: nn.Module, task: Task, cohort: Cohort, side: Membership, *, check: Check = lambda: None
) -> npt.NDArray[np.float64]:
    """The task's sums over the images of one side: float64 [task.size], zeros when there is none.

    Raises:
        whatever `check` raises.
    """
    import torch

    device = next(network.parameters()).device
    indices, sums = cohort.indices(side), np.zeros(task.size)
    network.eval()
    feed = Feed(cohort, task, device)
    with torch.inference_mode():
        size = max(1, min(EVALUATION_BATCH, EVALUATION_VALUES // math.prod(cohort.images.shape[1:])))
        for start in range(0, len(indices), size):
            check()
            chosen = indices[start : start + size]
            images, targets = feed.batch(chosen)
            outputs = compute(network, images)
            losses = task.losses(outputs, targets)
            sums += task.statistics(
                outputs.cpu().numpy(), targets.cpu().numpy(), losses.cpu().numpy(), cohort.spacing[chosen]
            )
    return sums


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Let torch choose only operations that give the same bits every time; some are slower, and it warns of any
    that has no such form.
    """
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _parts(network: nn.Module, vector: Vector, device: torch.device) -> list[tuple[nn.Parameter, Tensor]]:
    """Each parameter that travels with its part of a vector, for FedProx (Li 2020, arXiv 1812.06127: + µ/2 |w −
    w_received|²) and SCAFFOLD.
    """
    import torch

    own = dict(network.named_parameters())
    return [(own[name], torch.from_numpy(part).to(device)) for name, part in Layout.of(network).split(vector).items()]
