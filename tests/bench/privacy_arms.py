"""How does each arm of bench-privacy train? One plan, one cohort, five ways to deal patients and noise out.

Every arm has the same network, clip norm, sampling rate, number of noised steps, ε, δ, learning rate and first weights.
What differs is where the patients are and who adds which noise:

    pooled       one site with all patients, noise σ
    pooled × f   the same with noise f·σ, f = √(n / (n_min − c)): what RULES N8 says `shared` is as accurate as
    shared       n sites, one sum a step, each adding its share σ / √(n_min − c) (RULES N2)
    per-site     n sites, each adding all of σ to K steps of its own before the updates are averaged
    alone        one of the n sites, nobody else

All of it is the code of a real study: `client.private` samples, clips and sums, `privacy.mechanisms` rounds and adds
the noise of `privacy.noise.Source`, `server.noised` reads the sum and `server.optimizers` takes the step. It runs in
one process, without sockets and without masks: masks cancel exactly in the sum modulo 2³² (tests/privacy/secagg), so
the opened words are the sum of the sites' words, and that sum is what is taken here. Samples and noise come from the
operating system in every run (RULES N1), so no run can be repeated to the bit; a seed fixes the first weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from client import dealing
from client.feed import compute
from client.imaging import Cohort, Membership
from client.private.bench import PrivateBench
from models import additive, networks, tasks, weights
from privacy.mechanisms import training
from privacy.noise import Source
from privacy.planning import find_noise
from privacy.secagg.fixed import Opened
from privacy.secagg.plan import Plan
from privacy.study import Study
from server import optimizers
from server.noised import Noised

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

SPLIT = {"validation": 0.1, "test": 0.25}
KEY = b"consilium bench-privacy, patients"
"""What the split and the dealing out to sites hang on: a keyed hash of each patient, the same in all runs."""
LOCAL_STEPS = 5
"""K: steps between two messages of `per-site`."""
COLLUDING = 1
PLACES = 32
"""Images that go through the network at once. It changes nothing but the speed."""
DEALT = 7


@dataclass(frozen=True)
class Recipe:
    """What was tuned for a set, once, on validation patients of the pooled arm at ε = 8; all arms share it.

    Attributes:
        classes: what the images show.
        channels: of an image.
        size: of an image, pixels.
        bound: the most patients that train, which is public.
        delta: δ, as the study writes it.
        steps: T, noised steps.
        rate: q, as the study writes it.
        clip: C, as the study writes it.
        learning_rate: of a step, as the study writes it.
    """

    classes: tuple[str, ...]
    size: tuple[int, int]
    bound: int
    channels: int = 1
    network: str = "resnet-small"
    steps: int = 60
    rate: str = "0.1"
    clip: str = "1"
    learning_rate: str = "1"
    delta: str = "0.0001"


XRAYS = Recipe(("normal", "pneumonia"), (24, 24), 3000)
"""Seven runs from one first weights, with 60 steps; validation AUROC in points. 32 px, q 0.15, C 1: learning rate 0.5,
1, 2, 4 gave 96.7, 98.0, 97.6, 97.2. 24 px, q 0.1: C 1 with 1 and 2 gave 98.0 and 97.6, C 0.5 with 2 97.5. No test
patient was looked at, and nothing was tuned for another arm.
"""
MOLES = Recipe(("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"), (24, 32), 8000, 3)
"""Four runs as above; mean validation AUROC of each class against the rest. C 1 with learning rate 1, 2 and 4 gave
80.9, 80.7 and 79.1, C 0.5 with 2 80.9.
"""
RECIPES = {"chest_xray_pneumonia": XRAYS, "ham10000": MOLES}
"""The sets, by their folder; see each one's SOURCE.md. A patient of ham10000 is a lesion."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        mode: "pooled", "shared", "per-site" or "alone".
        sites: n.
        factor_of: of how many sites the noise factor of RULES N8 is put on; 0 for none.
    """

    name: str
    mode: str
    sites: int
    factor_of: int = 0

    @property
    def factor(self) -> float:
        """How many times σ the noise of this arm's opened sum is meant to have."""
        return n8(self.factor_of) if self.factor_of else 1.0


ARMS = {
    arm.name: arm
    for arm in (
        Arm("pooled", "pooled", 1),
        Arm("pooled-noise-of-5", "pooled", 1, 5),
        Arm("pooled-noise-of-10", "pooled", 1, 10),
        Arm("shared-5", "shared", 5),
        Arm("shared-10", "shared", 10),
        Arm("per-site-5", "per-site", 5),
        Arm("alone", "alone", 5),
    )
}


def n8(sites: int) -> float:
    """√(n / (n_min − c)) with n_min = n − 1, the factor of RULES N8."""
    return math.sqrt(sites / (sites - 1 - COLLUDING))


def deal(cohort: Cohort, sites: int) -> list[list[Indices]]:
    """Each site's training patients by a hash of the pseudonym, and of each the positions of his images."""
    dealt: list[list[Indices]] = [[] for _ in range(sites)]
    found = cohort.groups(Membership.TRAIN)
    for name in sorted(found):
        dealt[dealing.hospital_of(name, 0, DEALT, sites)].append(found[name])
    return dealt


_PLAN = """
schema = 1
sites = [{sites}]
[study]
name = "bench-privacy"
title = "bench-privacy"
purpose = "Compare patient-level privacy over sites with pooled data."
[task]
kind = "classification"
classes = [{classes}]
[network]
name = "{network}"
[input]
channels = {channels}
size = [{size}]
transforms = [{{ name = "normalise", parameters = {{ mean = "0.5", std = "0.25" }} }}]
[optimiser]
name = "sgd"
learning_rate = "{learning_rate}"
batch_size = {places}
schedule = "cosine"
[rounds]
count = {rounds}
local_steps = {local}
reserve = 0
[aggregation]
strategy = "fedavg"
weights = "equal"
minimum_sites = {minimum}
[privacy]
mode = "{mode}"
clip = "{clip}"
noise_multiplier = "{noise}"
sampling_rate = "{rate}"
expected_patients = {expected}
images_per_patient = 1
patients_bound = {bound}
site_patients_bound = {site_bound}
delta = "{delta}"
[secagg]
mode = "{secagg}"
"""


def study(arm: Arm, recipe: Recipe, noise: str, patients: int) -> Study:
    """The contract that an arm trains by.

    Args:
        noise: σ times the arm's factor, as the study writes it.
        patients: of all sites' training sides together.
    """
    shared, own = arm.mode == "shared", arm.mode in {"per-site", "alone"}
    local = LOCAL_STEPS if arm.mode == "per-site" else 1
    members = 1 if arm.mode in {"pooled", "alone"} else arm.sites
    here = patients / arm.sites
    return Study.from_toml(
        _PLAN.format(
            sites=", ".join(f'"site-{number:02}"' for number in range(1, members + 1)),
            classes=", ".join(f'"{name}"' for name in recipe.classes), channels=recipe.channels,
            size=", ".join(map(str, recipe.size)),
            network=recipe.network, learning_rate=recipe.learning_rate, places=PLACES,
            rounds=recipe.steps // local, local=local, minimum=members - 1 if shared else members,
            mode="shared" if shared else "per-site", clip=recipe.clip, noise=noise, rate=recipe.rate,
            expected=max(1, round(Fraction(recipe.rate) * round(here if own else patients))),
            bound=recipe.bound, site_bound=math.ceil(recipe.bound / arm.sites), delta=recipe.delta,
            secagg="on" if shared else "off",
        )
    )  # fmt: skip


def noise_for(recipe: Recipe, epsilon: float) -> Fraction:
    """σ of an opened sum for T steps, the same for every arm; that each arm's own study agrees is checked."""
    asked = {name: find_noise(study(ARMS[name], recipe, "1", 1000), str(epsilon)) for name in ("pooled", "shared-5")}
    if len(set(asked.values())) != 1:
        raise ValueError(f"the arms do not need the same noise: {asked}")
    return Fraction(asked["pooled"])


def train(
    arm: Arm,
    recipe: Recipe,
    sigma: Fraction,
    cohort: Cohort,
    seed: int,
    said: Callable[[int, float], None] | None = None,
) -> tuple[torch.nn.Module, Study]:
    """Train one model.

    Args:
        sigma: σ, before the arm's factor.
        seed: of the first weights; with `alone`, also which site it is.
        said: called after each round with its number and the noised training loss.
    """
    dealt = deal(cohort, arm.sites)
    patients = sum(map(len, dealt))
    text = format(math.ceil(float(sigma) * arm.factor * 1000 - 1e-9) / 1000, "f")
    plan = study(arm, recipe, text, patients)
    torch.manual_seed(seed)
    network, task = networks.build(plan.spec()), tasks.get(plan.spec())
    at_work: Sequence[list[Indices]] = [dealt[(seed - 1) % arm.sites]] if arm.mode == "alone" else dealt
    bench = PrivateBench(plan, cohort, task, network, None)
    vector = weights.trainable_vector(network)
    mechanism, server = training(plan, len(vector)), optimizers.of(plan.aggregation, len(plan.sites))
    memory = server.fresh(vector)
    statistics, place = additive.size(task), len(vector) + additive.LOSS
    noised = Noised(plan, task, len(vector)) if arm.mode == "shared" else None
    layout = Plan.of(plan, len(vector), statistics) if noised else None

    def release(sums: Doubles) -> Doubles:
        return mechanism.read(mechanism.release(sums, Source()))

    for round_ in range(1, plan.rounds.count + 1):
        if noised is not None and layout is not None:
            words = np.zeros(len(vector) + statistics, np.uint32)
            for mine in at_work:
                own = mechanism.release(bench.gradient_sum(vector, mine, _go), Source())
                words[: len(vector)] += own[:-1]  # uint32 wraps: modulo 2^32, as the opened sum of masked answers is
                words[place : place + 1] += own[-1:]
            opened = Opened(layout, words, len(at_work))
            if excess := noised.excess(opened):
                raise ValueError(excess)
            update, loss = noised.step(opened, 0, len(vector), round_), float(noised.statistics(opened)[additive.LOSS])
            loss /= plan.privacy.expected_patients
        else:
            update, loss = np.zeros(len(vector)), 0.0
            for mine in at_work:
                changed = vector.copy()
                loss += bench.trained(round_, changed, mine, release, _go) / plan.rounds.local_steps / len(at_work)
                update += changed.astype(np.float64) / len(at_work)
        server.step(vector, update[None], memory, len(at_work))
        if said is not None:
            said(round_, loss)
    weights.load_trainable(network, vector)
    return network, plan


def _go() -> None:
    """Nobody stops a bench."""


@dataclass(frozen=True)
class Found:
    """Exact figures on one side's images, as shares; of more than two classes the mean over one against the rest."""

    auroc: float
    balanced_accuracy: float
    images: int
    patients: int


def measure(network: torch.nn.Module, cohort: Cohort, side: Membership) -> Found:
    """Score every image of a side; the AUROC is that of all pairs, not of a histogram."""
    at = cohort.indices(side)
    network.eval()
    with torch.inference_mode():
        outputs = [
            compute(network, torch.from_numpy(cohort.images[part])) for part in np.array_split(at, len(at) // 64 + 1)
        ]
    scores, truth = torch.cat(outputs).double(), cohort.targets[at]
    chances, chosen = scores.softmax(1).numpy(), scores.argmax(1).numpy()
    if chances.shape[1] == 2:  # softmax runs into 1 and would make ties where the scores have none
        margins = (scores[:, 1] - scores[:, 0]).numpy()
        chances = np.stack([-margins, margins], 1)
    there = np.unique(truth)
    recalls = [float(np.mean(chosen[truth == value] == value)) for value in there]
    areas = [auroc(chances[truth == value, value], chances[truth != value, value]) for value in there]
    return Found(float(np.mean(areas)), float(np.mean(recalls)), len(at), len(cohort.groups(side)))


def auroc(positive: Doubles, negative: Doubles) -> float:
    """The share of pairs in which the image with the finding scores higher, ties one half (Mann and Whitney 1947)."""
    below = np.sort(negative)
    wins = np.searchsorted(below, positive, "left") + np.searchsorted(below, positive, "right")
    return float(wins.sum() / (2 * len(positive) * len(negative)))
