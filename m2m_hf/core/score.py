"""What a model scores on a target, with the value of every example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Score:
    """What an objective says of a mixture on one target. Higher is better, always.

    Args:
        value: the target's metric over all examples.
        stderr: its standard error over the examples, taken as a random sample (0 for a single example); None where the scorer
            gives no more than a number.
        values: one number per example in the order of the target's rows; their mean is `value`. Empty for metrics of a
            whole corpus.
        logprobs: per example, the log-probability of the right answer (natural logarithm, at most 0). Empty where the scorer
            has none.
        gradient: the derivative of the mean log-probability by the weight of every candidate of the mixture, in the order of
            its names. Empty where it was not asked for.
    """

    value: float
    stderr: float | None = None
    values: Sequence[float] = ()
    logprobs: Sequence[float] = ()
    gradient: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Sequence[float], logprobs: Sequence[float] = ()) -> "Score":
        """The mean of the examples' values, with its standard error."""
        return cls(*mean_and_stderr(values), tuple(values), tuple(logprobs))

    @property
    def finite(self) -> bool:
        """Whether all its numbers are."""
        return all(np.isfinite(one).all() for one in (self.value, self.stderr or 0.0, self.values, self.logprobs))

    @cached_property
    def mean_logprob(self) -> float:
        """0 where there are none."""
        return float(np.mean(self.logprobs)) if self.logprobs else 0.0


@dataclass(frozen=True)
class Failure:
    """Why a mixture has no score on a target."""

    reason: str


def mean_over_targets(scores: Mapping[str, Score], weights: Mapping[str, float]) -> tuple[float, float | None]:
    """The weighted mean of targets' scores with its standard error, their examples taken as drawn independently.

    Args:
        scores: target -> score.
        weights: of the targets, not necessarily of sum 1.
    """
    total = sum(weights[target] for target in scores)
    parts = {target: weights[target] / total for target in scores}
    value = sum(parts[target] * score.value for target, score in scores.items())
    errors = [None if score.stderr is None else parts[target] * score.stderr for target, score in scores.items()]
    return value, None if None in errors else sum(error**2 for error in errors if error is not None) ** 0.5


def mean_and_stderr(values: Any) -> tuple[float, float]:
    """Mean and its standard error s/√n with the n−1 estimate of s (0 where n is 1)."""
    array = np.asarray(values, dtype=float)
    n = len(array)
    with np.errstate(invalid="ignore"):  # what is not finite is found and named elsewhere
        return float(array.mean()), float(array.std(ddof=1) / n**0.5) if n > 1 else 0.0


def paired(
    ours: Mapping[str, Score], theirs: Mapping[str, Score], weights: Mapping[str, float], measure: str = "score"
) -> tuple[float, float | None]:
    """(difference, standard error) of two mixtures on the same rows: the weighted mean over the targets.

    Args:
        ours: target -> score.
        theirs: the same of what it is compared with.
        weights: of the targets.
        measure: `score`, or `logprob`: the log-probability of the right answers.

    Returns:
        None as standard error where a target has no values by row.
    """
    total = sum(weights[target] for target in ours)
    value, variance = 0.0, 0.0
    known = True
    for target, one in ours.items():
        other, share = theirs[target], weights[target] / total
        if measure == "logprob":
            mine, yours = one.logprobs, other.logprobs
        else:
            mine, yours = one.values, other.values
            value += share * (one.value - other.value)
        if mine and yours:
            mean, stderr = mean_and_stderr(np.asarray(mine) - np.asarray(yours))
            variance += (share * stderr) ** 2
            if measure == "logprob":
                value += share * mean
        else:
            known = False
    return value, variance**0.5 if known else None
