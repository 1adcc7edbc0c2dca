"""Models really fine-tuned on mixtures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from trl import SFTConfig

from m2m_hf.console import Bar
from m2m_hf.core.mixture import Mixture, row_counts
from m2m_hf.data.mixture_rows import mixture_dataset
from m2m_hf.data.rows import Candidate
from m2m_hf.errors import InputError
from m2m_hf.modeling.devices import broadcast
from m2m_hf.storage.files import read_json, read_json_or_empty, staging_path
from m2m_hf.storage.records import find_incomplete, weights_of
from m2m_hf.training.fine_tune import TrainingFailedError, finished, mixture_steps, publish, train_expert
from m2m_hf.training.trainers import BankProgress, Settings

Counts = Mapping[str, int]


class FineTunedModels:
    """Models fine-tuned on mixtures with the arguments that the adapters were trained with, in `OUT/trained/<fingerprint>/`.

    None is trained twice. They are trained on the very rows, in the very order, of the final fine-tune.

    Args:
        folder: `OUT/trained`.
        candidates: by name.
        name: gives a model its fingerprint, from the rows of each candidate.
        base: gives the base model to train.
        args: the uniform training arguments.
        settings: gives them with everything else that training takes.
        launch: in what this launch differs from the one that trained the adapters.
    """

    def __init__(
        self,
        folder: Path,
        candidates: Mapping[str, Candidate],
        name: Callable[[Counts], str],
        base: Callable[[], PreTrainedModel],
        args: SFTConfig,
        settings: Callable[[], Settings],
        launch: Sequence[str] = (),
    ) -> None:
        self._launch = launch
        self.root = folder
        self.candidates = candidates
        self._name = name
        self._base = base
        self._args = args
        self._settings = settings

    def counts(self, mixture: Mixture) -> dict[str, int]:
        """Rows of each candidate that the mixture trains on."""
        return row_counts(mixture, {name: len(self.candidates[name].rows) for name in mixture.names})

    def folder(self, counts: Counts) -> Path:
        return self.root / self._name(counts)

    def is_trained(self, counts: Counts) -> bool:
        """Whether it was, and all processes must ask; one whose training failed is not trained again either."""
        return bool(broadcast(find_incomplete(self.folder(counts)) is None))

    def steps(self, counts: Counts) -> int:
        """Optimizer steps that training takes."""
        return mixture_steps(self._args, self.candidates, counts)

    def train(self, counts: Counts, bar: Bar | None = None, before: int = 0, note: str = "", run: str = "") -> Path:
        """The folder of the model, trained now where it is not there yet.

        Args:
            bar: counts optimizer steps, of which `before` are done; with `note` behind it.
            run: the name in the trackers (default: what the mixture is).

        Raises:
            TrainingFailedError: see `train_expert`.
            InputError: the adapters were trained by another number of processes, so that this would be another batch.
        """
        folder = self.folder(counts)
        if not finished(folder, folder.name):
            if self._launch:
                raise InputError(
                    "models to compare must be trained as the adapters were, which were launched otherwise: "
                    f"{'; '.join(self._launch)}. Start with as many processes"
                )
            watching = [] if bar is None else [BankProgress(bar, before, note)]
            rows = mixture_dataset(counts, self.candidates, self._args.seed)
            run = run or f"mixtures/{folder.name[:6]}-{'+'.join(counts)}"
            try:
                record = train_expert(
                    self._base(),
                    rows,
                    self._settings(),
                    staging_path(folder),
                    watching,
                    folder.name,
                    run,
                )
            except TrainingFailedError as error:
                record = {"steps": 0, "seconds": 0.0, "failed": f"training on {' + '.join(counts)}: {error}"}
            publish(folder, {"fingerprint": folder.name, "counts": dict(counts), **record})
        if failed := self.record(counts).get("failed"):
            raise TrainingFailedError(failed)
        return folder

    def record(self, counts: Counts) -> dict[str, Any]:
        """What the training used: see `TrainingRecorder`."""
        found: dict[str, Any] = read_json(self.folder(counts) / "training.json")
        return found

    def seconds(self, without: Mapping[str, Any] | None = None) -> float:
        """Time spent training all models here but the one that the final model, of this `training.json`, is a copy of."""
        copied = weights_of(without)
        folders = [path.parent for path in sorted(self.root.glob("[!.]*/training.json"))]
        records = [
            read_json_or_empty(folder / "training.json") for folder in folders if find_incomplete(folder) is None
        ]
        return float(sum(one.get("seconds", 0.0) for one in records if weights_of(one) != copied))
