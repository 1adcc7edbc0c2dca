"""What a correlation study found, as `fidelity.json` holds it; and what was fine-tuned to verify a choice. Statistics alone."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from m2m_hf.analysis.fidelity import LARGER, Agreement, Rows, Verdict, agreement, scores_by
from m2m_hf.core.jsonable import OPTIONAL, Measurement
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Score
from m2m_hf.core.trial import Standing


@dataclass(frozen=True)
class Figures:
    """What a mixture scored, the mean over the targets; None where it failed."""

    score: float | None
    stderr: float | None
    logprob: float | None = None
    targets: Mapping[str, float | None] | None = field(default=None, metadata=OPTIONAL)

    @classmethod
    def of(cls, standing: Standing) -> "Figures":
        score = standing.score
        targets = {name: trial.score.value if trial.score else None for name, trial in standing.trials.items()}
        return cls(
            score.value if score else None,
            score.stderr if score else None,
            standing.mean_logprob / sum(standing.weights.values()) if has_logprobs([standing]) else None,
            targets if len(targets) > 1 else None,
        )


@dataclass(frozen=True)
class StudiedMixture:
    """A mixture that was fine-tuned (`trained`), and what the surrogates said of it."""

    mixture: Mixture
    rows: int
    steps: int
    seconds: float
    trained: Figures
    merged: Figures
    ensemble: Figures | None = field(default=None, metadata=OPTIONAL)

    def predicted(self, surrogate: str) -> Figures:
        figures: Figures = getattr(self, surrogate)
        return figures


@dataclass(frozen=True)
class FailedMixture:
    """A mixture that could not be fine-tuned and scored."""

    mixture: Mixture
    reason: str


@dataclass(frozen=True)
class Resilience:
    """How the surrogate sees mixtures that hurt: those whose trained model lies below the base model.

    Args:
        mixtures: how many were compared; `hurt` of them lie below the base on all rows, `noticed` by the surrogate too.
        surrogate: its mean change from the base on these mixtures, and `trained` that of the fine-tuned models. The mixtures are
            picked on one half of the rows and measured on the other, and the other way round, or they would be picked for
            their bad luck too. None where no mixture hurts on a half, or there are no values by row.
        shielded: how much less the surrogate falls, with its standard error over the rows.
    """

    mixtures: int
    hurt: int
    noticed: int
    surrogate: float | None = None
    trained: float | None = None
    shielded: Measurement | None = None


@dataclass(frozen=True)
class BaselineScore:
    """A score, and how much higher it is than the chosen mixture's on the same rows."""

    score: float
    stderr: float | None
    over_chosen: Measurement | None


@dataclass(frozen=True)
class Baseline:
    """What one way of choosing comes to, fine-tuned."""

    mixture: Mixture
    rows: int
    steps: int
    validation: BaselineScore | None
    test: BaselineScore | None


@dataclass(frozen=True)
class StudyReport:
    """A correlation study.

    Args:
        fingerprint: of the run that it belongs to.
        uniform: by what rule mixtures of different size were trained alike.
        all_mixtures: whether these are all mixtures that may be chosen.
        agreement: surrogate -> measure -> how well it predicts.
        verdict: surrogate -> whether it can be trusted here.
        training_noise: by how much two trainings on the same rows differ.
        stale: the candidates whose experts are of other rows than what is fine-tuned.
        similarity: candidate -> cosine with the targets.
        baselines: by the name of the way of choosing.
    """

    fingerprint: str
    uniform: str
    all_mixtures: bool
    mixtures: tuple[StudiedMixture, ...]
    failed: tuple[FailedMixture, ...]
    agreement: Mapping[str, Mapping[str, Agreement]]
    verdict: Mapping[str, Verdict]
    training_noise: float | None
    resilience: Mapping[str, Mapping[str, Resilience]]
    similarity: Mapping[str, float] = field(default_factory=dict)
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    stale: tuple[str, ...] = field(default=(), metadata=OPTIONAL)


@dataclass(frozen=True)
class ExpectedMixture:
    """What fine-tuning on a mixture is expected to give; `trained` is what it has given, where it was done."""

    mixture: Mixture
    surrogate: float
    expected: float
    spread: float
    trained: float | None


@dataclass(frozen=True)
class NextFineTune:
    """The mixture that is best fine-tuned next, and the probability that it scores higher than the chosen one."""

    mixture: Mixture
    probability: float


@dataclass(frozen=True)
class Expectation:
    """How far the chosen mixture may be from the best one; see `beliefs.Beliefs`.

    Args:
        behind: with a probability of 0.5 and of 0.9, the best mixture is better by no more than this.
        training_noise: standard deviation of the score of a training with another seed, as expected.
        within_noise: the probability that the best mixture is better by no more than that.
        next: the mixture to fine-tune next, and the probability that it scores higher; None where all were.
        mixtures: those with the highest expectation, best first.
    """

    behind: Mapping[str, float]
    training_noise: float
    within_noise: float
    next: NextFineTune | None
    mixtures: tuple[ExpectedMixture, ...]


@dataclass(frozen=True)
class Verification:
    """The mixtures that were fine-tuned before choosing (`fine_tunes`); `by_search` is what the search alone would choose."""

    by_search: Mixture
    uniform: str
    mixtures: tuple[StudiedMixture, ...]
    failed: tuple[FailedMixture, ...]
    agreement: Mapping[str, Mapping[str, Agreement]]
    training_noise: float | None
    expectation: Expectation
    baselines: Mapping[str, Baseline] | None


def compare(surrogate: Sequence[Standing], true: Sequence[Standing], complete: bool) -> dict[str, Agreement]:
    """Agreement by measure, over all mixtures and over those of two or more candidates; of several targets also each alone.

    Mixtures that the surrogate could not score are left out, and so are comparisons of fewer than three. `complete` says that
    these are all mixtures that there are.
    """
    compared = {}
    for suffix, fewest in (("", 1), (LARGER, 2)):
        pairs = zip(surrogate, true, strict=True)
        kept = [(one, other) for one, other in pairs if one.score is not None and len(one.mixture) >= fewest]
        if len(kept) < 3:
            continue
        ours, theirs = [one for one, _ in kept], [one for _, one in kept]
        mixtures = [one.mixture for one in ours]
        by_target = by_rows(ours, theirs, "score")
        compared["score" + suffix] = agreement(mixtures, by_target, complete)
        if has_logprobs([*ours, *theirs]):
            compared["logprob" + suffix] = agreement(mixtures, by_rows(ours, theirs, "logprob"), complete)
        if len(by_target) > 1:
            for target, rows in zip(ours[0].weights, by_target, strict=True):
                compared[f"score of {target}{suffix}"] = agreement(mixtures, [replace(rows, weight=1.0)], complete)
    return compared


def by_rows(surrogate: Sequence[Standing], true: Sequence[Standing], measure: str) -> list[Rows]:
    """What mixtures scored, row by row, of every target."""
    weights = true[0].weights
    total = sum(weights.values())
    return [
        Rows(values_of(surrogate, name, measure), values_of(true, name, measure), weight / total)
        for name, weight in weights.items()
    ]


def values_of(standings: Sequence[Standing], target: str, measure: str) -> Any:
    """Of shape (mixtures, rows); a single column where the scorer has no values by row."""
    scores = [score for one in standings if (score := one.trials[target].score)]
    return np.array(
        [score.logprobs if measure == "logprob" else score.values or (score.value,) for score in scores], dtype=float
    )


def has_logprobs(standings: Sequence[Standing]) -> bool:
    """Whether all scores hold the log-probability of the right answers, and as more than the score itself in another unit."""
    scores = [trial.score for one in standings for trial in one.trials.values()]
    known = [score for score in scores if score and score.logprobs]
    return len(known) == len(scores) and not all(map(proportional, known))


def proportional(score: Score) -> bool:
    """Whether the values by row are the log-probabilities, but for a positive factor: see `LossScorer`."""
    values, logprobs = np.array(score.values), np.array(score.logprobs)
    if len(values) != len(logprobs) or values.sum() * logprobs.sum() <= 0:
        return False
    return np.allclose(values * logprobs.sum(), logprobs * values.sum(), rtol=1e-3)


def training_noise(merged: Sequence[Standing], true: Sequence[Standing], stale: Collection[str] = ()) -> float | None:
    """How far two trainings on the same rows in another order lie apart: the standard deviation of their scores' difference.

    Of a single candidate the merged model is its adapter, which was trained on the same rows as the model fine-tuned on
    that candidate, unless it is `stale`. None where no single was fine-tuned.
    """
    apart = [
        one.score.value - other.score.value
        for one, other in zip(merged, true, strict=True)
        if len(one.mixture) == 1 and one.mixture.names[0] not in stale and one.score and other.score
    ]
    return float(np.sqrt(np.mean(np.square(apart)))) if apart else None


def resilience(base: Standing, surrogate: Sequence[Standing], true: Sequence[Standing]) -> dict[str, Resilience]:
    """By measure, `score` and `logprob` where there is one."""
    kept = [(one, other) for one, other in zip(surrogate, true, strict=True) if one.score]
    found = {}
    for measure in ("score", *(["logprob"] if has_logprobs([base, *surrogate, *true]) else [])):
        rows = by_rows([one for one, _ in kept], [one for _, one in kept], measure)
        levels = [values_of([base], name, measure)[0] for name in base.weights]
        above = [
            replace(one, surrogate=one.surrogate - level, trained=one.trained - level)
            for one, level in zip(rows, levels, strict=True)
        ]
        found[measure] = resilience_of(above)
    return found


def resilience_of(above: Sequence[Rows]) -> Resilience:
    """From what mixtures score above the base model, row by row."""
    predicted, true = scores_by(above)
    hurt = true < 0
    counts = len(hurt), int(hurt.sum()), int((predicted[hurt] < 0).sum())
    if any(one.trained.shape[1] < 4 for one in above):
        return Resilience(*counts)
    draw = np.random.default_rng(0)
    halves = [np.array_split(draw.permutation(one.trained.shape[1]), 2) for one in above]
    first, second = [half[0] for half in halves], [half[1] for half in halves]
    changes = [
        change for picked, measured in ((first, second), (second, first)) if (change := falls(above, picked, measured))
    ]
    if not changes:
        return Resilience(*counts)
    surrogate, trained, variance = np.mean(changes, 0)
    shielded = Measurement(float(surrogate - trained), float(np.sqrt(variance / len(changes))))
    return Resilience(*counts, float(surrogate), float(trained), shielded)


def falls(above: Sequence[Rows], picked: Sequence[Any], measured: Sequence[Any]) -> tuple[float, float, float] | None:
    """(surrogate's mean change, trained's, variance of their difference) on some rows, of mixtures that hurt on others."""
    hurt = sum(one.weight * one.trained[:, rows].mean(1) for one, rows in zip(above, picked, strict=True)) < 0
    if not hurt.any():
        return None
    surrogate = trained = variance = 0.0
    for one, rows in zip(above, measured, strict=True):
        predicted, true = (side[hurt][:, rows].mean(0) for side in (one.surrogate, one.trained))
        surrogate += one.weight * float(predicted.mean())
        trained += one.weight * float(true.mean())
        variance += float((one.weight * (predicted - true)).var(ddof=1) / len(rows))
    return surrogate, trained, variance
