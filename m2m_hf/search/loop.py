"""The search loop: a strategy proposes mixtures, the journal or the objectives answer, and the best one is chosen."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.special import logsumexp

from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.objective import Differentiable, Objective
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Standing
from m2m_hf.errors import InputError
from m2m_hf.search.callbacks import SearchCallback
from m2m_hf.search.measure import SearchState
from m2m_hf.search.race import Race, may_race, plan_rungs
from m2m_hf.search.result import (
    UNLIMITED,
    Budget,
    SearchEnded,
    SearchResult,
    choose,
    default_budget,
    preference,
    score_of,
)
from m2m_hf.search.strategies import Screen, SearchProblem, Strategy, exhaustive, value
from m2m_hf.storage.journal import Journal

FINALISTS = 8  # pruned mixtures, possibly tied with the best, that are scored on all rows in the end
SCREEN_ROWS = 1000  # rows of a target that the screen looks at


def search(
    strategy: Callable[[SearchProblem], Strategy],
    space: SearchSpace,
    objectives: Sequence[Objective],
    journal: Journal,
    *,
    names: Sequence[str],
    costs: Mapping[str, float],
    failed: Mapping[str, str] | None = None,
    one_standard_error: bool = False,
    race: bool = False,
    budget: Budget = UNLIMITED,
    seed: int = 0,
    callbacks: Sequence[SearchCallback] = (),
    clock: Callable[[], float] = time.monotonic,
) -> SearchResult:
    """Scores the base model, every single candidate, all together, and what the strategy proposes; then chooses.

    Trials that the journal holds are not measured again. A trial that fails is recorded with its reason. A mixture with a failed
    trial cannot be chosen, nor one that makes a target worse than the base model by more than its `min_delta`.

    Args:
        strategy: proposes mixtures.
        space: the mixtures that may be proposed and chosen.
        objectives: one for every target; the search maximises the weighted mean of their scores.
        journal: remembers trials.
        names: all candidates, including those that may not be in a mixture.
        costs: name -> cost, of every candidate.
        failed: name -> why the candidate has no adapter.
        one_standard_error: see `choose`.
        race: let mixtures that are proposed together race, if every target's rows have values (see `race.py`).
        budget: what may be spent after the mixtures that every search begins with.
        seed: of everything random in the strategy.
        callbacks: are told of every trial and standing, and may stop the search.
        clock: the time in seconds; with several processes, the main one's on all.

    Raises:
        InputError: the base model or every mixture has no score; every mixture falls short of a `min_delta`; or the search ended
            before a mixture that is allowed was scored.
    """
    state = SearchState(space, objectives, journal, callbacks=callbacks, budget=budget, failed=failed, clock=clock)
    state.tell("on_search_begin", space, planned_mixtures(strategy, space, len(names), budget))
    together = Mixture.subset([name for name in names if name not in (failed or {})])
    with state.without_limits():
        state.score_in_full([BASE])
        first = dict.fromkeys([*(Mixture.subset([name]) for name in names), together])
        state.score_in_full([mixture for mixture in first if mixture not in state.standings])
    state.set_control(together)
    targets = [one.target for one in objectives]
    # `one_standard_error` needs the full scores of more mixtures than those that may win.
    rungs = plan_rungs(targets) if race and not one_standard_error and may_race(targets) else []
    proposals = strategy(make_problem(state, seed))
    ended = "strategy"
    try:
        proposed = next(proposals)
        while True:
            proposed = proposals.send(score_proposed(state, proposed, rungs))
    except StopIteration:
        pass
    except SearchEnded as end:
        ended = end.by
    try:
        score_finalists(state)
    except SearchEnded as end:
        if end.by == "callback":
            ended = end.by
    settle_pruned(state)
    ranking = rank(state, costs, ended)
    best = choose(ranking, one_standard_error)
    result = SearchResult(state.standings, best, ranking, state.measured, state.evaluations, state.seconds, ended)
    state.tell("on_search_end", result)
    return result


def planned_proposals(strategy: Callable[[SearchProblem], Strategy], space: SearchSpace) -> int:
    """About how many mixtures a strategy will propose."""
    if strategy is not exhaustive:
        return default_budget(len(space.names))
    known = [*(Mixture.subset([name]) for name in space.names), Mixture.subset(space.names)]
    return sum(mixture not in known for mixture in space.subsets())


def planned_mixtures(
    strategy: Callable[[SearchProblem], Strategy], space: SearchSpace, candidates: int, budget: Budget = UNLIMITED
) -> int:
    """About how many mixtures a search will score: the base model, singles and all together among them."""
    return int(min(2 + candidates + planned_proposals(strategy, space), budget.max_trials))


def make_problem(state: SearchState, seed: int) -> SearchProblem:
    """What the strategy is given, once the mixtures that every search begins with are scored."""
    space = state.space
    return SearchProblem(
        space,
        {mixture: value(standing) for mixture, standing in state.standings.items() if mixture.items},
        seed,
        int(min(state.budget.max_trials - len(state.standings), default_budget(len(space.names)))),
        make_screen(state),
        state.gradient if all(isinstance(one, Differentiable) for one in state.objectives) else None,
    )


def make_screen(state: SearchState) -> Screen | None:
    """Estimates the log-likelihood of mixtures from what single candidates scored; None if scorers have no log-probabilities."""
    estimates = []
    for objective in state.objectives:
        singles, unit = {}, 1.0
        for name in state.space.names:
            score = state.standings[Mixture.subset([name])].trials[objective.target.name].score
            if score is None or not score.logprobs:
                return None
            singles[name] = score.logprobs
            if score.mean_logprob:
                unit = objective.likelihood(score) / score.mean_logprob
        estimates.append((state.share(objective) * unit, ensemble_screen(singles)))
    return lambda mixtures: [
        sum(share * mean for (share, _), mean in zip(estimates, means, strict=True))
        for means in zip(*(estimate(mixtures) for _, estimate in estimates), strict=True)
    ]


def ensemble_screen(singles: Mapping[str, Sequence[float]]) -> Screen:
    """Estimates the mean log-likelihood of mixtures as that of the ensemble, which costs no forward pass.

    Args:
        singles: name -> the log-probability of every row's right answer under that candidate's adapter.
    """
    rows = {name: np.array(logprobs[:SCREEN_ROWS]) for name, logprobs in singles.items()}

    def estimate(mixtures: Sequence[Mixture]) -> list[float]:
        # Sums of logarithms, since the probability of a long completion may be too small for a float.
        return [
            float(logsumexp([rows[name] + np.log(weight) for name, weight in mixture.items], axis=0).mean())
            for mixture in mixtures
        ]

    return estimate


def score_proposed(
    state: SearchState,
    mixtures: Sequence[Mixture],
    rungs: Sequence[Mapping[str, int]],
) -> list[Standing]:
    """How the proposed mixtures stand. They race if there are several rungs.

    Raises:
        SearchEnded: before all were looked at.
    """
    new = [mixture for mixture in dict.fromkeys(mixtures) if mixture not in state.standings]
    if new and state.stopping:
        raise SearchEnded("callback")
    room = max(0, min(len(new), state.budget.max_trials - len(state.standings)))
    allowed = new[: int(room)]
    if len(rungs) > 1 and len(allowed) + (state.best is not None) > 1:
        Race(state, allowed, rungs).run()
    else:
        state.score_in_full(allowed)
    if len(allowed) < len(new):
        raise SearchEnded("budget")
    return [state.standings[mixture] for mixture in mixtures]


def score_finalists(state: SearchState) -> None:
    """Scores the best few pruned mixtures that may be tied with the best on all rows.

    Raises:
        SearchEnded: before all were scored.
    """
    if state.best is None:
        return
    best = score_of(state.best).value
    near = [
        one
        for one in state.standings.values()
        if one.pruned
        and one.score is not None
        and one.mixture in state.space
        and (one.estimate or 0.0) + 1.645 * (one.score.stderr or 0.0) > best
    ]
    for one in sorted(near, key=lambda one: (-(one.estimate or 0.0), one.mixture.items))[:FINALISTS]:
        state.complete(one.mixture, one.trials)


def settle_pruned(state: SearchState) -> None:
    """Settles pruned mixtures that an earlier search scored on all rows; earlier, strategies would have been told too much."""
    for one in [one for one in state.standings.values() if one.pruned]:
        state.settle_from_journal(one.mixture)


def rank(state: SearchState, costs: Mapping[str, float], ended: str) -> list[Standing]:
    """The mixtures that may be chosen, best first.

    Raises:
        InputError: there are none.
    """
    scored = [one for one in state.standings.values() if one.complete and one.mixture in state.space]
    ranking = sorted((one for one in scored if one.may_be_chosen), key=lambda one: preference(one, costs))
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
