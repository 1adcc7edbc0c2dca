"""The trained objective: models really fine-tuned on mixtures, which is the truth that the surrogates predict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel
from trl import SFTConfig

from m2m_hf.core.mixture import Mixture, row_counts
from m2m_hf.core.objective import TargetInfo
from m2m_hf.core.score import Failure, Score
from m2m_hf.data.mixture_rows import mixture_dataset
from m2m_hf.data.rows import Candidate
from m2m_hf.errors import InputError
from m2m_hf.merging.dense_stack import Stack, open_stack
from m2m_hf.merging.methods import AVERAGE
from m2m_hf.modeling.devices import broadcast
from m2m_hf.objectives.merged import ScorerObjective
from m2m_hf.scoring.scorers import Scorer
from m2m_hf.storage.files import read_json, read_json_or_empty, write_json
from m2m_hf.storage.keys import Keys
from m2m_hf.storage.records import find_incomplete, weights_of
from m2m_hf.training.bank import tell
from m2m_hf.training.experts import load_trained
from m2m_hf.training.fine_tune import finished, mixture_steps
from m2m_hf.training.jobs import Job, train_jobs
from m2m_hf.training.trainers import Settings

Counts = Mapping[str, int]  # candidate -> how many of its rows a model is trained on


@dataclass
class FineTunedModels:
    """Models fine-tuned on mixtures like the adapters, on the rows of the final fine-tune, in the same order; none twice."""

    root: Path  # OUT/trained, where a model's folder is named by its fingerprint
    candidates: Mapping[str, Candidate]
    fingerprint: Callable[[Counts], str]
    base: Callable[[], PreTrainedModel]  # to train
    args: SFTConfig
    settings: Callable[[], Settings]
    progress: Callable[[str, int], Any]  # `Terminal.progress`
    parallel: int | str = 1  # how many are trained side by side, or `auto`
    launch: Sequence[str] = ()  # how this launch differs from the one that trained the adapters
    worked: bool = field(default=False, init=False)  # True once anything was trained

    def counts(self, mixture: Mixture) -> dict[str, int]:
        """How many rows of each candidate the mixture trains on."""
        return row_counts(mixture, {name: len(self.candidates[name].rows) for name in mixture.names})

    def label(self, counts: Counts) -> str:
        """The candidates, with their rows where not all are taken."""
        whole = all(count == len(self.candidates[name].rows) for name, count in counts.items())
        return " + ".join(counts if whole else (f"{name} ({count:,} rows)" for name, count in counts.items()))

    def folder(self, counts: Counts) -> Path:
        return self.root / self.fingerprint(counts)

    def steps(self, counts: Counts) -> int:
        """How many optimizer steps training takes."""
        return mixture_steps(self.args, self.candidates, counts)

    def train_all(self, wanted: Sequence[Counts], title: str = "fine-tuning mixtures", run: str = "") -> None:
        """Trains the models that are missing (collective). Trackers call a single one `run`."""
        folders = {self.folder(counts): counts for counts in wanted if counts}
        missing = {folder: counts for folder, counts in folders.items() if not finished(folder, folder.name)}
        if not missing:
            return
        if self.launch:  # another number of processes has another batch size
            raise InputError(
                f"models fine-tuned on mixtures must be launched as the adapters were, got {'; '.join(self.launch)}: start as "
                "many processes"
            )
        self.worked, jobs = True, []
        for folder, counts in missing.items():
            name, rows = self.label(counts), mixture_dataset(counts, self.candidates, self.args.seed)
            tracked = run or f"mixtures/{folder.name[:6]}-{'+'.join(counts)}"
            about, where = {"counts": dict(counts)}, f"training on {name}: "
            steps = self.steps(counts)
            jobs.append(Job(name, folder, rows, self.settings(), folder.name, tracked, steps, about, where))
        with self.progress(title, sum(job.steps for job in jobs)) as bar:
            say, terminal = bar.terminal.say, bar.terminal
            train_jobs(self.base, jobs, self.parallel, bar, say, lambda job, record: tell(job.name, record, terminal))

    def record(self, counts: Counts) -> dict[str, Any]:
        """The model's `training.json`: see `train_expert`."""
        record: dict[str, Any] = read_json(self.folder(counts) / "training.json")
        return record

    def seconds(self, without: Mapping[str, Any] | None = None) -> float:
        """Seconds spent on training all models here, except the one with the weights of the `training.json` `without`."""
        paths = sorted(self.root.glob("[!.]*/training.json"))
        records = [read_json_or_empty(path) for path in paths if find_incomplete(path.parent) is None]
        return float(sum(one.get("seconds", 0.0) for one in records if weights_of(one) != weights_of(without)))


class TrainedObjective(ScorerObjective):
    """The score of the model that is fine-tuned on a mixture.

    Args:
        base: returns the base model, without any stack on it.
        bare: returns it with the experts' stack, to score the base model itself.
    """

    name = "trained"

    def __init__(
        self,
        models: FineTunedModels,
        base: Callable[[], PreTrainedModel],
        bare: Callable[[], Stack],
        scorer: Scorer,
        keys: Keys,
        target: TargetInfo,
        *,
        tokens_per_batch: Callable[[], int],
    ) -> None:
        super().__init__(scorer, keys, target)
        self.models, self._base, self._bare, self._tokens_per_batch = models, base, bare, tokens_per_batch

    def prepare(self, mixtures: Sequence[Mixture]) -> None:
        self.models.train_all([self.models.counts(mixture) for mixture in mixtures])

    def _score(self, mixtures: Sequence[Mixture], rows: Sequence[int] | None) -> list[Score | Failure]:
        self.prepare(mixtures)
        return [self.score(self.models.counts(mixture)) for mixture in mixtures]

    def score(self, counts: Counts, scorer: Scorer | None = None) -> Score | Failure:
        """The score of the model that was fine-tuned on these rows, by default on validation; without any, of the base model."""
        scorer = scorer or self.scorer
        if not counts:
            return scorer.score(self._bare(), [{}], self._tokens_per_batch())[0]
        if failed := self.models.record(counts).get("failed"):
            return Failure(failed)
        stack = open_stack(self._base(), {"trained": load_trained(self.models.folder(counts))}, AVERAGE)
        try:
            return scorer.score(stack, [{"trained": 1.0}], self._tokens_per_batch())[0]
        finally:
            stack.detach()

    def sealed(self, counts: Counts, scorer: Scorer) -> Score:
        """The score on the sealed rows of `scorer`. Every model sees them once; its score is kept beside it."""
        path = self.models.folder(counts) / "test.json"
        scores = broadcast(read_json_or_empty(path))
        if scorer.fingerprint not in scores:
            score = broadcast(self.score(counts, scorer))
            if isinstance(score, Failure):
                model = " + ".join(counts) or "the base model"
                raise InputError(f"{model} has no score on the test set of {self.target.name}: {score.reason}")
            scores[scorer.fingerprint] = asdict(score)
            if PartialState().is_main_process:
                write_json(path, scores)
        known = scores[scorer.fingerprint]
        return Score(known["value"], known["stderr"], tuple(known["values"]), tuple(known["logprobs"]))
