"""What does a published model say of images that anybody may see? `python -m client.samples SAMPLES WORK`.

The coordinator's `models export --samples` runs it as a process of its own: files are read and prepared by the code
that reads a hospital's, so that the network is shown what it was trained on, and a decoder that dies takes nothing
else along. No agent, no home and no hospital is touched.

WORK holds request.json: {"spec": the study's specification, "model": the path of its safetensors}. What comes out is
WORK/samples.npz (`run` says with what in it) or, where a sample is of no use, WORK/error.json: {"what", "subject",
"remedy"}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.imaging.folder import FileOpener
from client.imaging.loading import prepared, wanted_of
from client.imaging.nifti import ENDINGS
from client.imaging.records import WORDS, Image, Record, Unusable
from models import networks, tasks, weights
from models.transforms import preparation
from privacy.errors import ConsiliumError

MOST = 24
PICTURES = (".png", ".jpg", ".jpeg")


def run(samples: Path, spec: Mapping[str, Any], model: Path) -> dict[str, NDArray[Any]]:
    """Show a model every image of a folder.

    Returns:
        names: of the files, in their order. images: float32 [n, channels, *size], as the network sees them; of a
        volume in a study of images the middle slice. answers: uint8 [n, *size], an index into the classes for each
        pixel, or float32 [n, classes], the probability of each class.

    Raises:
        ConsiliumError: there is no such folder, nothing in it can be shown, or a file in it cannot be.
    """
    names = listed(samples)
    images = np.stack([read(samples, name, spec) for name in names])
    return {"names": np.array(names), "images": images, "answers": answers(images, spec, model)}


def listed(samples: Path) -> list[str]:
    """The images that stand in a folder itself, by their endings; other files are not looked at."""
    endings = (*PICTURES, *ENDINGS)
    try:
        files = [path for path in samples.iterdir() if path.is_file()]
    except OSError as error:
        raise ConsiliumError(
            "The folder of samples cannot be read", f"{samples} ({error.strerror})", "Name an existing folder."
        ) from None
    names = sorted(path.name for path in files if path.name.lower().endswith(endings))
    if not 1 <= len(names) <= MOST:
        raise ConsiliumError(
            f"The folder of samples holds {len(names)} images",
            str(samples),
            f"Put 1 to {MOST} images into it: {', '.join(endings)}.",
        )
    return names


def read(samples: Path, name: str, spec: Mapping[str, Any]) -> Image:
    """One image after the study's own preparation: float32 [channels, *size]."""
    given = spec["input"]
    wanted, shape = wanted_of(given, spec["task"]["classes"]), (int(given["channels"]), *map(int, given["size"]))
    kind = "nifti" if name.lower().endswith(ENDINGS) else "images"
    try:
        pictures = FileOpener(samples, kind, {}).read(Record(name, patient=""), wanted)
        return prepared(pictures[len(pictures) // 2].image, shape, preparation(spec))
    except Unusable as bad:
        more = f" ({bad.detail})" if bad.detail else ""
        raise ConsiliumError(
            "The model cannot be shown this sample",
            f"{samples / name}: {WORDS[bad.reason]}{more}",
            "Take it out of the folder, or put an image like the study's in its place.",
        ) from None


def answers(images: Image, spec: Mapping[str, Any], model: Path) -> NDArray[Any]:
    """What the network says: a class for each pixel, or a probability for each class; see `run`."""
    import torch

    network, target = networks.build(spec), tasks.get(spec).target
    weights.load_state(network, model)
    network.eval()
    found = []
    with torch.inference_mode():
        for image in images:
            scores = network(torch.from_numpy(image)[None])[0]
            if target == "mask":
                found.append(scores.argmax(0).to(torch.uint8).numpy())
            else:
                found.append((scores.sigmoid() if target == "labels" else scores.softmax(0)).numpy())
    return np.stack(found)


def main(arguments: Sequence[str]) -> int:
    """The process: SAMPLES and WORK in, exit status out; 1 where WORK/error.json says why."""
    samples, work = map(Path, arguments)
    request = json.loads((work / "request.json").read_text(encoding="utf-8"))
    try:
        found = run(samples, request["spec"], Path(request["model"]))
        np.savez(work / "samples.npz", names=found["names"], images=found["images"], answers=found["answers"])
    except ConsiliumError as error:
        said = {"what": error.what, "subject": error.subject, "remedy": error.remedy}
        (work / "error.json").write_text(json.dumps(said), encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
