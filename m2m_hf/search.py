"""The search loop: a strategy proposes, the journal or the objective answers, and the best mixture is chosen."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .journal import Journal
from .mixture import BASE, Mixture, Score, SearchSpace, Trial
from .objectives import Objective
from .strategies import Strategy


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        trials: every trial by mixture, the base model's among them.
        best: the chosen one.
        ranking: the complete trials of mixtures that may be chosen, best first, in the order of `preference`.
        measured: how many trials were measured now, rather than read from the journal.
    """

    trials: dict[Mixture, Trial]
    best: Trial
    ranking: list[Trial]
    measured: int

    @property
    def base(self) -> Trial:
        return self.trials[BASE]


def score_of(trial: Trial) -> Score:
    """The score of a trial that is known to be complete."""
    assert trial.score is not None
    return trial.score


def preference(trial: Trial, costs: Mapping[str, float]) -> tuple[Any, ...]:
    """Sorts trials best first: score; of equal ones the smaller mixture, the likelier right answers, the lower cost, the name."""
    score, mixture = score_of(trial), trial.mixture
    cost = sum(costs[name] for name in mixture.names)
    return -score.value, len(mixture), -score.mean_logprob, cost, mixture.items


def choose(ranking: list[Trial], one_standard_error: bool) -> Trial:
    """The first of the ranking; or with `one_standard_error` the smallest mixture within the first one's standard error of it.

    The latter is the one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984.
    """
    if not one_standard_error:
        return ranking[0]
    slack = score_of(ranking[0]).stderr
    tied = [trial for trial in ranking if score_of(trial).value >= score_of(ranking[0]).value - slack]
    return min(tied, key=lambda trial: len(trial.mixture))  # the first of that size, so the best of them


def search(
    strategy: Strategy,
    space: SearchSpace,
    objective: Objective,
    journal: Journal,
    *,
    costs: Mapping[str, float],
    one_standard_error: bool = False,
    write: bool = True,
    on_trial: Callable[[Trial, Trial | None], None] = lambda trial, best: None,
) -> SearchResult:
    """Scores the base model, every single candidate and what the strategy proposes, and chooses.

    A trial that the journal holds is not measured again. One that fails is recorded with its reason and can't be chosen.

    Args:
        write: whether this process writes the journal.
        on_trial: told every trial and the best so far.

    Raises:
        RuntimeError: not one mixture could be scored.
    """
    trials: dict[Mixture, Trial] = {}
    measured = 0
    best: Trial | None = None

    def run(mixture: Mixture) -> Trial:
        nonlocal measured, best
        if mixture in trials:
            return trials[mixture]
        key = objective.key(mixture)
        trial = journal.get(key)
        if trial is None:
            trial = measure(objective, mixture, key)
            journal.append(trial, write=write)
            measured += 1
        trials[mixture] = trial
        if trial.score and mixture in space and (best is None or trial.score.value > score_of(best).value):
            best = trial
        on_trial(trial, best)
        return trial

    run(BASE)
    for name in space.names:
        run(Mixture.subset([name]))
    run(Mixture.subset(space.names))
    try:
        proposed = next(strategy)
        while True:
            proposed = strategy.send([run(mixture) for mixture in proposed])
    except StopIteration:
        pass
    complete = [trial for trial in trials.values() if trial.score and trial.mixture in space]
    if not complete:
        reasons = sorted({trial.reason or "" for trial in trials.values()})
        raise RuntimeError(f"no mixture could be scored: {'; '.join(reasons)}")
    ranking = sorted(complete, key=lambda trial: preference(trial, costs))
    return SearchResult(trials, choose(ranking, one_standard_error), ranking, measured)


def measure(objective: Objective, mixture: Mixture, key: str) -> Trial:
    """One trial, complete or failed. Only numbers that are not finite make a trial fail; other errors are bugs and rise."""
    start = time.monotonic()
    score: Score | None = None
    reason: str | None = None
    try:
        score = objective(mixture)
    except FloatingPointError as error:
        reason = str(error)
    return Trial(
        key=key,
        mixture=mixture,
        objective=objective.name,
        target=objective.target,
        rung=objective.examples,
        state="complete" if score else "failed",
        score=score,
        seconds=time.monotonic() - start,
        reason=reason,
    )
