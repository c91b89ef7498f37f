"""How does a person read and write a study? The commented template, and the explanation in plain words."""

from __future__ import annotations

import math

from privacy.patient import EVALUATION_TRIES, honest_shares, plan_steps
from privacy.study import Study

S8 = (
    "WITHOUT NOISE it holds against a coordinator that is honest but curious only: one that varies models and sites "
    "between rounds can take differences, and one crafted model sent to all can make the sum tell more."
)
"""What every page and report of a study with secure aggregation and without noise says (RULES S8)."""

_TEMPLATE = """# A Consilium study: what every hospital agrees to, by its hash. It is data; nothing in it can execute.
# Entries left out take the default shown. Check it with:  consilium-coordinator study show {name}.toml

schema = 1
sites = [{sites}]          # enrolled sites, by name

[study]
name = "{name}"            # small letters, digits, hyphens
title = "Chest X-ray triage"
purpose = "Find chest X-rays with a suspicious finding, so that they are read first."
contact = ""               # whom a hospital may ask

[task]
kind = "classification"    # classification | multilabel | segmentation
classes = ["normal", "finding"]   # the label values, in order; the last of two is the positive one
                                  # multilabel: the findings; segmentation: the background, then the structures

[network]
name = "densenet-small"    # `consilium-coordinator models networks` lists them
norm = "group"             # group | instance | none | frozen | batch, which mixes patients and is refused with noise
                           # frozen: for weights that were trained with batch norm (`study sign --initial`)
weight_standardisation = false   # true: convolutions use standardised weights; with norm "group" it helps under noise

[input]
channels = 1
size = [64, 64]            # pixels; [depth, height, width] for volumes
transforms = [{{ name = "scale_intensity" }}]
augmentation = [{{ name = "random_flip" }}]

[transfer]                 # on top of weights given to `study sign --initial`
train = "all"              # all | head | adapters (norms and head) | lora (low rank beside each convolution, and head)
rank = 4                   # lora only

[split]                    # by patient; used where the data set brings no split of its own
validation = 0.15
test = 0.2

[optimiser]                # how a hospital trains between two messages
name = "adamw"             # sgd | adam | adamw
learning_rate = 0.001
momentum = 0.0             # sgd only
weight_decay = 0.0
batch_size = 32
schedule = "constant"      # constant | cosine (over all rounds)

[rounds]
count = 10
local_steps = 20           # optimiser steps in each hospital and round
deadline_seconds = 600     # who is later is left out of that round
reserve = 5                # how many rounds may be tried again; beyond it the study pauses
seed = 0                   # above 0: two runs are equal bit for bit; for public data, and never with noise

[aggregation]
strategy = "fedavg"        # fedavg | fedprox | fedavgm | fedadam | fedyogi | scaffold
weights = "examples"       # examples | equal
minimum_sites = {minimum}          # fewer answers than this and a round does not count
server_learning_rate = 1.0 # fedadam, fedyogi: try 0.01
proximal_mu = 0.0          # fedprox: try 0.01
beta_1 = 0.9               # fedavgm, fedadam, fedyogi
beta_2 = 0.99              # fedadam, fedyogi
tau = 0.001                # fedadam, fedyogi
ema = 0.0                  # above 0: publish the moving average of the models over the rounds; try 0.9, or 0.99 for
                           #   hundreds of rounds; costs no privacy

[local]                    # what stays at a hospital and never travels; refused with noise on
norms = "shared"           # shared | local (each hospital keeps its own normalisation: FedBN)
personal = "none"          # none | ditto (each hospital also trains a model of its own)
personal_weight = 0.1      # ditto: how strongly that model is held to the common one

[privacy]
mode = "none"              # none: no differential privacy, for public or freely shareable data only
                           # shared: one secure sum for each optimiser step, each hospital adds its share of the noise;
                           #   needs secagg.mode = "on", rounds.local_steps = 1, rounds.seed = 0, weights = "equal",
                           #   and optimiser.name = "sgd" with momentum = 0 and weight_decay = 0
                           # per-site: each hospital adds all of the noise to each of its own steps; more noise
# clip = 1.0               # C: the largest L2 norm of what one patient adds to a step
# noise_multiplier = 1.0   # sigma: noise of an opened sum over the most one patient adds; `study plan` finds it
# sampling_rate = 0.05     # q: the chance of a patient to be in a step
# expected_patients = 50   # what a step's sum is divided by: q times a public guess of the training patients
# images_per_patient = 4   # images of one patient in a step, averaged before clipping
# augmentations = 1        # forms of each image, averaged before clipping
# patients_bound = 10000   # more patients than all hospitals have together; public
# site_patients_bound = 2000  # more than any one hospital has; public
# delta = 0.000001         # below 1 / patients_bound; a tenth of that is usual
# noise_floor = 0.0        # shared: the least noise of one hospital; protects it if secure aggregation is broken
# evaluation_noise = 4.0   # noise of an evaluation's sum over the most one patient adds to it

[secagg]
mode = "off"               # off: the coordinator sees each hospital's update | on: only the sum of at least threshold
# colluding = 1            # sites that may work together with the coordinator
# threshold = 3            # sites it takes to open a sum: more than (sites + colluding) / 2; left out: the smallest
# session_slots = 100      # computations that one set of keys serves
# update_bound = 1.0       # largest change of one parameter by one site; larger ones are cut
# norm_bound = 100.0       # largest L2 norm of one site's update; larger ones are scaled down
# examples_bound = 100000  # most training images of one site; public, and sets how finely small sites are weighed
# rounding = "nearest"     # nearest | stochastic

[publish]
choose = "last"            # last | best-validation (summed over hospitals; never test data)

[initial]
seed = 1                   # the first weights; their hash is filled in when the study is signed
"""


_TRAINED = {
    "all": "the whole network",
    "head": "the last layers only; the rest stays as the initial weights have it and never travels",
    "adapters": "the norms and the last layers only; the rest stays as the initial weights have it and never travels",
    "lora": "low-rank additions (rank {rank}) and the last layers only; the rest never travels",
}


_SUMS = {
    "classification": "score histograms",
    "multilabel": "score histograms of every finding",
    "segmentation": "sums of overlap (Dice) and surface distance of every structure",
}


def template(name: str, sites: list[str]) -> str:
    """A commented draft that is valid as it stands (with at least one site)."""
    quoted = ", ".join(f'"{site}"' for site in sites)
    return _TEMPLATE.format(name=name, sites=quoted, minimum=max(1, min(2, len(sites))))


def explain(study: Study) -> list[tuple[str, str]]:
    """The study as (heading, sentence) pairs for a person who has to decide on it."""
    rounds, aggregation = study.rounds, study.aggregation
    size = " × ".join(str(side) for side in study.input.size)
    weights = "by its number of training images" if aggregation.weights == "examples" else "equally"
    published = (
        f"the moving average of the models over the rounds, with decay {aggregation.ema}"
        if study.averaged
        else "the model of the last round"
        if study.publish.choose == "last"
        else "the round with the best validation metric summed over the sites"
    )
    frozen = "batch norms of the initial weights as a scale and a shift"
    norm = frozen if study.network.norm == "frozen" else f"{study.network.norm} normalisation"
    standardised = ", weights standardised" if study.network.weight_standardisation else ""
    shared = study.network.norm == "batch" and study.local.norms == "shared"
    statistics = " and, channel by channel, mean and variance of its images' features" if shared else ""
    secagg = study.secagg
    hidden = secagg.mode == "on"
    leaves = (
        f"the change of the trained weights{statistics}, summed training loss, "
        "and of the validation images their number and "
        f"{_SUMS.get(study.task.kind, 'sums')}"
    )
    noised = study.privacy.mode != "none"
    return [
        ("Study", f"{study.study.title} ({study.study.name})"),
        ("Purpose", study.study.purpose),
        ("Contact", study.study.contact or "none given"),
        ("Question", f"{study.task.kind}: {', '.join(study.task.classes)}"),
        ("Network", f"{study.network.name}, {norm}{standardised}"),
        ("Trained", _TRAINED[study.transfer.train].format(rank=study.transfer.rank)),
        ("Images", f"{size} pixels, {study.input.channels} channel(s); split by patient"),
        (
            "Training",
            f"{rounds.count} rounds of {rounds.local_steps} {study.optimiser.name} steps at learning rate "
            f"{study.optimiser.learning_rate}, "
            + ("each on a secret sample of patients" if noised else f"batches of {study.optimiser.batch_size}"),
        ),
        (
            "Aggregation",
            f"{aggregation.strategy}, each hospital weighted {weights}, at least {aggregation.minimum_sites} per round",
        ),
        ("Stays at the site", _kept(study)),
        (
            "Chance",
            f"training repeats itself bit for bit (seed {rounds.seed})"
            if rounds.seed
            else "from each hospital's own system",
        ),
        ("Deadline", f"{rounds.deadline_seconds} s per round; {rounds.reserve} rounds may be repeated"),
        ("Sites", ", ".join(study.sites)),
        ("Published", published),
        (
            "Leaves the site",
            _noised(study)
            if noised
            else f"each round: {leaves}; at the end: the same sums over the test images"
            + ("; and the change of the control variate" if aggregation.strategy == "scaffold" else "")
            + ("; all of it masked, so that only the sum over the sites can be read" if hidden else ""),
        ),
        ("Privacy", privacy(study)),
        ("Secure aggregation", secure_aggregation(study)),
        ("Hash", study.hash),
    ]


def _kept(study: Study) -> str:
    """What training leaves at the hospital besides its journal."""
    kept = []
    if study.aggregation.strategy == "scaffold":
        kept.append("its control variate")
    if study.local.norms == "local":
        kept.append("its own normalisation")
    if study.local.personal == "ditto":
        kept.append(f"a personal model, held to the common one with weight {study.local.personal_weight}")
    return ", ".join(kept) or "nothing of a round"


def privacy(study: Study) -> str:
    """What the study promises each patient: the mechanism and its constants; ε is `study plan`'s to say (RULES N7)."""
    section = study.privacy
    if section.mode == "none":
        return "NO differential privacy: an update can reveal training images. Public data only."
    noise = (
        f"each hospital adds its share of the noise, and {honest_shares(study)} shares together are σ = "
        f"{section.noise_multiplier} times that"
        if section.mode == "shared"
        else f"each hospital adds noise of σ = {section.noise_multiplier} times that to each of its steps"
    )
    return (
        f"Differential privacy, {section.mode}. Unit: one patient at one site, all images added or removed; over "
        f"k sites group privacy applies. One patient adds at most C = {section.clip} to a step; {noise}. A patient is "
        f"in a step with chance q = {section.sampling_rate}, and is charged for at most T = {plan_steps(study)} "
        f"noised steps, sampled or not. δ = {section.delta}. An evaluation is asked at most {EVALUATION_TRIES} times, "
        f"with noise of {section.evaluation_noise} times what one patient adds. {_as_pooled(study)} What ε this is, if "
        "secure aggregation holds and if it does not: `consilium-coordinator study plan`."
    )


def _as_pooled(study: Study) -> str:
    """How much more noise there is than on pooled data (RULES N8)."""
    sites = len(study.sites)
    if study.privacy.mode == "per-site":
        return f"With all {sites} sites the noise is {math.sqrt(sites):.2f} times that of pooled data at the same ε."
    factor = math.sqrt(sites / honest_shares(study))
    return (
        f"With all {sites} sites the noise is {factor:.2f} times that of pooled data at the same ε "
        f"(√({sites}/{honest_shares(study)}))."
    )


def _noised(study: Study) -> str:
    """What leaves the site with noise on (RULES N6)."""
    shown = "masked, so that only the noisy sum over the sites can be read" if study.secagg.mode == "on" else "as it is"
    what = (
        "the noisy sum of its patients' clipped gradients and losses"
        if study.privacy.mode == "shared"
        else "the change of the weights after its noisy steps"
    )
    return (
        f"each round: {what}; at the end: noisy sums of the validation and the test patients' scores; no exact counts; "
        f"all of it {shown}"
    )


def secure_aggregation(study: Study) -> str:
    """What secure aggregation promises in this study, and what it does not (RULES S8)."""
    secagg = study.secagg
    if secagg.mode == "off":
        return "OFF: the coordinator sees this hospital's own update."
    if study.privacy.mode != "none":
        return (
            f"ON: only sums over at least {study.aggregation.minimum_sites} hospitals are opened, by "
            f"{secagg.threshold} of them together; {secagg.colluding} may work with the coordinator. Every sum that is "
            "opened carries the noise."
        )
    return (
        f"ON: only sums over at least {study.aggregation.minimum_sites} hospitals are opened, by {secagg.threshold} of "
        f"them together; {secagg.colluding} may work with the coordinator. One hospital's update is cut to norm "
        f"{secagg.norm_bound} and to {secagg.update_bound} per parameter. {S8}"
    )
