"""`FinishedRun`: one finished run, typed and read-only. Table, page, cards, `m2m compare` and `m2m status` are made from it."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from m2m_hf.analysis.relations import Relations
from m2m_hf.analysis.selection_bias import SelectionBias
from m2m_hf.analysis.shapley import ShapleyValues
from m2m_hf.analysis.study_report import StudyReport, Verification
from m2m_hf.config.checks import check_name
from m2m_hf.core.jsonable import OPTIONAL, Measurement, from_json, json_name, to_json
from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.objective import TargetInfo, race_order
from m2m_hf.core.score import AnswerPair, Score, mean_over_targets
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Reference, Standing, Trial
from m2m_hf.errors import InputError, first_line
from m2m_hf.search.result import score_of
from m2m_hf.storage.files import read_json, read_json_or_empty
from m2m_hf.storage.journal import Journal
from m2m_hf.storage.judgements import Judged
from m2m_hf.storage.keys import Keys
from m2m_hf.storage.records import Drift
from m2m_hf.storage.run_folder import RunFolder, read_config


@dataclass(frozen=True)
class MixtureScore:
    """A mixture and its score, the mean over the targets; with `targets` by target, where there are several."""

    mixture: Mixture
    score: float
    stderr: float | None
    targets: Mapping[str, float] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class RunWarning:
    """What a user should know before believing the result."""

    code: str
    text: str


@dataclass(frozen=True)
class FinishedTarget:
    """A target. `short` counts the mixtures that fall below the base model by more than `min_delta`.

    `fingerprints` are of the base model (`base`) and of rows, scorer and metric (`scorer`): the journal's lines have these.
    `judged` is what a judge has cost and said so far.
    """

    metric: str
    scorer: str
    weight: float
    min_delta: float | None
    short: int
    validation_rows: int
    test_rows: int
    fingerprints: Mapping[str, str]
    judged: Judged | None = field(default=None, metadata=OPTIONAL)

    @property
    def label(self) -> str:
        """The metric's name."""
        return self.metric or "the task's metric"


@dataclass(frozen=True)
class FinalScore:
    """A score of the final or the base model; `over_base` is the gain on the same rows."""

    score: float
    stderr: float | None
    over_base: Measurement | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class FinalModel:
    """The model fine-tuned on the chosen mixture; `scores`: target -> `base`, `final` -> `validation`, `test`.

    `answers`: target -> the rows that gained and lost most over the base model, where the scorer keeps answers.
    """

    validation: float | None
    test: float | None
    scores: Mapping[str, Mapping[str, Mapping[str, FinalScore]]]
    steps: int
    tokens: int
    loss: float
    answers: Mapping[str, tuple[AnswerPair, ...]] = field(default_factory=dict, metadata=OPTIONAL)


@dataclass(frozen=True)
class Counts:
    """Of the search."""

    candidates: int
    trials: int
    pruned: int
    failed: int


@dataclass(frozen=True)
class Costs:
    """What was spent."""

    train_seconds: float
    search_seconds: float
    final_seconds: float | None
    compare_seconds: float
    example_evaluations: int
    adapter_steps: int


@dataclass(frozen=True)
class Training:
    """`adapters/<candidate>/training.json`: how a candidate's expert was trained, or why that failed.

    `stale` says what became of the candidate's rows since.
    """

    fingerprint: str
    data: str
    rows: int
    steps: int
    seconds: float
    uniform: Mapping[str, Any]
    failed: str | None = None
    stale: Drift | None = None
    unknown: tuple[str, ...] = ()
    loss_curve: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, as its files tell it; nothing is loaded or measured.

    ```python
    from m2m_hf import FinishedRun

    run = FinishedRun.from_pretrained("runs/science")  # or "org/name", as m2m push wrote it
    print(run.best.mixture, run.best.score)
    print({name: one.value for name, one in run.shapley.shapley.items()} if run.shapley else "too few mixtures")
    print([one.text for one in run.warnings])
    ```

    The first fields are `summary.json`; the last ones are read from the other files.

    Args:
        objective: what scored the mixtures.
        space: the mixtures that may be chosen.
        study: fingerprint that a correlation study of this run has.
        best: the chosen mixture.
        base: the base model.
        all: all candidates together.
        best_single: the best candidate alone.
        singles: every candidate alone, of those with a score.
        top: the best ten that may be chosen.
        selection_bias: how sure the choice is; None where the scorer gives no values by row.
        shapley: what every candidate gains; None where too few mixtures were scored.
        verified: what was fine-tuned before choosing, where anything was.
        final: the final model, where there is one.
        relations: what each candidate teaches about every other, and how alike their experts are.
        config: `config.yaml`.
        training: candidate -> how its expert was trained.
        fidelity: the correlation study of this very run, where there is one.
        standings: mixture -> how it stands, in the order of the journal; empty where there is no journal, as on the Hub.
    """

    objective: str
    candidates: tuple[str, ...]
    space: SearchSpace
    study: str
    best: MixtureScore
    base: MixtureScore | None
    all: MixtureScore | None
    best_single: MixtureScore | None
    singles: Mapping[str, MixtureScore]
    top: tuple[MixtureScore, ...]
    selection_bias: SelectionBias | None = field(metadata={"name": "certainty"})
    shapley: ShapleyValues | None = field(metadata={"name": "worth"})
    warnings: tuple[RunWarning, ...]
    verified: Verification | None
    pareto_front: tuple[MixtureScore, ...]
    targets: Mapping[str, FinishedTarget]
    final: FinalModel | None
    counts: Counts
    costs: Costs
    relations: Relations = field(default_factory=Relations)
    config: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Training] = field(default_factory=dict)
    fidelity: StudyReport | None = None
    standings: Mapping[Mixture, Standing] = field(default_factory=dict)

    @classmethod
    def from_pretrained(cls, folder_or_repo_id: str | Path, revision: str | None = None) -> "FinishedRun":
        """Reads a run folder, or a model repository of the Hub that `m2m push` made.

        Args:
            folder_or_repo_id: a folder, or `org/name`.
            revision: of the repository.

        Raises:
            InputError: there is no finished search in it, or a file is damaged.
        """
        path = Path(folder_or_repo_id).expanduser()
        published = isinstance(folder_or_repo_id, str) and is_repo_id(folder_or_repo_id) and not path.is_dir()
        folder = RunFolder(download(str(folder_or_repo_id), revision) if published else path)
        for path in (folder.config, folder.summary):
            if not path.exists():
                raise InputError(
                    f"{folder_or_repo_id} holds no finished search: it has no {path.name}; expected the output_dir of m2m search "
                    "or m2m select, or org/name as m2m push wrote it"
                )
        if not published:  # the Hub's cache is made of links
            folder.refuse_links()
        config, summary = read_config(folder.config), read_json(folder.summary)
        study = read_json_or_empty(folder.fidelity)
        try:
            for name in summary["candidates"]:
                check_name(name, "candidate")
            training = {name: read_json(folder.adapters / name / "training.json") for name in summary["candidates"]}
            run = from_json(cls, {**summary, "training": training, "config": config})
            own = from_json(StudyReport, study) if study.get("fingerprint") == run.study else None
            standings = read_standings(Journal(folder.trials), run)
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{folder.summary}: written by an incompatible version, or damaged ({error}); m2m search --config writes it again"
            ) from error
        return replace(run, fidelity=own, standings=standings)

    def summary(self) -> dict[str, Any]:
        """`summary.json`; its keys are a contract (ARCHITECTURE.md)."""
        shown: dict[str, Any] = to_json({key: value for key, value in vars(self).items() if key in SUMMARY})
        return {SUMMARY[key]: value for key, value in shown.items()}

    @property
    def usable(self) -> list[str]:
        """The candidates that have an expert: all but those whose training failed."""
        return [name for name in self.candidates if self.training[name].failed is None]

    @property
    def left_out(self) -> list[str]:
        return [name for name in self.candidates if name not in self.best.mixture.names]

    @property
    def task(self) -> str:
        """What the model is trained to do."""
        return str(self.config.get("task", "causal_lm"))

    @property
    def recipe_runner(self) -> str:
        """The command that runs the recipe, but for `--config`."""
        return "trl sft" if self.task == "causal_lm" else "m2m recipe classify"

    @property
    def full(self) -> bool:
        """Whether all parameters are trained, and not adapters."""
        return bool(self.config.get("expert") == "full")

    @property
    def expert(self) -> str:
        """What people call a candidate's expert."""
        return "expert" if self.full else "adapter"

    @property
    def scored_as(self) -> str:
        """What tables call the model that stands for a mixture: `merged`, or `trained` where it was fine-tuned on it."""
        return "trained" if self.objective == "trained" else "merged"

    @property
    def metric(self) -> str:
        """What is plotted: the only target's metric, or the mean of several."""
        metrics = [one.metric or "score" for one in self.targets.values()]
        return metrics[0] if len(metrics) == 1 else "weighted mean"

    @property
    def choice(self) -> Measurement:
        """The score by which the mixture was chosen: that of its fine-tuned model where the choice was verified."""
        for one in self.verified.mixtures if self.verified else ():
            if one.mixture == self.best.mixture and one.trained.score is not None:
                return Measurement(one.trained.score, one.trained.stderr)
        return Measurement(self.best.score, self.best.stderr)

    def final_score(self, model: str, part: str, target: str | None = None) -> Measurement | None:
        """The score of the `final` or the `base` model on `validation` or `test`: one target's, or the mean of all.

        None where there is no final model, or a target has no such part.
        """
        names = [target] if target else list(self.targets)
        found = {name: self.final.scores.get(name, {}).get(model, {}).get(part) for name in names} if self.final else {}
        scores = {name: Score(one.score, one.stderr) for name, one in found.items() if one}
        if not scores or len(scores) < len(names):
            return None
        weights = {name: self.targets[name].weight for name in names}
        return Measurement(*mean_over_targets(scores, weights))

    def on_target(self, shown: MixtureScore, target: str) -> Measurement | None:
        """A mixture's score on one target; without a standard error where there is no journal."""
        if shown.mixture in self.standings:
            score = self.standings[shown.mixture].trials[target].score
            return Measurement(score.value, score.stderr) if score else None
        return Measurement(shown.targets[target]) if shown.targets and target in shown.targets else None

    @cached_property
    def scored(self) -> list[Standing]:
        """The mixtures that were scored on all rows, in the order in which they were; without the base model."""
        return [one for one in self.standings.values() if one.mixture.items and one.complete]

    @cached_property
    def ranked(self) -> list[Standing]:
        """Those that may be chosen, best first, the chosen one before its equals."""
        allowed = [one for one in self.scored if one.mixture in self.space and not one.short]
        return sorted(
            allowed, key=lambda one: (-score_of(one).value, one.mixture != self.best.mixture, len(one.mixture))
        )


OTHER_FILES = ("config", "training", "fidelity", "standings")
SUMMARY: dict[str, str] = {item.name: json_name(item) for item in fields(FinishedRun) if item.name not in OTHER_FILES}


def is_repo_id(text: str) -> bool:
    parts = text.split("/")
    return len(parts) == 2 and all(parts) and not text.startswith((".", "~"))


def download(repo_id: str, revision: str | None) -> Path:
    """The files of a published run that tell about it, without weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    patterns = ["summary.json", "config.yaml", "adapters/*/training.json"]
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        text = first_line(error)
        raise InputError(f"{repo_id!r} is neither a run folder nor a repository that the Hub shows ({text})") from error


def read_standings(journal: Journal, run: FinishedRun) -> dict[Mixture, Standing]:
    """How mixtures stand by the lines of a journal that belong to a run."""
    experts = {name: one.fingerprint for name, one in run.training.items()}
    stale = {name: one.stale.fingerprint for name, one in run.training.items() if one.stale}
    rows = {name: (one.stale or one).rows for name, one in run.training.items()}
    keys = {
        name: Keys(one.fingerprints["base"], one.fingerprints["scorer"], one.validation_rows, experts, rows, stale)
        for name, one in run.targets.items()
    }
    found = by_mixture(own_trials(journal.trials.values(), keys, [run.objective]), run.targets)
    infos = [
        TargetInfo(
            name, one.validation_rows, one.weight, one.min_delta, race_order(keys[name].scorer, one.validation_rows)
        )
        for name, one in run.targets.items()
    ]
    reference = Reference(infos, found.get(BASE, {}), found.get(Mixture.subset(run.usable), {}))
    return {mixture: reference.standing(mixture, trials) for mixture, trials in found.items()}


def own_trials(trials: Iterable[Trial], keys: Mapping[str, Keys], objectives: Collection[str]) -> list[Trial]:
    """The trials of a run as it is now: those whose key is what `keys` make of their mixture for their target."""
    return [one for one in trials if one.objective in objectives and one.target in keys and keys[one.target].own(one)]


def by_mixture(trials: Iterable[Trial], targets: Collection[str]) -> dict[Mixture, dict[str, Trial]]:
    """Mixture -> target -> the trial that saw most rows, of the mixtures that were scored on all targets."""
    found: dict[Mixture, dict[str, Trial]] = {}
    for trial in trials:
        known = found.setdefault(trial.mixture, {})
        if trial.target not in known or known[trial.target].rung <= trial.rung:
            known[trial.target] = trial
    return {mixture: known for mixture, known in found.items() if len(known) == len(targets)}


def mixture_score(standing: Standing | None) -> MixtureScore | None:
    """A standing as `summary.json` shows it; None where it has no score."""
    if standing is None or standing.score is None:
        return None
    targets = {name: trial.score.value for name, trial in standing.trials.items() if trial.score}
    score = standing.score
    return MixtureScore(standing.mixture, score.value, score.stderr, targets if len(targets) > 1 else None)


def mixture_scores(standings: Iterable[Standing]) -> tuple[MixtureScore, ...]:
    return tuple(shown for one in standings if (shown := mixture_score(one)))
