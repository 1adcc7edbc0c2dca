"""Races: which mixtures need not be scored on all examples, because they cannot win.

All contenders are scored on the same first examples of one fixed random order, then on more of them, rung by rung. At every rung
each is compared with the leader, example by example, and leaves where nothing that the other examples may show could still make
it the winner by a margin that all examples together can tell. What stays to the end is scored in full.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

FIRST = 64  # examples that a mixture has seen at least before it may be dropped


GROWTH = 1.5  # of the rungs


RISK = 0.05  # that a race drops a mixture which all examples would tell to be better than the one that it keeps


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
    margin = norm.ppf(0.95) * np.sqrt(all_of_it)
    hopeless = behind + margin > critical * np.sqrt(remaining)
    hopeless[leader] = False
    return Verdict(leader, [int(number) for number in np.flatnonzero(hopeless)])
