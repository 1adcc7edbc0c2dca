"""What a search finds, how it chooses, and what ends it."""

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.score import Score
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Standing, Trial


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        standings: how every mixture stands, the base model included.
        best: the chosen mixture.
        ranking: the mixtures that may be chosen, best first; see `preference`.
        measured: how many trials were measured now rather than read from the journal.
        evaluations: examples scored for this result, now or before.
        seconds: the time that took.
        ended: `strategy`, `budget` or `callback`: what ended the search.
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
        """The mixtures that no other mixture beats, best first.

        A mixture is beaten by one that is as good on all targets and better on one.
        """
        scores = {
            mixture: tuple(score_of(trial).value for trial in standing.trials.values())
            for mixture, standing in self.standings.items()
            if standing.complete and mixture.items
        }
        front: dict[Mixture, tuple[float, ...]] = {}
        for mixture in sorted(scores, key=lambda one: scores[one], reverse=True):  # after every mixture that beats it
            ours = scores[mixture]
            if not any(theirs != ours and all(map(operator.ge, theirs, ours)) for theirs in front.values()):
                front[mixture] = ours
        standings = [self.standings[mixture] for mixture in front]
        return sorted(standings, key=lambda one: (-score_of(one).value, len(one.mixture), one.mixture.items))


def score_of(scored: Standing | Trial) -> Score:
    """The score of a mixture, or of a trial, that did not fail."""
    assert scored.score is not None
    return scored.score


def best_scored(standings: Iterable[Standing]) -> Standing | None:
    """The one with the highest score; of equal ones, the one with the likelier right answers, or else the first."""
    scored = [one for one in standings if one.score]
    return max(scored, key=lambda one: (score_of(one).value, one.mean_logprob), default=None)


def preference(standing: Standing, space: SearchSpace) -> tuple[Any, ...]:
    """Sort key, best first: the score, then the smaller mixture, the likelier right answers, the lower cost, the name."""
    mixture = standing.mixture
    cost = sum(map(space.cost_of, mixture.names))
    return -score_of(standing).value, len(mixture), -standing.mean_logprob, cost, mixture.items


def choose(ranking: list[Standing], one_standard_error: bool) -> Standing:
    """The first of the ranking; with `one_standard_error`, the smallest mixture within one standard error of it.

    This is the one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984.
    """
    if not one_standard_error:
        return ranking[0]
    best = score_of(ranking[0])
    tied = [standing for standing in ranking if score_of(standing).value >= best.value - (best.stderr or 0.0)]
    return min(tied, key=lambda standing: len(standing.mixture))  # the first of that size, so the best of them


@dataclass(frozen=True)
class Budget:
    """Limits of a search. Trials from the journal count too, so that a resumed search ends where it would have.

    Args:
        max_trials: mixtures, including the base model, every single candidate and all together.
        max_example_evaluations: examples scored, over all mixtures and targets.
        max_seconds: time spent scoring.
    """

    max_trials: float = math.inf
    max_example_evaluations: float = math.inf
    max_seconds: float = math.inf


UNLIMITED = Budget()


class SearchEnded(Exception):  # noqa: N818 - not an error
    """Raised where a search must not measure any more: `by` says whether a `budget` or a `callback` ended it."""

    def __init__(self, by: str) -> None:
        super().__init__(by)
        self.by = by


def default_budget(candidates: int) -> int:
    """How many mixtures a strategy may propose if it does not end by itself and no budget is given."""
    return 12 * candidates + 100
