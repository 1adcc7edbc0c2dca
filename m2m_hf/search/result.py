"""What a search found, and how it chooses."""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.score import Score
from m2m_hf.core.trial import Standing, Trial


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        standings: how every mixture stands, the base model's among them.
        best: the chosen one.
        ranking: the mixtures that may be chosen, best first, in the order of `preference`.
        measured: how many trials were measured now, rather than read from the journal.
        evaluations: examples scored, by now or before, to come to this result.
        seconds: the time that this took.
        ended: by the `strategy` itself or by the `budget`.
    """

    standings: dict[Mixture, Standing]
    best: Standing
    ranking: list[Standing]
    measured: int
    evaluations: int
    seconds: float
    ended: str

    @property
    def base(self) -> Standing:
        return self.standings[BASE]

    @property
    def trials(self) -> list[Trial]:
        """All trials, of every mixture on every target."""
        return [trial for standing in self.standings.values() for trial in standing.trials.values()]

    @property
    def pareto_front(self) -> list[Standing]:
        """The mixtures than which no other is as good on all targets and better on one, best first."""

        complete = [one for one in self.standings.values() if one.complete and one.mixture.items]
        scored = [(tuple(score_of_trial(trial).value for trial in one.trials.values()), one) for one in complete]
        front: list[tuple[tuple[float, ...], Standing]] = []
        # In this order, whatever is as good on all targets and better on one comes before what it beats.
        for values, one in sorted(scored, key=lambda pair: pair[0], reverse=True):
            if not any(other != values and all(map(operator.ge, other, values)) for other, _ in front):
                front.append((values, one))
        return sorted(
            (one for _, one in front), key=lambda one: (-score_of(one).value, len(one.mixture), one.mixture.items)
        )


def score_of_trial(trial: Trial) -> Score:
    """The score of a trial that is known not to have failed."""
    assert trial.score is not None
    return trial.score


def score_of(standing: Standing) -> Score:
    """The score of a mixture that is known to be complete."""
    assert standing.score is not None
    return standing.score


def preference(standing: Standing, costs: Mapping[str, float]) -> tuple[Any, ...]:
    """Sorts best first: score; of equal ones the smaller mixture, the likelier right answers, the lower cost, the name."""
    mixture = standing.mixture
    cost = sum(costs[name] for name in mixture.names)
    return -score_of(standing).value, len(mixture), -standing.mean_logprob, cost, mixture.items


def choose(ranking: list[Standing], one_standard_error: bool) -> Standing:
    """The first of the ranking; or with `one_standard_error` the smallest mixture within the first one's standard error of it.

    The latter is the one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984.
    """
    if not one_standard_error:
        return ranking[0]
    slack = score_of(ranking[0]).stderr or 0.0
    tied = [standing for standing in ranking if score_of(standing).value >= score_of(ranking[0]).value - slack]
    return min(tied, key=lambda standing: len(standing.mixture))  # the first of that size, so the best of them


@dataclass(frozen=True)
class Budget:
    """When a search ends at the latest. What the journal answers counts too, so that a resumed search ends where it would have.

    Args:
        max_trials: mixtures looked at, the base model, every single candidate and all together among them.
        max_example_evaluations: examples scored, over all mixtures and targets.
        max_seconds: time spent scoring.
    """

    max_trials: float = math.inf
    max_example_evaluations: float = math.inf
    max_seconds: float = math.inf


UNLIMITED = Budget()


class BudgetSpent(Exception):  # noqa: N818 - nothing went wrong
    """The budget does not allow what was asked for."""


def default_budget(candidates: int) -> int:
    """How many mixtures a strategy that does not end by itself may propose where no budget is given."""
    return 12 * candidates + 100
