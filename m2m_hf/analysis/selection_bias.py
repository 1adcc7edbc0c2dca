"""Selection bias (the winner's curse), paired differences, and how many rows it would take to tell mixtures apart.

The best of many mixtures scores well partly by chance, so its own score is too high. To correct it, the choice is made again on
resampled rows and scored on the rows left out (BBC-CV: Tsamardinos, Greasidou and Borboudakis,
Bootstrapping the out-of-sample predictions for efficient and accurate cross-validation, 2018).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

from m2m_hf.core.trial import Standing
from m2m_hf.search.result import score_of

RESAMPLES = 1000
CONTENDERS = 256  # mixtures, the best ones, among which is chosen again
RISK, POWER = 0.05, 0.8  # of paired tests
NUMBERS = 1 << 25  # in one temporary array


def told_apart(better: Standing, worse: Standing) -> bool:
    """True if one mixture is better than another by a one-sided paired test at 5 %."""
    gain = better.over(worse)
    return gain.value > float(ndtri(1 - RISK)) * (gain.stderr or 0.0)


@dataclass(frozen=True)
class Difference:
    """How much better the chosen mixture is than another, with a 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SelectionBias:
    """By how much the best score of many is too high, and how sure the choice is.

    Args:
        corrected: the chosen mixture's score, corrected for selection bias.
        optimism: by how much its own score is too high.
        probability_best: that it truly is the best of those that may be chosen, see `probability_best`; None where the scores
            of too few others are known.
        differences: name (`base`, `all`, `best_single`, `second`) -> how much better the chosen one is; corrected for selection
            bias except against `second`.
        rows_needed: how many times the rows it would take to tell the chosen mixture from the second (a paired test at 5 % with
            a power of 80 %); None where both score the same.
        tied: mixtures that a paired test at 5 % cannot tell to be worse than the chosen one, itself among them.
    """

    corrected: float
    optimism: float
    probability_best: float | None
    differences: Mapping[str, Difference]
    rows_needed: float | None
    tied: int


def selection_bias(
    ranking: Sequence[Standing],
    best: Standing,
    against: Mapping[str, Standing],
    others: Sequence[float] | None = (),
    seed: int = 0,
) -> SelectionBias | None:
    """How sure the choice is by its rows; None where a scorer gives no values by row.

    Mixtures that left a race are not chosen again on resampled rows. They had little chance to win, so the correction misses
    little by that.

    Args:
        ranking: the mixtures that may be chosen, best first, scored on all rows.
        others: estimated scores of mixtures that may be chosen and are not in `ranking`, such as those that left a race; None
            where most are not known and differ from the known ones.
    """
    contenders = [best, *(one for one in ranking[:CONTENDERS] if one.mixture != best.mixture)]
    count, total = len(contenders), sum(best.weights.values())
    drawn, left = np.zeros((2, RESAMPLES, count))  # scores on the rows drawn, and on those left out
    covariance = np.zeros((count, count))  # of the scores less their mean, over the rows
    draw = np.random.default_rng(seed)
    for target, weight in best.weights.items():
        values = [score.values for one in contenders if (score := one.trials[target].score)]
        if not all(values) or len(values[0]) < 2 or len(values) < count:
            return None
        table, share = np.array(values), weight / total
        size = table.shape[1]
        covariance += share**2 * np.cov(table - table.mean(0)).reshape(covariance.shape) / size
        for start in range(0, RESAMPLES, step := max(1, NUMBERS // size)):
            block = slice(start, min(start + step, RESAMPLES))
            counts = draw.multinomial(size, np.full(size, 1 / size), size=block.stop - block.start)
            drawn[block] += share * (counts @ table.T) / size
            out = (counts == 0).astype(float)
            left[block] += share * (out @ table.T) / np.maximum(out.sum(1, keepdims=True), 1)
    winners = np.isclose(drawn, drawn.max(1, keepdims=True), rtol=0, atol=1e-12)
    winners = winners / winners.sum(1, keepdims=True)
    scores = np.array([score_of(one).value for one in contenders])
    optimism = max(0.0, float(scores[0] - (winners * left).sum(1).mean()))
    differences = {
        name: difference(best, other, optimism)
        for name, other in against.items()
        if other.score is not None and other.mixture != best.mixture
    }
    second = next((one for one in ranking if one.mixture != best.mixture), None)
    if second is not None:
        differences["second"] = difference(best, second, 0.0)
    probability = None
    if others is not None:
        every = np.array([*(score_of(one).value for one in ranking), *others])
        probability = probability_best(scores, covariance, every, seed)
    return SelectionBias(
        float(scores[0]) - optimism,
        optimism,
        probability,
        differences,
        None if second is None else rows_needed(best, second),
        sum(not told_apart(best, one) for one in ranking),
    )


def difference(best: Standing, other: Standing, optimism: float) -> Difference:
    """How much better the chosen mixture is than another, less by how much its score is too high."""
    gain = best.over(other)
    value, reach = gain.value - optimism, float(ndtri(0.975)) * (gain.stderr or 0.0)
    return Difference(value, value - reach, value + reach)


def rows_needed(best: Standing, second: Standing) -> float | None:
    """See `SelectionBias`."""
    gain = best.over(second)
    if gain.value <= 0 or not gain.stderr:
        return None
    return float(((ndtri(1 - RISK / 2) + ndtri(POWER)) * gain.stderr / gain.value) ** 2)


def probability_best(scores: Any, covariance: Any, every: Any, seed: int = 0) -> float:
    """The probability that the first of some mixtures is truly the best one.

    Counting how often it comes first on resampled rows would be too sure, since its score is high by chance too. So the true
    scores are taken as drawn from a normal distribution, whose spread is estimated from the scores of all mixtures (empirical
    Bayes; Efron and Morris, 1975). The result is the share of draws from the posterior in which it is the highest.

    `covariance` is of the errors of these mixtures' `scores`, less what all have in common; `every` are the scores of all
    mixtures, these among them, from which mean and spread are taken.
    """
    count = len(scores)
    if len(every) == 1:
        return 1.0
    noise = covariance.trace() / max(1, count - 1)
    spread = float(every.var(ddof=1) - noise)
    if spread <= 1e-12:
        return 1 / len(every)
    gain = spread * np.linalg.inv(spread * np.eye(count) + covariance)
    mean = every.mean() + gain @ (scores - every.mean())
    posterior = spread * (np.eye(count) - gain)
    draws = np.random.default_rng(seed).multivariate_normal(mean, posterior, size=4000, method="eigh")
    return float((draws.argmax(1) == 0).mean())
