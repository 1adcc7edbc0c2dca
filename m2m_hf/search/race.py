"""Races: mixtures that cannot win need not be scored on all examples.

All contenders are scored on the first examples of one fixed random order, then on more of them, rung by rung. At every rung each
is compared with the leader, example by example. It leaves the race when nothing that the other examples may show could still make
it the winner by a margin that all examples together can tell. What stays to the end is scored in full.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.objective import Objective, TargetInfo
from m2m_hf.search.measure import SearchState
from m2m_hf.search.result import SearchEnded, score_of

FIRST = 64  # examples that a mixture sees before it may be dropped
GROWTH = 1.5  # of a rung over the one before
LAST = 0.8  # of all examples: a rung of more would hardly save any
RISK = 0.05  # that a race drops a mixture which all examples would tell to be better than the one it keeps
RESAMPLES = 400


def reasons_against_racing(targets: Sequence[TargetInfo], one_standard_error: bool) -> list[str]:
    """Why some rows cannot judge a mixture; empty where they can."""
    reasons = {
        "a target has no value for every row": not all(one.order for one in targets),
        "a target has a single row": any(one.order and one.examples == 1 for one in targets),
        "a target's min_delta needs scores of all rows": any(one.min_delta is not None for one in targets),
        "one_standard_error needs scores of all rows": one_standard_error,
    }
    return [reason for reason, holds in reasons.items() if holds]


def plan_rungs(targets: Sequence[TargetInfo]) -> list[dict[str, int]]:
    """For every rung, target -> rows seen: of the largest target 64, half as many again, …, all; of others the same share."""
    largest = max(target.examples for target in targets)
    sizes = []
    size = float(FIRST)
    while size < largest * LAST:
        sizes.append(round(size))
        size *= GROWTH
    return [
        {one.name: max(math.ceil(one.examples * size / largest), min(FIRST, one.examples)) for one in targets}
        for size in [*sizes, largest]
    ]


@dataclass(frozen=True)
class Sample:
    """What the contenders scored on the examples of one target that a rung has shown.

    Args:
        values: of shape (contenders, examples seen), contenders in one order for all targets, examples in the race's order.
        examples: of the target altogether.
        weight: the target's share in the mean over the targets.
    """

    values: Any
    examples: int
    weight: float = 1.0


def judge(samples: Sequence[Sample], looks: int) -> tuple[int, list[int]]:
    """Compares all contenders with the leader.

    Let m be the mean paired difference leader − contender over the r examples seen, s the standard deviation of a difference and
    n the number of all examples. Of n examples drawn without replacement the mean over all of them lies around m with
    standard deviation s √(1/r − 1/n). A contender is of interest where that mean falls below −z s/√n, with z the 95 % point of
    the normal distribution: only then could a one-sided paired test over all examples tell that it is better than the leader. It
    is dropped where (m + z s/√n) / (s √(1/r − 1/n)) exceeds a critical value.

    That value holds for all contenders together, correlated as they are: it is the upper quantile, at `RISK` over the number of
    looks, of the largest studentised deviation over resamples of the examples (max-T bootstrap; Westfall and Young, 1993).

    Args:
        samples: one for every target, all with the same contenders.
        looks: rungs at which something may be dropped.

    Returns:
        (the contender with the highest score so far, those that cannot win), by their numbers.
    """
    means = sum(sample.weight * sample.values.mean(1) for sample in samples)
    leader = int(np.argmax(means))
    behind = means[leader] - means
    now, all_of_it, remaining = (np.zeros(len(means)) for _ in range(3))  # variances of means of paired differences
    draw = np.random.default_rng(0)
    resampled = np.zeros((RESAMPLES, len(means)))
    for sample in samples:
        seen = sample.values.shape[1]
        differences = sample.values[leader] - sample.values
        spread = sample.weight**2 * differences.var(1, ddof=1)
        spread = np.maximum(spread, spread.max() / seen)  # what agreed on all of these may yet differ on another
        now += spread / seen
        all_of_it += spread / sample.examples
        remaining += spread * (1 / seen - 1 / sample.examples)
        counts = draw.multinomial(seen, np.full(seen, 1 / seen), size=RESAMPLES) / seen
        resampled += sample.weight * (counts @ differences.T - differences.mean(1))
    if not now.any():  # all score alike on all examples
        return leader, [number for number in range(len(means)) if number != leader]
    critical = float(np.quantile((resampled / np.sqrt(now)).max(1), 1 - RISK / looks))
    margin = ndtri(0.95) * np.sqrt(all_of_it)
    hopeless = behind + margin > critical * np.sqrt(remaining)
    hopeless[leader] = False
    return leader, [int(number) for number in np.flatnonzero(hopeless)]


def run_race(state: SearchState, mixtures: Sequence[Mixture], rungs: Sequence[Mapping[str, int]]) -> None:
    """Scores mixtures rung by rung, and settles those that cannot win where they are. The best one so far takes part.

    If the search ends before, the leader is scored on all rows, or the race would have been in vain.
    """
    running = list(mixtures)
    champion = [state.best.mixture] if state.best else []  # until it is dropped
    leader: Mixture | None = None
    try:
        for sizes in rungs[:-1]:
            score_rung(state, running, sizes)
            leaving = [one for one in running if any(trial.score is None for trial in state.trials[one].values())]
            rivals = [mixture for mixture in [*running, *champion] if mixture not in leaving]
            if rivals != champion:
                samples = [shown(state, one, rivals, sizes[one.target.name]) for one in state.objectives]
                ahead, dropped = judge(samples, len(rungs) - 1)
                leader = rivals[ahead]
                leaving += [rivals[number] for number in dropped]
            state.settle([mixture for mixture in leaving if mixture in running])
            running, champion = ([one for one in group if one not in leaving] for group in (running, champion))
            if not running:
                return
            if len([*running, *champion]) == 1:  # there is no rival left
                break
        score_rung(state, running, rungs[-1])
        state.settle(running)
    except SearchEnded:
        state.must_finish = True
        for mixture in running:
            if mixture == leader:
                state.complete(mixture)
            else:
                state.settle([mixture])
        state.must_finish = False
        raise


def score_rung(state: SearchState, mixtures: Sequence[Mixture], sizes: Mapping[str, int]) -> None:
    for objective in state.objectives:
        state.score(objective, mixtures, sizes[objective.target.name])


def shown(state: SearchState, objective: Objective, mixtures: Sequence[Mixture], size: int) -> Sample:
    """The mixtures' values on the rows that a rung shows, in the race's order."""
    target = objective.target
    values = []
    for mixture in mixtures:
        trial = state.recall(objective, mixture, size)
        assert trial is not None
        of_rows = np.asarray(score_of(trial).values)
        values.append(of_rows[list(target.order)] if size == target.examples else of_rows)
    return Sample(np.array(values), target.examples, state.share(objective))
