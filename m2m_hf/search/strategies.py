"""Strategies: generators that propose mixtures and learn how they stand.

A strategy yields a list of mixtures and is sent their standings, in the same order. It keeps nothing on the disk: to resume it is
to run it again, while the journal answers what is known. It knows neither models nor objectives, only numbers.

Every strategy takes a `SearchProblem` and draws from its random numbers alone. It ends when it has nothing better to propose; a
budget may end it earlier. It proposes no mixture twice, and none outside the space.
"""

import math
import random
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Standing
from m2m_hf.errors import InputError

BEAM_WIDTH = 4  # mixtures of every size that `beam` goes on from
PASSES = 40  # for gradients, at most

Proposals = Generator[list[Mixture], list[Standing], None]
Strategy = Callable[["SearchProblem"], Proposals]
Screen = Callable[[Mixture], float]
Gradient = Callable[[Mixture], tuple[float, Mapping[str, float]] | None]


@dataclass
class SearchProblem:
    """What a strategy works with.

    Args:
        space: the mixtures that may be proposed.
        known: mixture -> score, −∞ if it failed. At first the mixtures that every search begins with; `ask` adds to it.
        seed: of the random numbers.
        budget: about how many mixtures there is time for.
        screen: estimates a score at almost no cost, in any unit; None if that is not possible.
        gradient: the log-likelihood of a mixture and its derivative by each weight, or None if no more can be measured. Itself
            None if the objectives have no gradient.
    """

    space: SearchSpace
    known: dict[Mixture, float] = field(default_factory=dict)
    seed: int = 0
    budget: int = 1000
    screen: Screen | None = None
    gradient: Gradient | None = None

    def __post_init__(self) -> None:
        self.known = dict(self.known)
        self.random = random.Random(self.seed)

    def ask(self, mixtures: Iterable[Mixture]) -> Generator[list[Mixture], list[Standing], list[float]]:
        """The scores of mixtures; proposes those that are not known. Call it as `yield from problem.ask(...)`."""
        mixtures = list(mixtures)
        new = [mixture for mixture in dict.fromkeys(mixtures) if mixture not in self.known]
        if new:
            standings = yield new
            self.known.update(zip(new, map(value, standings), strict=True))
        return [self.known[mixture] for mixture in mixtures]

    def best_of(self, mixtures: Iterable[Mixture]) -> Mixture:
        """The known mixture with the highest score; of equal ones the smallest, then the first by name."""
        return min(mixtures, key=lambda mixture: (-self.known[mixture], len(mixture), mixture.items))

    def single(self, name: str) -> float:
        """The score of a candidate alone; −∞ if it is not known."""
        return self.known.get(Mixture.subset([name]), -math.inf)

    def draw_new(self) -> Mixture | None:
        """A random mixture that is not known; None if many tries find none."""
        drawn = (self.space.draw(self.random) for _ in range(200))
        return next((mixture for mixture in drawn if mixture not in self.known), None)

    def smallest(self) -> Mixture | None:
        """The smallest allowed mixture: the required candidates, and as many of the best single ones as it takes."""
        space = self.space
        order = sorted(set(space.names) - space.required, key=lambda name: (-self.single(name), name))
        for skip in range(len(order) or 1):  # past what costs too much
            mixture = Mixture.subset([*space.required, *order[skip:]][: space.fewest])
            if mixture in space:
                return mixture
        return next(iter(space.subsets()), None)


def value(standing: Standing) -> float:
    """A standing as a number: −∞ for a mixture that failed or falls short of a target's `min_delta`."""
    return -math.inf if standing.estimate is None or standing.short else standing.estimate


def exhaustive(problem: SearchProblem) -> Proposals:
    """Every mixture of the space once: the paper's search over all 2^N − 1 subsets (arXiv 2505.16066)."""
    yield from problem.ask(problem.space.subsets())


def listed(mixtures: Sequence[Mixture]) -> Strategy:
    """A strategy that proposes just these mixtures."""

    def strategy(problem: SearchProblem) -> Proposals:
        yield from problem.ask(mixture for mixture in mixtures if mixture in problem.space)

    return strategy


def random_search(problem: SearchProblem) -> Proposals:
    """Random mixtures, uniform over the sizes, until the budget or the space is spent."""
    for _ in range(problem.budget):
        mixture = problem.draw_new()
        if mixture is None:
            return
        yield from problem.ask([mixture])


def climb(problem: SearchProblem, here: Mixture) -> Proposals:
    """Goes uphill from `here`: adds or drops one candidate, and swaps two if neither helps."""
    yield from problem.ask([here])
    space = problem.space
    while True:
        for moves in (space.added(here) + space.dropped(here), space.swapped(here)):
            yield from problem.ask(moves)
            best = problem.best_of([here, *moves])
            if best != here and problem.known[best] > problem.known[here]:
                here = best
                break
        else:
            return


def greedy(problem: SearchProblem) -> Proposals:
    """Steepest ascent, forward from the smallest mixture and backward from the largest, by adding, dropping and swapping."""
    smallest = problem.smallest()
    if smallest is None:
        return
    yield from climb(problem, smallest)
    largest = Mixture.subset(problem.space.names)
    if largest not in problem.space:
        inside = [mixture for mixture in problem.known if mixture in problem.space]
        longest = max(map(len, inside))
        largest = problem.best_of(mixture for mixture in inside if len(mixture) == longest)
    yield from climb(problem, largest)


def beam(problem: SearchProblem) -> Proposals:
    """The best few mixtures of every size, each made from the best few one smaller. Ends when two sizes bring nothing better."""
    space, known = problem.space, problem.known
    smallest = problem.smallest()
    if smallest is None:
        return
    singles = [m for m in (Mixture.subset([name]) for name in space.names) if m in space and m in known]
    level = singles if len(smallest) == 1 and singles else [smallest]
    yield from problem.ask(level)
    best, without = problem.best_of(level), 0
    while level and without < 2:
        level = sorted(level, key=lambda mixture: (-known[mixture], mixture.items))[:BEAM_WIDTH]
        level = list(dict.fromkeys(larger for mixture in level for larger in space.added(mixture)))
        if not level:
            return
        yield from problem.ask(level)
        top = problem.best_of(level)
        without = 0 if known[top] > known[best] else without + 1
        best = problem.best_of([best, top])


def gradient(problem: SearchProblem) -> Proposals:
    """Climbs the log-likelihood on the simplex, then proposes mixtures of the heaviest candidates.

    For every k it proposes the k heaviest candidates; with `continuous`, also the weights themselves.
    """
    space = problem.space
    weights = best_weights(problem)
    order = sorted(weights, key=lambda name: (-weights[name], name))
    heaviest = [space.nearest(order, size) for size in range(space.fewest, space.most + 1)]
    if not space.continuous:
        yield from problem.ask(map(Mixture.subset, heaviest))
        return
    shares = [space.weighted({name: weights[name] for name in names}) for names in heaviest]
    yield from problem.ask(mixture for mixture in [space.weighted(weights, drop=True), *shares] if mixture in space)


def best_weights(problem: SearchProblem) -> dict[str, float]:
    """The weights with the highest log-likelihood, by exponentiated gradient ascent (Kivinen and Warmuth, 1997).

    Weights are multiplied by exp(η (gᵢ − ḡ)), with ḡ their weighted mean gradient; if that does not help, η shrinks. The
    ascent ends when no gᵢ exceeds ḡ by more than a hundredth of the largest difference at the start. For a concave likelihood
    this bounds what is left to gain.
    """
    if problem.gradient is None:
        raise InputError(
            "strategy gradient needs objective merged and targets whose scorer is choice, classification, loss or "
            "preference"
        )
    names = problem.space.names
    weights = trying = dict.fromkeys(names, 1 / len(names))
    best, slope, rate, widest = -math.inf, dict.fromkeys(names, 0.0), 0.0, 0.0
    for _ in range(PASSES):
        answer = problem.gradient(Mixture.of(trying))
        if answer is None:
            break
        if answer[0] > best:
            weights, best, slope, rate = trying, answer[0], dict(answer[1]), rate * 1.3
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
    return weights
