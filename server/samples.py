"""How does a published model look at work? overlays.png: its answers drawn on sample images that anybody may see.

The images are the coordinator's own, from a public set or made for the purpose; no hospital's image comes this way. A
child process (`client.samples`) reads them and runs the model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from privacy.errors import ConsiliumError
from privacy.files import replacing
from privacy.study import Study


def overlays(samples: Path, study: Study, model: Path, out: Path) -> None:
    """Write what a model says of a folder's images to the PNG file `out`.

    Args:
        samples: a folder with PNG, JPEG or NIfTI images.
        study: the one that the model was trained in.
        model: its safetensors.

    Raises:
        ConsiliumError: the model is not whole by itself, or an image cannot be shown to it; the message names it.
    """
    from models import plots  # matplotlib: heavy, and needed here only

    if study.local.norms == "local":
        raise ConsiliumError(
            "The published model cannot be shown at work",
            "its normalisation layers stayed at the hospitals (local.norms)",
            "Leave out --samples.",
        )
    with tempfile.TemporaryDirectory(prefix="consilium-") as name:
        work = Path(name)
        request = {"spec": study.spec(), "model": str(model.resolve())}
        (work / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "client.samples", str(samples.resolve()), name]
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if (work / "error.json").exists():
            raise ConsiliumError(**json.loads((work / "error.json").read_text(encoding="utf-8")))
        if ended.returncode:
            raise ConsiliumError(
                "The process that shows samples to the model ended early",
                f"{samples}, exit status {ended.returncode}",
                f"Take out the file that it died on. It said last: {ended.stderr.strip()[-500:] or 'nothing'}",
            )
        with np.load(work / "samples.npz", allow_pickle=False) as found:
            names, images, answers = found["names"].tolist(), found["images"], found["answers"]
    shown = []
    for name, image, answer in zip(names, images, answers, strict=True):
        if study.task.kind == "segmentation":
            shown.append(plots.Sample(name, image, marked=answer))
        else:
            said = _words(answer.tolist(), study.task.classes, several=study.task.kind == "multilabel")
            shown.append(plots.Sample(name, image, says=said))
    with replacing(out) as part:
        plots.overlay(shown, study.task.classes, part)


def _words(probabilities: Sequence[float], classes: Sequence[str], *, several: bool) -> str:
    """The class of an image, or its findings, with their scores."""
    scored = sorted(zip(probabilities, classes, strict=True), reverse=True)
    chosen = [pair for pair in scored if pair[0] >= 0.5] if several else scored[:1]
    return ", ".join(f"{name} {score:.2f}" for score, name in chosen) or "no finding"
