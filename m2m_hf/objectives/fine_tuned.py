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
    """Models fine-tuned on mixtures like the adapters, in `OUT/trained/<fingerprint>/`; none is trained twice.

    They are trained on the rows of the final fine-tune, in the same order.

    Args:
        folder: `OUT/trained`.
        candidates: by name.
        name: returns a model's fingerprint from the rows of each candidate.
        base: returns the base model to train.
        args: the uniform training arguments.
        settings: returns everything that training takes.
        launch: how this launch differs from the one that trained the adapters.
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
        """How many rows of each candidate the mixture trains on."""
        return row_counts(mixture, {name: len(self.candidates[name].rows) for name in mixture.names})

    def folder(self, counts: Counts) -> Path:
        return self.root / self._name(counts)

    def is_trained(self, counts: Counts) -> bool:
        """True if the model is trained, or its training failed (collective)."""
        return bool(broadcast(find_incomplete(self.folder(counts)) is None))

    def steps(self, counts: Counts) -> int:
        """How many optimizer steps training takes."""
        return mixture_steps(self._args, self.candidates, counts)

    def train(self, counts: Counts, bar: Bar | None = None, before: int = 0, note: str = "", run: str = "") -> Path:
        """The folder of the model; trains it if it is missing.

        Args:
            bar: counts optimizer steps, of which `before` are done; shows `note` behind them.
            run: the name in the trackers (default: from the mixture).

        Raises:
            TrainingFailedError: see `train_expert`.
            InputError: the adapters were trained with another number of processes, hence another batch size.
        """
        folder = self.folder(counts)
        if not finished(folder, folder.name):
            if self._launch:
                raise InputError(
                    f"models to compare must be launched as the adapters were, got {'; '.join(self._launch)}: start as many "
                    "processes"
                )
            callbacks = [] if bar is None else [BankProgress(bar, before, note)]
            rows = mixture_dataset(counts, self.candidates, self._args.seed)
            run = run or f"mixtures/{folder.name[:6]}-{'+'.join(counts)}"
            try:
                record = train_expert(
                    self._base(), rows, self._settings(), staging_path(folder), callbacks, folder.name, run
                )
            except TrainingFailedError as error:
                record = {"steps": 0, "seconds": 0.0, "failed": f"training on {' + '.join(counts)}: {error}"}
            publish(folder, {"fingerprint": folder.name, "counts": dict(counts), **record})
        if failed := self.record(counts).get("failed"):
            raise TrainingFailedError(failed)
        return folder

    def record(self, counts: Counts) -> dict[str, Any]:
        """The model's `training.json`: see `TrainingRecorder`."""
        record: dict[str, Any] = read_json(self.folder(counts) / "training.json")
        return record

    def seconds(self, without: Mapping[str, Any] | None = None) -> float:
        """Seconds spent on training all models here.

        Args:
            without: leave out the model with the weights of this `training.json`.
        """
        paths = sorted(self.root.glob("[!.]*/training.json"))
        records = [read_json_or_empty(path) for path in paths if find_incomplete(path.parent) is None]
        return float(sum(one.get("seconds", 0.0) for one in records if weights_of(one) != weights_of(without)))
