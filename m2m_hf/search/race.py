"""Races: mixtures that cannot win need not be scored on all examples.

All contenders are scored on the first examples of one fixed random order, then on more of them, rung by rung. At every rung each
is compared with the leader, example by example. It leaves the race when nothing that the other examples may show could still make
it the winner by a margin that all examples together can tell. What stays to the end is scored in full.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.objective import Objective, TargetInfo
from m2m_hf.core.trial import Trial
from m2m_hf.search.measure import SearchState
from m2m_hf.search.result import SearchEnded, score_of_trial

FIRST = 64  # examples that a mixture sees before it may be dropped
GROWTH = 1.5  # of a rung over the one before
RISK = 0.05  # that a race drops a mixture which all examples would tell to be better than the one it keeps
RESAMPLES = 400


def rungs(examples: int) -> list[int]:
    """How many examples are seen at each rung: 64, half as many again, …, all.

    A last step of less than a fifth of all is not worth a rung.
    """
    steps = []
    size = float(FIRST)
    while size < examples * 0.8:
        steps.append(round(size))
        size *= GROWTH
    return [*steps, examples]


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


@dataclass(frozen=True)
class Verdict:
    """What a rung has shown.

    Args:
        leader: number of the contender with the highest score so far.
        dropped: numbers of those that cannot win.
    """

    leader: int
    dropped: list[int]


def judge(samples: Sequence[Sample], looks: int, seed: int = 0) -> Verdict:
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
        seed: of the resamples.
    """
    means = sum(sample.weight * sample.values.mean(1) for sample in samples)
    leader = int(np.argmax(means))
    behind = means[leader] - means
    now, all_of_it, remaining = (np.zeros(len(means)) for _ in range(3))  # variances of means of paired differences
    draw = np.random.default_rng(seed)
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
        return Verdict(leader, [number for number in range(len(means)) if number != leader])
    critical = float(np.quantile((resampled / np.sqrt(now)).max(1), 1 - RISK / looks))
    margin = ndtri(0.95) * np.sqrt(all_of_it)
    hopeless = behind + margin > critical * np.sqrt(remaining)
    hopeless[leader] = False
    return Verdict(leader, [int(number) for number in np.flatnonzero(hopeless)])


def may_race(targets: Sequence[TargetInfo]) -> bool:
    """True if some rows can judge a mixture: each has a value, and no `min_delta` needs the score of all rows."""
    return all(target.order and target.examples > 1 and target.min_delta is None for target in targets)


def plan_rungs(targets: Sequence[TargetInfo]) -> list[dict[str, int]]:
    """For every rung: target -> rows seen. At each rung, all targets have been seen to the same share."""
    largest = max(target.examples for target in targets)
    return [
        {
            target.name: max(math.ceil(target.examples * size / largest), min(FIRST, target.examples))
            for target in targets
        }
        for size in rungs(largest)
    ]


class Race:
    """Scores mixtures rung by rung; those that cannot win are left where they are.

    Args:
        state: of the search. Its best mixture takes part, since it is scored already.
        mixtures: what is to be scored.
        sizes: see `plan_rungs`.
    """

    def __init__(self, state: SearchState, mixtures: Sequence[Mixture], sizes: Sequence[Mapping[str, int]]) -> None:
        self._state = state
        self._sizes = sizes
        self._running = list(mixtures)
        self._champion = state.best.mixture if state.best else None
        self._leader: Mixture | None = None
        self._trials: dict[str, dict[Mixture, Trial]] = {one.target.name: {} for one in state.objectives}

    def run(self) -> None:
        """Runs the race to its end.

        Raises:
            SearchEnded: before the end. Then the leader is scored on all rows, or the race would have been in vain.
        """
        try:
            for number, sizes in enumerate(self._sizes, start=1):
                self._score(sizes)
                if number == len(self._sizes):
                    self._leave(self._running)
                    return
                self._leave([mixture for mixture in self._running if self._failed(mixture)])
                if self._running:
                    self._leave(self._losers(sizes))
                if len(self._running) == 1 and self._champion is None:  # there is no rival left
                    self._state.complete(self._running[0], self._trials_of(self._running[0]))
                    return
                if not self._running:
                    return
        except SearchEnded:
            self._settle_unfinished()
            raise

    def _score(self, sizes: Mapping[str, int]) -> None:
        for objective in self._state.objectives:
            name = objective.target.name
            before = self._trials[name]
            if next((trial.rung for trial in before.values()), 0) < sizes[name]:
                self._trials[name] = self._state.score(objective, self._running, sizes[name], before)

    def _trials_of(self, mixture: Mixture) -> dict[str, Trial]:
        return {target: trials[mixture] for target, trials in self._trials.items()}

    def _failed(self, mixture: Mixture) -> bool:
        return any(trial.score is None for trial in self._trials_of(mixture).values())

    def _leave(self, mixtures: Collection[Mixture]) -> None:
        """Settles mixtures where they are and takes them out of the race."""
        for mixture in mixtures:
            self._state.settle(mixture, self._trials_of(mixture))
        self._running = [mixture for mixture in self._running if mixture not in mixtures]
        self._trials = {
            target: {mixture: trials[mixture] for mixture in self._running} for target, trials in self._trials.items()
        }

    def _losers(self, sizes: Mapping[str, int]) -> list[Mixture]:
        """The running mixtures that cannot win any more."""
        rivals = [*self._running, *([self._champion] if self._champion else [])]
        samples = [self._sample(one, rivals, sizes[one.target.name]) for one in self._state.objectives]
        verdict = judge(samples, len(self._sizes) - 1)
        self._leader = rivals[verdict.leader]
        dropped = [rivals[number] for number in verdict.dropped]
        if self._champion in dropped:
            self._champion = None
        return [mixture for mixture in dropped if mixture in self._running]

    def _sample(self, objective: Objective, mixtures: Sequence[Mixture], size: int) -> Sample:
        """The mixtures' values on the rows that a rung shows, in the race's order."""
        target = objective.target
        values = []
        for mixture in mixtures:
            trial = self._trials[target.name].get(mixture) or self._state.recall(objective, mixture, size)
            assert trial is not None
            of_rows = np.asarray(score_of_trial(trial).values)
            values.append(of_rows[list(target.order)] if trial.rung == target.examples else of_rows)
        return Sample(np.array(values), target.examples, self._state.share(objective))

    def _settle_unfinished(self) -> None:
        for mixture in self._running:
            if mixture in self._state.standings or any(mixture not in trials for trials in self._trials.values()):
                continue
            if mixture == self._leader:
                with self._state.without_limits():
                    self._state.complete(mixture, self._trials_of(mixture))
            else:
                self._state.settle(mixture, self._trials_of(mixture))
