"""How does a person read and write a study? The commented template, and the explanation in plain words."""

from __future__ import annotations

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
norm = "group"             # group | instance | none; batch normalisation mixes patients and is not offered

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

[local]                    # what stays at a hospital and never travels; refused with noise on
norms = "shared"           # shared | local (each hospital keeps its own normalisation: FedBN)
personal = "none"          # none | ditto (each hospital also trains a model of its own)
personal_weight = 0.1      # ditto: how strongly that model is held to the common one

[privacy]
mode = "none"              # no differential privacy: for public or freely shareable data only

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
        "the model of the last round"
        if study.publish.choose == "last"
        else "the round with the best validation metric summed over the sites"
    )
    secagg = study.secagg
    hidden = secagg.mode == "on"
    leaves = (
        "the change of the trained weights, summed training loss, and of the validation images their number and "
        f"{_SUMS.get(study.task.kind, 'sums')}"
    )
    return [
        ("Study", f"{study.study.title} ({study.study.name})"),
        ("Purpose", study.study.purpose),
        ("Contact", study.study.contact or "none given"),
        ("Question", f"{study.task.kind}: {', '.join(study.task.classes)}"),
        ("Network", f"{study.network.name}, {study.network.norm} normalisation"),
        ("Trained", _TRAINED[study.transfer.train].format(rank=study.transfer.rank)),
        ("Images", f"{size} pixels, {study.input.channels} channel(s); split by patient"),
        (
            "Training",
            f"{rounds.count} rounds of {rounds.local_steps} {study.optimiser.name} steps at learning rate "
            f"{study.optimiser.learning_rate}, batches of {study.optimiser.batch_size}",
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
            f"each round: {leaves}; at the end: the same sums over the test images"
            + ("; and the change of the control variate" if aggregation.strategy == "scaffold" else "")
            + ("; all of it masked, so that only the sum over the sites can be read" if hidden else ""),
        ),
        ("Privacy", "NO differential privacy: an update can reveal training images. Public data only."),
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


def secure_aggregation(study: Study) -> str:
    """What secure aggregation promises in this study, and what it does not (RULES S8)."""
    secagg = study.secagg
    if secagg.mode == "off":
        return "OFF: the coordinator sees this hospital's own update."
    return (
        f"ON: only sums over at least {study.aggregation.minimum_sites} hospitals are opened, by {secagg.threshold} of "
        f"them together; {secagg.colluding} may work with the coordinator. One hospital's update is cut to norm "
        f"{secagg.norm_bound} and to {secagg.update_bound} per parameter. {S8}"
    )
