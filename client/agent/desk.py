"""What stays warm between two messages? Network, task, prepared images and device of the studies in progress.

The two used last are kept; the rest is built again when it is asked for. Only the computing thread trains and
measures here.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

from client import training
from client.agent.bench import Bench, device, write_own
from client.agent.keepsakes import Keepsakes
from client.agent.policy import HEADER_ROOM, Sizes
from client.agent.rows import SourceRow
from client.home import SiteHome
from client.imaging import Cohort, Source, load
from models import additive, tasks, transforms, weights
from privacy.errors import ConsiliumError
from privacy.files import write_atomically
from privacy.study import Study

KEPT = 2
KEY_BYTES = 32

_loading = threading.Lock()


class Desk:
    """The warm studies of one agent.

    Args:
        home: the site's folder.
        fresh: the site knows no study yet, so that a secret key may be made.
        threads: for computing; 0 leaves torch's own choice.

    Raises:
        ConsiliumError: the key of pseudonyms is gone.
    """

    def __init__(self, home: SiteHome, *, fresh: bool, threads: int = 0) -> None:
        self._home, self._threads, self._site = home, threads, home.config().site
        self._lock = threading.Lock()
        self._benches: dict[str, Bench] = {}
        self._sizes: dict[str, Sizes] = {}
        self._key = _pseudonym_key(home.agent / "pseudonym.key", fresh=fresh)

    def libraries(self) -> None:
        """Load what computing needs; seconds, once. One thread at a time, since MONAI's parts import each other."""
        with _loading:
            import monai.networks.nets
            import monai.transforms  # noqa: F401  loaded here so that the first round does not wait for it
            import torch

            if self._threads and torch.get_num_threads() != self._threads:
                torch.set_num_threads(self._threads)

    def initial(self, study: Study) -> Path:
        """Where the study's initial weights lie, if the site holds them."""
        return self._home.agent / "studies" / study.hash / "initial.safetensors"

    def keepsakes(self, study: Study) -> Keepsakes:
        """What the site keeps of the study from round to round."""
        return Keepsakes(self._home.agent / "studies" / study.hash / "kept")

    def sizes(self, study: Study) -> Sizes:
        """What the study's network implies."""
        self.libraries()
        with self._lock:
            if study.hash not in self._sizes:
                self._sizes[study.hash] = measure(study)
            return self._sizes[study.hash]

    def changes(self, study: Study) -> list[str]:
        """In what the network of a study with noise is not the library's, in words.

        Raises:
            ConsiliumError: gradients of single patients cannot be taken of it.
        """
        self.libraries()
        from client.private import fitness

        return fitness.approvable(study.spec())

    def cohort(self, study: Study, source: SourceRow, progress: Callable[[int, int], None] | None = None) -> Cohort:
        """The site's images for a study, from the cache where they are there.

        Raises:
            ConsiliumError: the source is not there or holds nothing usable; whatever `progress` raises.
        """
        self.libraries()
        spec = study.spec()
        return load(
            Source.from_fields(json.loads(source.source), source.name),
            spec["input"],
            spec["task"]["classes"],
            spec["split"],
            self._key,
            self._home.agent / "cache",
            progress,
            prepare=transforms.preparation(spec),
            target=tasks.get(spec).target,
        )

    @property
    def key(self) -> bytes:
        """The site's secret for pseudonyms and splits."""
        return self._key

    def device(self) -> str:
        """What computing runs on, in words."""
        self.libraries()
        import torch

        if device() == "cuda":
            return f"GPU {torch.cuda.get_device_name(0)}"
        return f"CPU, {self._threads or torch.get_num_threads()} threads"

    def bench(self, study: Study, source: SourceRow, check: training.Check) -> Bench:
        """The study, warm. Called on the computing thread only.

        Raises:
            ConsiliumError: no usable images; whatever `check` raises.
        """
        bench = self._benches.pop(study.hash, None)
        if bench is None or bench.source != source.source:
            cohort = self.cohort(study, source, lambda done, total: check())
            bench = Bench(study, cohort, source.source, self.initial(study), self.keepsakes(study), self._site)
        self._benches[study.hash] = bench
        while len(self._benches) > KEPT:
            self._benches.pop(next(iter(self._benches)))
        return bench

    def leave_own(self, study: Study, round_: int, folder: Path) -> None:
        """Beside a delivered model, write the models that are this site's own, if the study has any.

        Args:
            round_: the published round.
        """
        if study.local.norms == "local" or study.local.personal != "none":
            self.libraries()
            write_own(study, self.keepsakes(study), round_, folder)

    def forget(self, study: str) -> None:
        """Let a study's network and images go."""
        self._benches.pop(study, None)


def measure(study: Study) -> Sizes:
    """What a study's network implies, without allocating it."""
    import torch

    from models import networks

    spec = study.spec()
    with torch.device("meta"):
        network = networks.build(spec)
    layout = weights.Layout.of(network)
    state = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    beside = int(study.aggregation.strategy == "scaffold")
    return Sizes(layout.count, state + HEADER_ROOM, additive.size(tasks.get(spec)), beside)


def _pseudonym_key(path: Path, *, fresh: bool) -> bytes:
    """The site's secret key. A new one would make every patient a new one, so a lost one is an error (RULES B1)."""
    if not path.exists():
        if not fresh:
            raise ConsiliumError(
                "The key of this site's pseudonyms is gone",
                str(path),
                "Restore it from your backup: with another key every patient would change and splits would mix.",
            )
        write_atomically(path, secrets.token_bytes(KEY_BYTES))
    return path.read_bytes()
