"""Scores on a target, with the value of every row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Score:
    """A mixture's score on one target. Higher is always better.

    Args:
        value: the target's metric over all rows.
        stderr: its standard error, with the rows taken as a random sample (0 for a single row). None if the scorer gives only a
            number.
        values: one number per row, in the order of the target's rows; their mean is `value`. Empty for corpus metrics.
        logprobs: per row, the log-probability of the right answer (natural logarithm, at most 0). Empty if the scorer has none.
        gradient: the derivative of the mean log-probability by the weight of every candidate, in the order of the mixture's
            names. Empty unless it was asked for.
    """

    value: float
    stderr: float | None = None
    values: Sequence[float] = ()
    logprobs: Sequence[float] = ()
    gradient: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Sequence[float], logprobs: Sequence[float] = ()) -> "Score":
        """The mean over the rows, with its standard error."""
        return cls(*mean_and_stderr(values), tuple(values), tuple(logprobs))

    @property
    def finite(self) -> bool:
        """True if all its numbers are finite."""
        parts = self.value, self.stderr or 0.0, self.values, self.logprobs
        return all(np.isfinite(part).all() for part in parts)

    @cached_property
    def mean_logprob(self) -> float:
        """0 if there are no log-probabilities."""
        return float(np.mean(self.logprobs)) if self.logprobs else 0.0


@dataclass(frozen=True)
class AnswerPair:
    """What two models answered to a row (its number, from 1), and what each answer is worth: the `base` and the `final` model."""

    row: int
    prompt: str
    base: str
    final: str
    base_value: float
    final_value: float


@dataclass(frozen=True)
class Failure:
    """Why a mixture has no score on a target."""

    reason: str


def mean_over_targets(scores: Mapping[str, Score], weights: Mapping[str, float]) -> tuple[float, float | None]:
    """The weighted mean of scores on several targets and its standard error; the targets' rows count as independent."""
    total = sum(weights[target] for target in scores)
    shares = {target: weights[target] / total for target in scores}
    value = sum(shares[target] * score.value for target, score in scores.items())
    errors = [None if score.stderr is None else shares[target] * score.stderr for target, score in scores.items()]
    return value, None if None in errors else sum(error**2 for error in errors if error is not None) ** 0.5


def mean_and_stderr(values: Any) -> tuple[float, float]:
    """The mean and its standard error s/√n, with the n−1 estimate of s (0 if n is 1)."""
    array = np.asarray(values, dtype=float)
    n = len(array)
    with np.errstate(invalid="ignore"):  # scorers report values that are not finite
        return float(array.mean()), float(array.std(ddof=1) / n**0.5) if n > 1 else 0.0


def paired(
    ours: Mapping[str, Score], theirs: Mapping[str, Score], weights: Mapping[str, float]
) -> tuple[float, float | None]:
    """(difference, standard error) of two mixtures on the same rows: the weighted mean over the targets.

    The standard error is None if a target has no values by row.
    """
    total = sum(weights[target] for target in ours)
    difference, variance, by_row = 0.0, 0.0, True
    for target, our in ours.items():
        their, share = theirs[target], weights[target] / total
        difference += share * (our.value - their.value)
        if our.values and their.values:
            _, stderr = mean_and_stderr(np.asarray(our.values) - np.asarray(their.values))
            variance += (share * stderr) ** 2
        else:
            by_row = False
    return difference, variance**0.5 if by_row else None
