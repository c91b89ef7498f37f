"""What has a hospital gained by taking part? The federated model beside one trained here alone, on its own images.

The site's own model starts from the study's first weights and takes as many steps, at the same rates, as the site took
in the federation. Both are measured on the site's own test images. Nothing of it leaves: the result lies beside the
delivered model and is shown to the operator.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from client import training
from client.agent.bench import COMPUTING, MODEL, WITH_NORMS, device
from client.agent.core import Agent
from client.agent.rows import StudyRow
from client.feed import place
from client.imaging import Cohort, Membership
from models import tasks, transforms, weights
from privacy.errors import ConsiliumError
from privacy.study import Study

if TYPE_CHECKING:
    from torch import nn

REPORT = "site-report.json"
Progress = Callable[[int, int], None]


def compare(agent: Agent, row: StudyRow, progress: Progress = lambda done, total: None) -> str:
    """Train alone, measure both, keep the report beside the delivered model, and return it.

    Args:
        progress: called with (done, total) rounds; may raise to stop.

    Returns:
        JSON {"study", "primary", "steps", "federated": {"metrics", "intervals"}, "alone": the same}.

    Raises:
        ConsiliumError: the study has delivered no model, its images are gone, or none of them is for testing; whatever
            `progress` raises.
    """
    study, folder = agent.study(row.hash), agent.models() / row.hash
    source = next((line for line in agent.store.sources() if line.name == row.data), None)
    if study is None or not (folder / MODEL).is_file():
        raise ConsiliumError("This study has delivered no model yet", row.name, "Wait until it is finished.")
    if source is None:
        raise ConsiliumError(
            "The images of this study are no longer connected", row.data, "`consilium-site data connect NAME PATH`."
        )
    cohort = agent.desk.cohort(study, source)
    if not len(cohort.indices(Membership.TEST)):
        raise ConsiliumError(
            "This site has no test images", row.data, "The study's [split], or the data set's own, keeps none aside."
        )
    own = folder / WITH_NORMS
    network = _network(study)
    weights.load_state(network, own if own.is_file() else folder / MODEL)
    federated = _measured(study, network, cohort)
    weights.load_state(network, agent.desk.initial(study))
    _train(study, agent.site.name, network, cohort, progress)
    report = {
        "study": row.hash,
        "primary": tasks.get(study.spec()).primary,
        "steps": study.rounds.count * study.rounds.local_steps,
        "federated": federated,
        "alone": _measured(study, network, cohort),
    }
    text = json.dumps(report, sort_keys=True)
    (folder / REPORT).write_text(text, encoding="utf-8")
    return text


def _network(study: Study) -> nn.Module:
    from models import networks

    with COMPUTING:
        return place(networks.build(study.spec()), device())


def _train(study: Study, site: str, network: nn.Module, cohort: Cohort, progress: Progress) -> None:
    """All rounds without the others; a study that is running gets its turn between two of them."""
    task, plan = tasks.get(study.spec()), training.Plan.of(study)
    augment = transforms.augmentation(study.spec()) if study.input.augmentation else None
    for number in range(1, plan.rounds + 1):
        progress(number - 1, plan.rounds)
        vector = weights.trainable_vector(network)
        with COMPUTING:
            training.train(
                network, task, cohort, plan, number, vector,
                augment=augment, chance=plan.chance(site, "alone", number),
            )  # fmt: skip
    progress(plan.rounds, plan.rounds)


def _measured(study: Study, network: nn.Module, cohort: Cohort) -> dict[str, Any]:
    task = tasks.get(study.spec())
    with COMPUTING:
        sums = training.evaluate(network, task, cohort, Membership.TEST)
    return {"metrics": task.metrics(sums), "intervals": task.intervals(sums)}
