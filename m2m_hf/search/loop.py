"""The search loop: a strategy proposes mixtures, the journal or the objectives answer, and the best one is chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from scipy.special import logsumexp

from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.objective import Differentiable
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Standing
from m2m_hf.errors import InputError
from m2m_hf.search.measure import SearchState
from m2m_hf.search.race import plan_rungs, reasons_against_racing, run_race
from m2m_hf.search.result import (
    Budget,
    SearchEnded,
    SearchResult,
    choose,
    default_budget,
    preference,
    score_of,
)
from m2m_hf.search.strategies import Proposals, Screen, SearchProblem, Strategy, exhaustive, value

FINALISTS = 8  # pruned mixtures, possibly tied with the best, that are scored on all rows in the end
SCREEN_ROWS = 1000  # rows of a target that the screen looks at


def search(
    state: SearchState,
    strategy: Strategy,
    names: Sequence[str],
    *,
    one_standard_error: bool = False,
    race: bool = False,
    seed: int = 0,
) -> SearchResult:
    """Scores the base model, every single candidate, all together, and what the strategy proposes; then chooses.

    Trials that the journal holds are not measured again. A trial that fails is recorded with its reason. A mixture with a failed
    trial cannot be chosen, nor one that makes a target worse than the base model by more than its `min_delta`.

    Args:
        state: a new one, which says what to search and with which means.
        strategy: proposes mixtures.
        names: all candidates, including those that may not be in a mixture.
        one_standard_error: see `choose`.
        race: let mixtures that are proposed together race, unless there are `reasons_against_racing`.
        seed: of everything random in the strategy.

    Raises:
        InputError: the base model or every mixture has no score; every mixture falls short of a `min_delta`; or the search ended
            before a mixture that is allowed was scored.
    """
    state.tell("on_search_begin", state.space, planned_mixtures(strategy, state.space, len(names), state.budget))
    together = Mixture.subset([name for name in names if name not in state.failed])
    state.must_finish = True
    state.score_in_full([BASE])
    first = dict.fromkeys([*(Mixture.subset([name]) for name in names), together])
    state.score_in_full([mixture for mixture in first if mixture not in state.standings])
    state.must_finish = False
    state.reference = replace(state.reference, control=state.standings[together].trials)
    targets = [one.target for one in state.objectives]
    rungs = plan_rungs(targets) if race and not reasons_against_racing(targets, one_standard_error) else []
    ended = run_strategy(state, strategy(make_problem(state, seed)), rungs)
    try:
        score_finalists(state)
    except SearchEnded as end:
        if end.by == "callback":
            ended = end.by
    # Now pruned mixtures that an earlier search scored on all rows; before, strategies would have been told too much.
    for standing in [one for one in state.standings.values() if one.pruned]:
        state.complete_from_journal(standing.mixture)
    ranking = rank(state, ended)
    best = choose(ranking, one_standard_error)
    result = SearchResult(state.standings, best, ranking, state.measured, state.evaluations, state.seconds, ended)
    state.tell("on_search_end", result)
    return result


def planned_mixtures(strategy: Strategy, space: SearchSpace, candidates: int, budget: Budget) -> int:
    """About how many mixtures a search will score: the base model, singles and all together among them."""
    proposals = default_budget(len(space.names))
    if strategy is exhaustive:
        known = [*(Mixture.subset([name]) for name in space.names), Mixture.subset(space.names)]
        proposals = sum(mixture not in known for mixture in space.subsets())
    return int(min(2 + candidates + proposals, budget.max_trials))


def make_problem(state: SearchState, seed: int) -> SearchProblem:
    """What the strategy is given, once the mixtures that every search begins with are scored."""
    left = state.budget.max_trials - len(state.standings)
    return SearchProblem(
        state.space,
        {mixture: value(standing) for mixture, standing in state.standings.items() if mixture.items},
        seed,
        int(min(left, default_budget(len(state.space.names)))),
        make_screen(state),
        state.gradient if all(isinstance(one, Differentiable) for one in state.objectives) else None,
    )


def make_screen(state: SearchState) -> Screen | None:
    """Estimates the log-likelihood of mixtures from what single candidates scored; None if scorers have no log-probabilities."""
    targets = []
    for objective in state.objectives:
        singles, unit = {}, 1.0
        for name in state.space.names:
            score = state.standings[Mixture.subset([name])].trials[objective.target.name].score
            if score is None or not score.logprobs:
                return None
            singles[name] = np.array(score.logprobs[:SCREEN_ROWS])
            if score.mean_logprob:
                unit = objective.likelihood(score) / score.mean_logprob
        targets.append((state.share(objective) * unit, singles))

    @cache
    def screen(mixture: Mixture) -> float:
        return sum(share * ensemble_likelihood(singles, mixture) for share, singles in targets)

    return screen


def ensemble_likelihood(singles: Mapping[str, Any], mixture: Mixture) -> float:
    """The mean log-likelihood of a mixture's ensemble, from the log-probabilities of right answers under each of its adapters."""
    # Sums of logarithms, since the probability of a long completion may be too small for a float.
    parts = [singles[name] + np.log(weight) for name, weight in mixture.items]
    return float(logsumexp(parts, axis=0).mean())


def run_strategy(state: SearchState, proposals: Proposals, rungs: Sequence[Mapping[str, int]]) -> str:
    """Scores what a strategy proposes; says what ended it."""
    try:
        proposed = next(proposals)
        while True:
            proposed = proposals.send(score_proposed(state, proposed, rungs))
    except StopIteration:
        return "strategy"
    except SearchEnded as end:
        return end.by


def score_proposed(
    state: SearchState, mixtures: Sequence[Mixture], rungs: Sequence[Mapping[str, int]]
) -> list[Standing]:
    """How the proposed mixtures stand. They race if there are several rungs."""
    new = [mixture for mixture in dict.fromkeys(mixtures) if mixture not in state.standings]
    if new and state.stopping:
        raise SearchEnded("callback")
    room = int(max(0, min(len(new), state.budget.max_trials - len(state.standings))))
    if len(rungs) > 1 and room + (state.best is not None) > 1:
        run_race(state, new[:room], rungs)
    else:
        state.score_in_full(new[:room])
    if room < len(new):
        raise SearchEnded("budget")
    return [state.standings[mixture] for mixture in mixtures]


def score_finalists(state: SearchState) -> None:
    """Scores the best few pruned mixtures that may be tied with the best on all rows."""
    if state.best is None:
        return
    best = score_of(state.best).value
    near = [
        (-one.estimate, one.mixture.items)
        for one in state.standings.values()
        if one.pruned and one.estimate is not None and one.estimate + 1.645 * (score_of(one).stderr or 0.0) > best
    ]
    for _, items in sorted(near)[:FINALISTS]:
        state.complete(Mixture(items))


def rank(state: SearchState, ended: str) -> list[Standing]:
    """The mixtures that may be chosen, best first; refuses to go on if there are none."""
    scored = [one for one in state.standings.values() if one.complete and one.mixture in state.space]
    ranking = sorted((one for one in scored if one.may_be_chosen), key=lambda one: preference(one, state.space))
    if ranking:
        return ranking
    if scored:
        short = sorted({target for one in scored for target in one.short})
        raise InputError(
            f"every mixture makes {' or '.join(short)} worse than the base model by more than min_delta allows: raise that "
            "target's min_delta, or leave it out. What was scored is kept"
        )
    reasons = {trial.reason for one in state.standings.values() for trial in one.trials.values() if trial.reason}
    if reasons:
        raise InputError(f"no mixture could be scored: {'; '.join(sorted(reasons))}")
    raise InputError(
        {
            "strategy": "the strategy found no mixture that is allowed: loosen the constraints or choose another strategy",
            "budget": "the budget ended before any mixture that is allowed was scored: raise it",
            "callback": "a callback stopped the search before any mixture that is allowed was scored: stop it later",
        }[ended]
    )
