"""Shapley values and pairwise interactions of the candidates, in the game in which mixtures score.

The value of a set of candidates is the score of their equal-weight mixture; that of no candidate is the base model's. A
candidate's Shapley value (Shapley, 1953) is its mean marginal gain over all orders in which candidates join. All values sum to
the difference between all candidates together and the base model. The interaction of a pair (Grabisch and Roubens, 1999) is its
gain beyond what its two gain apart: below 0 they teach the same, or hinder each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb, factorial
from typing import Any

import numpy as np

from m2m_hf.core.jsonable import Measurement
from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.score import mean_and_stderr
from m2m_hf.core.trial import Standing

RESAMPLES = 200
NUMBERS = 1 << 24  # in one temporary array


@dataclass(frozen=True)
class Interaction:
    """What a pair of candidates gains together beyond what its two gain apart."""

    pair: tuple[str, str]
    value: float
    stderr: float | None


@dataclass(frozen=True)
class ShapleyValues:
    """Shapley values and interactions, with standard errors.

    Args:
        exact: whether all subsets were scored. The errors are then those of the rows, otherwise those of the choice of trials.
            They are None where the scorer gives no values by row.
        shapley: candidate -> its value.
        interactions: of all pairs, the strongest first; empty where there are too few trials for them.
    """

    exact: bool
    shapley: Mapping[str, Measurement]
    interactions: tuple[Interaction, ...]


def shapley_values(standings: Mapping[Mixture, Standing], names: Sequence[str]) -> ShapleyValues | None:
    """Shapley values from the mixtures that were scored; None where too few were.

    Exact where all 2^N subsets were scored in full. Otherwise estimated by weighted least squares with the Shapley kernel
    (Lundberg and Lee, 2017), interactions by least squares on pairs.
    """
    if standings[BASE].score is None:
        return None
    known = {
        mixture: standing
        for mixture, standing in standings.items()
        if standing.score is not None and (not mixture.items or mixture == Mixture.subset(mixture.names))
    }
    if len(known) == 2 ** len(names) and all(standing.complete for standing in known.values()):
        return exact(known, names)
    return estimated(known, names)


def summarised(exact: bool, names: Sequence[str], found: Sequence[tuple[float, float | None]]) -> ShapleyValues:
    """From (value, standard error) of the candidates, then of their pairs in the order of `combinations`."""
    pairs = zip(combinations(names, 2), found[len(names) :], strict=False)  # too few trials tell nothing of pairs
    interactions = [Interaction(pair, *one) for pair, one in pairs]
    interactions.sort(key=lambda one: -abs(one.value))
    shapley = {name: Measurement(*one) for name, one in zip(names, found, strict=False)}
    return ShapleyValues(exact, shapley, tuple(interactions))


def membership(mixtures: Sequence[Mixture], names: Sequence[str]) -> Any:
    """Of shape (mixtures, candidates): 1 where the candidate is in."""
    return np.array([[float(name in mixture.weights) for name in names] for mixture in mixtures])


def exact(known: Mapping[Mixture, Standing], names: Sequence[str]) -> ShapleyValues:
    """From all subsets. Values are linear in the scores, so every example has its own, and their mean has a standard error."""
    count = len(names)
    members = membership(list(known), names)
    sizes = members.sum(1)
    scores = [standing.score for standing in known.values() if standing.score is not None]
    by_row = all(score.values for score in scores)

    def factors(group: tuple[int, ...]) -> Any:
        """How much every mixture's score counts in the value of one candidate, or in the interaction of two."""
        inside, others = members[:, group].sum(1), count - len(group)
        weights = [factorial(s) * factorial(others - s) / factorial(others + 1) for s in range(others + 1)]
        return (-1.0) ** (len(group) - inside) * np.array(weights)[(sizes - inside).astype(int)]

    table = np.array([factors(group) for size in (1, 2) for group in combinations(range(count), size)])
    width = len(scores[0].values) if by_row else 1
    by_example = np.zeros((len(table), width))
    for start in range(0, len(scores), step := max(1, NUMBERS // width)):  # not all of them need fit into memory
        block = [score.values if by_row else (score.value,) for score in scores[start : start + step]]
        by_example += table[:, start : start + step] @ np.array(block)
    found = [(mean, stderr if by_row else None) for mean, stderr in map(mean_and_stderr, by_example)]
    return summarised(True, names, found)


def estimated(known: Mapping[Mixture, Standing], names: Sequence[str]) -> ShapleyValues | None:
    """From some subsets, with standard errors over resamples of them."""
    count = len(names)
    everything = Mixture.subset(names)
    inner = [mixture for mixture in known if 0 < len(mixture) < count]
    if everything not in known or len(inner) < 2 * count or count < 2:
        return None
    base, total = (known[mixture].estimate or 0.0 for mixture in (BASE, everything))
    members = membership(inner, names)
    sizes = members.sum(1)
    scores = np.array([known[mixture].estimate or 0.0 for mixture in inner])
    kernel = np.array([(count - 1) / (comb(count, int(size)) * size * (count - size)) for size in sizes])
    # That all values sum to the whole leaves one of them to follow from the others.
    free = members[:, :-1] - members[:, -1:]
    rest = scores - base - members[:, -1] * (total - base)
    pairs = list(combinations(range(count), 2))
    products = np.array([members[:, n] * members[:, m] for n, m in pairs]).T
    with_pairs = len(inner) >= 3 * (1 + count + len(pairs))
    design = np.hstack([np.ones((len(inner), 1)), members, products])

    def fit(chosen: Any) -> Any:
        """Of the candidates, then of their pairs."""
        root = np.sqrt(kernel[chosen])[:, None]
        values = np.linalg.lstsq(free[chosen] * root, rest[chosen] * root[:, 0], rcond=None)[0]
        both = np.linalg.lstsq(design[chosen], scores[chosen], rcond=None)[0][1 + count :] if with_pairs else []
        return np.array([*values, total - base - values.sum(), *both])

    draw = np.random.default_rng(0)
    again = [fit(draw.integers(len(inner), size=len(inner))) for _ in range(RESAMPLES)]
    found = np.stack([fit(np.arange(len(inner))), np.std(again, axis=0, ddof=1)], axis=1)
    return summarised(False, names, found.tolist())
