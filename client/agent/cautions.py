"""What should an operator know of the images before a study with noise begins? Words for the site's own people only.

They hang on how many patients there are, so they go to the operator's door, never into an answer or the agent's log.
"""

from __future__ import annotations

from client.imaging import Source
from privacy.study import Study


def cautions(study: Study, source: Source, patients: int) -> list[str]:
    """Where what a site has is not what a study with noise counts on; nothing when it is, or without noise.

    Args:
        patients: how many the source has for the study.
    """
    privacy, found = study.privacy, list[str]()
    if privacy.mode == "none":
        return found
    if patients > privacy.patients_bound:
        found.append(
            f"There are {patients} patients here, and the study's delta {privacy.delta} is meant for at most "
            f"{privacy.patients_bound} in all (privacy.patients_bound): a failure of that chance could then concern "
            "somebody. Do not approve it; ask the coordinator for a study with a larger bound and a smaller delta."
        )
    elif patients > privacy.site_patients_bound:
        found.append(
            f"There are {patients} patients here, and the study counts on at most {privacy.site_patients_bound} at one "
            "hospital (privacy.site_patients_bound). What is promised to patients holds all the same; large sums are "
            "cut, so training and figures may get worse, and a step may take longer than the size that was agreed, "
            "which whoever watches the clock can see. Ask the coordinator for a study with a larger bound."
        )
    if source.one_image_per_patient:
        found.append(
            "The source is declared to hold one image per patient. Every image counts as a patient of his own: whoever "
            "has k images in it is promised k times epsilon, and more than k times delta. Make sure that it is so, or "
            "name the patients (--patient-column)."
        )
    return found
