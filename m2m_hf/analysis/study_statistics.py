"""Statistics of a correlation study, from standings alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from m2m_hf.analysis.fidelity import LARGER, Agreement, Rows, agreement
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Score
from m2m_hf.core.trial import Standing


def pair(found: tuple[float, float | None]) -> dict[str, float | None]:
    """A value with its standard error, as JSON shows it."""
    return {"value": found[0], "stderr": found[1]}


def training_noise(merged: Sequence[Standing], true: Sequence[Standing]) -> float | None:
    """How far two trainings on the same rows in another order lie apart: the standard deviation of their scores' difference.

    Of a single candidate the merged model is its adapter, which was trained on the same rows as the model fine-tuned on
    that candidate. None where no single was fine-tuned.
    """
    apart = [
        one.score.value - other.score.value
        for one, other in zip(merged, true, strict=False)
        if len(one.mixture) == 1 and one.score and other.score
    ]
    return float(np.sqrt(np.mean(np.square(apart)))) if apart else None


def resilience(
    base: Standing, surrogate: Sequence[Standing], true: Sequence[Standing], seed: int = 0
) -> dict[str, Any]:
    """How far the surrogate's and the trained models fall below the base model on mixtures that hurt.

    Mixtures that hurt are picked on one half of the rows and measured on the other, and the other way round, or they would be
    picked for their bad luck too. By measure (`score`, and `logprob` where there is one): `hurt`, mixtures whose trained model
    lies below the base on all rows, and `noticed`, those of them that do by the surrogate too; and over the halves the mean
    change of both, and how much less the surrogate falls (`shielded`) with its standard error over the rows. The latter three are
    missing where no mixture hurts on a half, or there are no values by row.
    """
    kept = [(one, other) for one, other in zip(surrogate, true, strict=True) if one.score]
    shown: dict[str, Any] = {}
    for measure in ("score", *(["logprob"] if has_logprobs([base, *surrogate, *true]) else [])):
        rows = by_rows([one for one, _ in kept], [one for _, one in kept], measure)
        level = [one.trained[0] for one in by_rows([base], [base], measure)]
        above = [
            (one.weight, one.surrogate - own, one.trained - own) for one, own in zip(rows, level, strict=True)
        ]  # of every target its weight, and what mixtures score above the base, row by row
        means = [sum(weight * side.mean(1) for weight, *sides in above for side in [sides[k]]) for k in (0, 1)]
        hurt = means[1] < 0
        shown[measure] = {
            "mixtures": len(kept), "hurt": int(hurt.sum()), "noticed": int((means[0][hurt] < 0).sum()),
            "surrogate": None, "trained": None, "shielded": None,
        }  # fmt: skip
        if any(one.shape[1] < 4 for _, one, _ in above):
            continue
        draw = np.random.default_rng(seed)
        orders = [draw.permutation(one.shape[1]) for _, one, _ in above]
        found = []
        for first in (True, False):
            picked = measured = 0.0
            variance = 0.0
            halves = [np.array_split(order, 2)[:: 1 if first else -1] for order in orders]
            picked = (
                sum(w * trained[:, half[0]].mean(1) for (w, _, trained), half in zip(above, halves, strict=True)) < 0
            )
            if not picked.any():
                continue
            changes = []
            for (weight, predicted, trained), (_, half) in zip(above, halves, strict=True):
                sides = [side[picked][:, half].mean(0) for side in (predicted, trained)]
                changes.append([weight * side.mean() for side in sides])
                variance += float((weight * (sides[0] - sides[1])).var(ddof=1) / len(half))
            measured = np.sum(changes, 0)
            found.append((*measured, variance))
        if found:
            fell = np.mean(found, 0)
            shown[measure] |= {
                "surrogate": float(fell[0]),
                "trained": float(fell[1]),
                "shielded": pair((float(fell[0] - fell[1]), float(np.sqrt(fell[2] / len(found))))),
            }
    return shown


def figures(standing: Standing) -> dict[str, Any]:
    """A standing as `fidelity.json` shows it."""
    score = standing.score
    shown: dict[str, Any] = {
        "score": score.value if score else None,
        "stderr": score.stderr if score else None,
        "logprob": standing.mean_logprob / sum(standing.weights.values()) if has_logprobs([standing]) else None,
    }
    if len(standing.trials) > 1:
        shown["targets"] = {name: trial.score.value if trial.score else None for name, trial in standing.trials.items()}
    return shown


def has_logprobs(standings: Sequence[Standing]) -> bool:
    """Whether all scores hold the log-probability of the right answers, and as more than the score itself in another unit."""
    scores = [trial.score for one in standings for trial in one.trials.values()]
    return all(score and score.logprobs for score in scores) and not all(
        proportional(score) for score in scores if score
    )


def proportional(score: Score) -> bool:
    """Whether the values by row are the log-probabilities, but for a positive factor: see `LossScorer`."""
    values, logprobs = np.array(score.values), np.array(score.logprobs)
    if len(values) != len(logprobs) or values.sum() * logprobs.sum() <= 0:
        return False
    return np.allclose(values * logprobs.sum(), logprobs * values.sum(), rtol=1e-3)


def by_rows(surrogate: Sequence[Standing], true: Sequence[Standing], measure: str) -> list[Rows]:
    """What mixtures scored, row by row, of every target."""
    weights = true[0].weights
    found = []
    for target, weight in weights.items():
        sides = []
        for standings in (surrogate, true):
            scores = [one.trials[target].score for one in standings]
            values = [
                (score.logprobs if measure == "logprob" else score.values or (score.value,))
                for score in scores
                if score
            ]
            sides.append(np.array(values, dtype=float))
        found.append(Rows(sides[0], sides[1], weight / sum(weights.values())))
    return found


def compare(
    mixtures: Sequence[Mixture], surrogate: Sequence[Standing], true: Sequence[Standing], complete: bool
) -> dict[str, Agreement]:
    """Agreement by measure, over all mixtures and over those of two or more candidates; of several targets also each alone.

    Mixtures that the surrogate could not score are left out, and so are comparisons of fewer than three.

    Args:
        complete: whether `mixtures` are all that there are.
    """
    kept = [number for number in range(len(mixtures)) if surrogate[number].score is not None]
    parts = {"": kept, LARGER: [number for number in kept if len(mixtures[number]) > 1]}
    compared = {}
    for suffix, numbers in parts.items():
        if len(numbers) < 3:
            continue
        chosen = [mixtures[number] for number in numbers]
        ours, theirs = [surrogate[number] for number in numbers], [true[number] for number in numbers]
        compared["score" + suffix] = agreement(chosen, by_rows(ours, theirs, "score"), complete)
        if has_logprobs([*ours, *theirs]):
            compared["logprob" + suffix] = agreement(chosen, by_rows(ours, theirs, "logprob"), complete)
        if len(true[0].weights) > 1:
            for target, rows in zip(true[0].weights, by_rows(ours, theirs, "score"), strict=True):
                compared[f"score of {target}{suffix}"] = agreement(chosen, [replace(rows, weight=1.0)], complete)
    return compared
