"""Strategies: generators that propose mixtures and learn how they stand.

A strategy yields a list of mixtures and is sent how they stand, in the same order. It keeps nothing on the disk: to
resume is to run it again, with the journal answering what is known already. It knows neither models nor objectives: what it is
told of a mixture is a number, its estimated score, or none where the mixture failed.

Every strategy takes a `SearchProblem` and draws from its seed alone. It ends by itself when it has nothing better to propose; a
budget may end it earlier. No mixture is proposed twice, and none that the space does not hold.
"""

import math
import random
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Standing
from m2m_hf.errors import InputError

Strategy = Generator[list[Mixture], list[Standing], None]
Known = dict[Mixture, float]


@dataclass(frozen=True)
class SearchProblem:
    """What a strategy is given.

    Args:
        space: the mixtures that may be proposed.
        known: the scores of the mixtures that every search begins with (singles, all together), −∞ where one failed.
        seed: of everything random.
        budget: about how many mixtures there is time for.
        screen: a far cheaper estimate of a mixture's score, in any unit, where there is one.
        gradient: where there is one, the log-likelihood of a mixture and its derivatives by the weights, by name; None once
            no more of them can be had.
    """

    space: SearchSpace
    known: Mapping[Mixture, float] = field(default_factory=dict)
    seed: int = 0
    budget: int = 1000
    screen: Callable[[Sequence[Mixture]], Sequence[float]] | None = None
    gradient: Callable[[Mixture], tuple[float, Mapping[str, float]] | None] | None = None


def value(standing: Standing) -> float:
    """What a strategy makes of a standing: higher is better, −∞ for what failed or falls short of a target's `min_delta`."""
    return -math.inf if standing.estimate is None or standing.short else standing.estimate


def ask(known: Known, mixtures: Iterable[Mixture]) -> Generator[list[Mixture], list[Standing], list[float]]:
    """The scores of `mixtures`; those that are not in `known` are proposed, and put there."""
    asked = list(mixtures)
    new = [mixture for mixture in dict.fromkeys(asked) if mixture not in known]
    if new:
        standings = yield new
        known.update(zip(new, map(value, standings), strict=True))
    return [known[mixture] for mixture in asked]


def best_of(known: Known, mixtures: Iterable[Mixture]) -> Mixture:
    """The one with the highest score; of equal ones the smallest, then the first by name."""
    return min(mixtures, key=lambda mixture: (-known[mixture], len(mixture), mixture.items))


def exhaustive(problem: SearchProblem) -> Strategy:
    """Every mixture of the space once: the paper's search over all 2^N − 1 subsets (arXiv 2505.16066)."""
    yield from ask(dict(problem.known), problem.space.subsets())


def listed(mixtures: Sequence[Mixture]) -> Callable[[SearchProblem], Strategy]:
    """A strategy that proposes just these."""

    def strategy(problem: SearchProblem) -> Strategy:
        yield from ask(dict(problem.known), [mixture for mixture in mixtures if mixture in problem.space])

    return strategy


def random_search(problem: SearchProblem) -> Strategy:
    """Mixtures drawn at random, all sizes alike, until the budget or the space is spent."""
    draw, known = random.Random(problem.seed), dict(problem.known)
    for _ in range(problem.budget):
        mixture = fresh(problem.space, known, draw)
        if mixture is None:
            return
        yield from ask(known, [mixture])


def fresh(space: SearchSpace, known: Known, draw: random.Random, tries: int = 200) -> Mixture | None:
    """A random mixture that is not known; None where many tries find none."""
    for _ in range(tries):
        mixture = space.draw(draw)
        if mixture not in known:
            return mixture
    return None


def start(problem: SearchProblem) -> Mixture | None:
    """The smallest allowed mixture made of what is required and, to reach the smallest size, of the best single candidates."""
    space = problem.space
    singles = {name: problem.known.get(Mixture.subset([name]), -math.inf) for name in space.names}
    order = sorted(set(space.names) - space.required, key=lambda name: (-singles[name], name))
    fewest = max(space.min_datasets, len(space.required), 1)
    for skip in range(len(order) or 1):  # past what is too dear
        mixture = Mixture.subset([*space.required, *order[skip:]][:fewest])
        if mixture in space:
            return mixture
    return next(iter(space.subsets()), None)


def climb(space: SearchSpace, known: Known, here: Mixture) -> Generator[list[Mixture], list[Standing], Mixture]:
    """Goes uphill from `here`: by adding or dropping one candidate, and where neither helps by swapping two."""
    yield from ask(known, [here])
    while True:
        for moves in (space.added(here) + space.dropped(here), space.swapped(here)):
            yield from ask(known, moves)
            best = best_of(known, [here, *moves])
            if best != here and known[best] > known[here]:
                here = best
                break
        else:
            return here


def greedy(problem: SearchProblem) -> Strategy:
    """Steepest ascent, forward from the smallest mixture and backward from the largest, by adding, dropping and swapping."""
    known = dict(problem.known)
    first = start(problem)
    if first is None:
        return
    yield from climb(problem.space, known, first)
    largest = Mixture.subset(problem.space.names)
    if largest not in problem.space:
        inside = [mixture for mixture in known if mixture in problem.space]
        longest = max(map(len, inside))
        largest = best_of(known, [mixture for mixture in inside if len(mixture) == longest])
    yield from climb(problem.space, known, largest)


def beam(problem: SearchProblem, width: int = 4) -> Strategy:
    """The best few mixtures of every size, each made from the best few one smaller; ends when two sizes bring nothing better."""
    known = dict(problem.known)
    first = start(problem)
    if first is None:
        return
    singles = [m for m in (Mixture.subset([name]) for name in problem.space.names) if m in problem.space and m in known]
    level = singles if len(first) == 1 and singles else [first]
    yield from ask(known, level)
    best, without = best_of(known, level), 0
    while level and without < 2:
        level = sorted(level, key=lambda mixture: (-known[mixture], mixture.items))[:width]
        level = list(dict.fromkeys(larger for mixture in level for larger in problem.space.added(mixture)))
        if not level:
            return
        yield from ask(known, level)
        top = best_of(known, level)
        without = 0 if known[top] > known[best] else without + 1
        best = best_of(known, [best, top])


def annealing(problem: SearchProblem) -> Strategy:
    """Simulated annealing (Kirkpatrick et al., 1983): a random step is taken when it improves, or by chance, ever less often.

    The temperature starts at half the range of the known scores and falls by a factor of 100 over the budget.
    """
    draw, known = random.Random(problem.seed), dict(problem.known)
    here = start(problem)
    if here is None:
        return
    yield from ask(known, [here])
    scores = [score for score in known.values() if math.isfinite(score)]
    hot = (max(scores) - min(scores)) / 2 if len(scores) > 1 else 0.0
    proposed = 0
    for step in range(20 * problem.budget):
        there = problem.space.step(here, draw)
        if there is None or proposed >= problem.budget:
            return
        proposed += there not in known
        (new,) = yield from ask(known, [there])
        temperature = hot * 100 ** (-min(1.0, max(proposed, step / 20) / problem.budget))
        gain = new - known[here]
        if gain >= 0 or (temperature > 0 and draw.random() < math.exp(gain / temperature)):
            here = there


def gradient(problem: SearchProblem, passes: int = 40) -> Strategy:
    """Exponentiated gradient ascent of the log-likelihood on the simplex (Kivinen and Warmuth, 1997), then mixtures made of it.

    Weights are multiplied by exp(η (gᵢ − ḡ)), with ḡ their weighted mean; where that does not help, η shrinks. It ends where no
    candidate's derivative exceeds ḡ by more than a hundredth of the largest difference at the start, which for a concave
    likelihood bounds what is still to be gained. Proposed are, with `continuous`, the weights found, and for every k the k
    heaviest candidates.

    Raises:
        InputError: the targets have no gradient.
    """
    if problem.gradient is None:
        raise InputError(
            "strategy gradient needs targets whose scorer is choice, classification or loss, and objective merged"
        )
    space, known = problem.space, dict(problem.known)
    weights = dict.fromkeys(space.names, 1 / len(space.names))
    best, slope, rate, widest = -math.inf, dict.fromkeys(space.names, 0.0), 0.0, 0.0
    trying = weights
    for _ in range(passes):
        found = problem.gradient(Mixture.of(trying))
        if found is None:
            break
        if found[0] > best:
            weights, best, slope, rate = trying, found[0], dict(found[1]), rate * 1.3
        else:
            rate /= 3
        mean = sum(weights[name] * slope[name] for name in weights)
        gap = max(slope.values()) - mean
        widest = widest or gap
        rate = rate or 1 / max(gap, mean - min(slope.values()), 1e-12)
        if gap <= widest / 100 or rate * gap < 1e-3:
            break
        grown = {name: max(weight * math.exp(rate * (slope[name] - mean)), 1e-5) for name, weight in weights.items()}
        trying = {name: weight / sum(grown.values()) for name, weight in grown.items()}
    order = sorted(weights, key=lambda name: (-weights[name], name))
    heaviest = [space.nearest(order, size) for size in range(space.fewest, space.most + 1)]
    if space.continuous:
        shares = [space.weighted({name: weights[name] for name in names}) for names in heaviest]
        yield from ask(known, [one for one in [space.weighted(weights, drop=True), *shares] if one in space])
    else:
        yield from ask(known, map(Mixture.subset, heaviest))
