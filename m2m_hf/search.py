"""The search loop: a strategy proposes, the journal or the objectives answer, and the best mixture is chosen."""

import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import InputError
from .journal import Journal
from .mixture import BASE, Mixture, Score, SearchSpace, Standing, Trial
from .objectives import Objective
from .strategies import Strategy


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        standings: how every mixture stands, the base model's among them.
        best: the chosen one.
        ranking: the mixtures that may be chosen, best first, in the order of `preference`.
        measured: how many trials were measured now, rather than read from the journal.
    """

    standings: dict[Mixture, Standing]
    best: Standing
    ranking: list[Standing]
    measured: int

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

        complete = [one for one in self.standings.values() if one.score and one.mixture.items]
        scored = [(tuple(score_of_trial(trial) for trial in one.trials.values()), one) for one in complete]
        front: list[tuple[tuple[float, ...], Standing]] = []
        # In this order, whatever is as good on all targets and better on one comes before what it beats.
        for values, one in sorted(scored, key=lambda pair: pair[0], reverse=True):
            if not any(other != values and all(map(operator.ge, other, values)) for other, _ in front):
                front.append((values, one))
        return sorted(
            (one for _, one in front), key=lambda one: (-score_of(one).value, len(one.mixture), one.mixture.items)
        )


def score_of_trial(trial: Trial) -> float:
    """The score of a trial that is known to be complete."""
    assert trial.score is not None
    return trial.score.value


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


class Search:
    """The state of one search: what is known of every mixture, and how to come to know more.

    Args:
        objectives: one for every target.
        journal: where trials are remembered.
        write: whether this process writes the journal.
        on_standing: told how every mixture stands and the best so far.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        space: SearchSpace,
        journal: Journal,
        write: bool,
        on_standing: Callable[[Standing, Standing | None], None],
    ) -> None:
        self.objectives = objectives
        self.space = space
        self.journal = journal
        self.standings: dict[Mixture, Standing] = {}
        self.measured = 0
        self.best: Standing | None = None
        self._write = write
        self._on_standing = on_standing

    def know(self, mixtures: Sequence[Mixture]) -> list[Standing]:
        """How these mixtures stand; what the journal does not hold is measured, several mixtures together where that pays."""
        waiting: list[Mixture] = []
        for mixture in dict.fromkeys(mixtures):
            if mixture in self.standings:
                continue
            missing = [one for one in self.objectives if self.journal.get(one.key(mixture)) is None]
            if not missing:
                self._settle(mixture)
                continue
            waiting.append(mixture)
            if len(waiting) >= max(one.at_once for one in missing):
                self._measure(waiting)
                waiting = []
        self._measure(waiting)
        return [self.standings[mixture] for mixture in mixtures]

    def _measure(self, mixtures: Sequence[Mixture]) -> None:
        for objective in self.objectives:
            missing = [mixture for mixture in mixtures if self.journal.get(objective.key(mixture)) is None]
            while missing:
                group = missing[: objective.at_once]
                missing = missing[len(group) :]
                for trial in measure(objective, group):
                    self.journal.append(trial, write=self._write)
                    self.measured += 1
        for mixture in mixtures:
            self._settle(mixture)

    def _settle(self, mixture: Mixture) -> None:
        """Puts a mixture's trials together."""
        trials = {one.target: known(self.journal, one.key(mixture)) for one in self.objectives}
        weights = {one.target: one.weight for one in self.objectives}
        short = []
        for objective in self.objectives:
            mine, base = trials[objective.target].score, None
            if BASE in self.standings:
                base = self.standings[BASE].trials[objective.target].score
            if mine and base and objective.min_delta is not None and mine.value < base.value - objective.min_delta:
                short.append(objective.target)
        standing = Standing(mixture, trials, weights, tuple(short))
        self.standings[mixture] = standing
        better = self.best is None or (standing.score and standing.score.value > score_of(self.best).value)
        if better and standing.may_be_chosen and mixture in self.space:
            self.best = standing
        self._on_standing(standing, self.best)


def known(journal: Journal, key: str) -> Trial:
    """The trial with this key, which is known to be there."""
    trial = journal.get(key)
    assert trial is not None
    return trial


def search(
    strategy: Strategy,
    space: SearchSpace,
    objectives: Sequence[Objective],
    journal: Journal,
    *,
    costs: Mapping[str, float],
    one_standard_error: bool = False,
    write: bool = True,
    on_standing: Callable[[Standing, Standing | None], None] = lambda standing, best: None,
) -> SearchResult:
    """Scores the base model, every single candidate, all together, and what the strategy proposes; and chooses.

    A trial that the journal holds is not measured again. One that fails is recorded with its reason and can't be chosen. A
    mixture that makes a target worse than the base model by more than its `min_delta` can't be chosen either.

    Args:
        objectives: one for every target; what is maximised is the weighted mean of their scores.
        write: whether this process writes the journal.
        on_standing: told how every mixture stands and the best so far.

    Raises:
        InputError: every mixture falls short of a `min_delta`.
        RuntimeError: not one mixture could be scored.
    """
    state = Search(objectives, space, journal, write, on_standing)
    state.know([BASE])
    state.know([*(Mixture.subset([name]) for name in space.names), Mixture.subset(space.names)])
    try:
        proposed = next(strategy)
        while True:
            proposed = strategy.send(state.know(proposed))
    except StopIteration:
        pass
    complete = [one for one in state.standings.values() if one.score and one.mixture in space]
    if not complete:
        reasons = sorted({trial.reason or "" for one in state.standings.values() for trial in one.trials.values()})
        raise RuntimeError(f"no mixture could be scored: {'; '.join(filter(None, reasons))}")
    ranking = sorted((one for one in complete if one.may_be_chosen), key=lambda one: preference(one, costs))
    if not ranking:
        short = sorted({target for one in complete for target in one.short})
        raise InputError(
            f"every mixture makes {' or '.join(short)} worse than the base model by more than min_delta allows; raise min_delta "
            "of that target or leave it out. What was scored is kept"
        )
    return SearchResult(state.standings, choose(ranking, one_standard_error), ranking, state.measured)


def measure(objective: Objective, mixtures: Sequence[Mixture]) -> list[Trial]:
    """One trial for each of these mixtures, complete or failed; they share the time that it took."""
    start = time.monotonic()
    found = objective(mixtures)
    seconds = (time.monotonic() - start) / len(mixtures)
    return [
        Trial(
            key=objective.key(mixture),
            mixture=mixture,
            objective=objective.name,
            target=objective.target,
            rung=objective.examples,
            state="complete" if isinstance(score, Score) else "failed",
            score=score if isinstance(score, Score) else None,
            seconds=seconds,
            reason=None if isinstance(score, Score) else score.reason,
        )
        for mixture, score in zip(mixtures, found, strict=True)
    ]
