"""Models really fine-tuned on mixtures: the truth that the surrogates stand in for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from trl import SFTConfig

from m2m_hf.console import Bar
from m2m_hf.core.mixture import Failure, Mixture, Score, row_counts
from m2m_hf.data.loading import Candidate, mixture_dataset
from m2m_hf.errors import InputError
from m2m_hf.merging.methods import AVERAGE, Stack, open_stack
from m2m_hf.objectives.merged import ScorerObjective
from m2m_hf.scoring.scorers import Scorer
from m2m_hf.storage.journal import Keys, cut_short, hidden, read_json, read_made, weights_of, write_json
from m2m_hf.training.fine_tune import (
    Settings,
    TrainingFailedError,
    agreed,
    finished,
    load_trained,
    mixture_steps,
    publish,
    train_expert,
)
from m2m_hf.training.training_callbacks import BankProgress

Counts = Mapping[str, int]


class TrainedMixtures:
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
        return bool(agreed(cut_short(self.folder(counts)) is None))

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
                    hidden(folder),
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
        records = [read_made(folder / "training.json") for folder in folders if cut_short(folder) is None]
        return float(sum(one.get("seconds", 0.0) for one in records if weights_of(one) != copied))


class TrainedObjective(ScorerObjective):
    """The score of the model that was fine-tuned on a mixture: what the surrogates predict.

    Args:
        models: where they are, or are made.
        base: gives the base model to score on, free of any other stack.
        bare: gives it as a stack of the bank's adapters, to score the base model itself.
        scorer, keys, **common: see `ScorerObjective`.
        tokens_per_batch: budget of one forward pass.
    """

    name = "trained"

    def __init__(
        self,
        models: TrainedMixtures,
        base: Callable[[], PreTrainedModel],
        bare: Callable[[], Stack],
        scorer: Scorer,
        keys: Keys,
        *,
        tokens_per_batch: int,
        **common: Any,
    ) -> None:
        super().__init__(scorer, keys, **common)
        self.models = models
        self._base = base
        self._bare = bare
        self._tokens_per_batch = tokens_per_batch

    def key(self, mixture: Mixture, rung: int | None = None) -> str:
        return self.keys.trained(self.models.counts(mixture))

    def __call__(self, mixtures: Sequence[Mixture], rows: Sequence[int] | None = None) -> list[Score | Failure]:
        return [self.score(self.models.counts(mixture)) for mixture in mixtures]

    def score(self, counts: Counts, scorer: Scorer | None = None) -> Score | Failure:
        """The score of the model fine-tuned on so many rows of each candidate, on the validation rows or by another scorer.

        Without rows it is that of the base model.
        """
        scorer = scorer or self._scorer
        if not counts:
            return scorer.score(self._bare(), [{}], self._tokens_per_batch)[0]
        try:
            folder = self.models.train(counts)
        except TrainingFailedError as error:
            return Failure(str(error))
        stack = open_stack(self._base(), {"trained": load_trained(folder)}, AVERAGE, self.models.root)
        try:
            return scorer.score(stack, [{"trained": 1.0}], self._tokens_per_batch)[0]
        finally:
            stack.detach()

    def sealed(self, counts: Counts, scorer: Scorer, write: bool, agree: Callable[[Any], Any]) -> Score:
        """The score on sealed test rows; a model looks at them once, what it scored is kept beside it.

        Args:
            scorer: of the test rows.
            write: whether this process writes.
            agree: gives every process what the main one has.

        Raises:
            InputError: there is no score.
        """
        path = self.models.folder(counts) / "test.json"
        known = agree(read_made(path))
        if scorer.fingerprint not in known:
            score = self.score(counts, scorer)
            if isinstance(score, Failure):
                what = " + ".join(counts) or "the base model"
                raise InputError(f"{what} has no score on the test set of {self.target}: {score.reason}")
            known[scorer.fingerprint] = asdict(score)
            if write:
                write_json(path, known)
        one = known[scorer.fingerprint]
        return Score(one["value"], one["stderr"], tuple(one["values"]), tuple(one["logprobs"]))
