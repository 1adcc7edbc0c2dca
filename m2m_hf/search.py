"""The search loop: a strategy proposes, the journal or the objective answers, and the best mixture is chosen."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .journal import Journal
from .mixture import BASE, Mixture, Score, SearchSpace, Trial
from .objectives import Objective
from .strategies import Strategy


@dataclass(frozen=True)
class SearchResult:
    """What a search found: every trial by mixture, the base model's among them, and the chosen one."""

    trials: dict[Mixture, Trial]
    best: Trial
    measured: int

    @property
    def base(self) -> Trial:
        return self.trials[BASE]

    def ranking(self) -> list[Trial]:
        """The complete trials of proper mixtures, best first (by score; then the smaller mixture; then by name)."""
        complete = [trial for trial in self.trials.values() if trial.score and trial.mixture.items]
        return sorted(complete, key=lambda trial: (-score_of(trial).value, len(trial.mixture), trial.mixture.items))


def score_of(trial: Trial) -> Score:
    """The score of a trial that is known to be complete."""
    assert trial.score is not None
    return trial.score


def choose(trials: list[Trial], costs: Mapping[str, float], one_standard_error: bool) -> Trial:
    """The best trial; among tied ones the smallest mixture, then the likeliest right answers, then the cheapest.

    Tied means the same score, or with `one_standard_error` within the best one's standard error of it (the one-standard-
    error rule of Breiman et al., Classification and Regression Trees, 1984).
    """
    top = max(trials, key=lambda trial: score_of(trial).value)
    slack = score_of(top).stderr if one_standard_error else 0.0
    tied = [trial for trial in trials if score_of(trial).value >= score_of(top).value - slack]
    return min(
        tied,
        key=lambda trial: (
            len(trial.mixture),
            -score_of(trial).value,
            -score_of(trial).mean_logprob,
            sum(costs[name] for name in trial.mixture.names),
            trial.mixture.items,
        ),
    )


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
    return SearchResult(trials, choose(complete, costs, one_standard_error), measured)


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
