"""Strategies that learn a model of the score from the trials so far, and propose where it expects an improvement."""

import math
import random
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import norm
from sklearn.linear_model import BayesianRidge

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.space import SearchSpace
from m2m_hf.search.strategies import (
    Known,
    SearchProblem,
    Strategy,
    annealing,
    ask,
    beam,
    best_of,
    climb,
    exhaustive,
    fresh,
    gradient,
    greedy,
    random_search,
)

ENUMERABLE = 4096  # up to how many mixtures of the space are all looked at
PAIRS = 30  # of how many candidates, those that scored best alone, the model has a term for every pair


class ScoreModel:
    """Bayesian ridge regression of the score on the weights of a mixture, their products, which candidates are in it, and 1/|S|.

    The score of averaged parameters is a smooth function of the weights, and a second-order expansion of it has just these terms:
    Σ wᵢ gᵢ + Σ wᵢ wⱼ hᵢⱼ. A linear model with a normal prior is also a Gaussian process, so its predictions come with their
    standard deviation. Terms are standardised; the priors are fitted (MacKay, 1992; scikit-learn's `BayesianRidge`).
    """

    def __init__(self, problem: SearchProblem) -> None:
        self.names = problem.space.names
        alone = {name: problem.known.get(Mixture.subset([name]), -math.inf) for name in self.names}
        paired = sorted(range(len(self.names)), key=lambda n: (-alone[self.names[n]], n))[:PAIRS]
        self._pairs = np.array(list(combinations(sorted(paired), 2)), dtype=int).reshape(-1, 2).T
        self.screen = problem.screen
        self._screened: dict[Mixture, float] = {}
        self._model = BayesianRidge()

    def terms(self, mixtures: Sequence[Mixture]) -> Any:
        """The regressors, one row a mixture."""
        place = {name: number for number, name in enumerate(self.names)}
        weights = np.zeros((len(mixtures), len(place)))
        for row, mixture in enumerate(mixtures):
            for name, weight in mixture.items:
                weights[row, place[name]] = weight
        columns = [weights, weights > 0, 1 / np.maximum(1, (weights > 0).sum(1, keepdims=True))]
        columns.append(weights[:, self._pairs[0]] * weights[:, self._pairs[1]])
        if self.screen is not None:
            new = [mixture for mixture in mixtures if mixture not in self._screened]
            self._screened.update(zip(new, self.screen(new) if new else [], strict=True))
            columns.append(np.array([[self._screened[mixture]] for mixture in mixtures]))
        return np.hstack(columns)

    def fit(self, known: Known) -> None:
        """Learns from all scores that are known; mixtures that failed, or hold what may not be proposed, teach nothing."""
        names = set(self.names)
        seen = [mixture for mixture, score in known.items() if math.isfinite(score) and names.issuperset(mixture.names)]
        terms, scores = self.terms(seen), np.array([known[mixture] for mixture in seen])
        self._middle, self._width = terms.mean(0), terms.std(0)
        self._width[self._width < 1e-12] = 1.0
        self._offset, self._unit = scores.mean(), scores.std() or 1.0
        self._model.fit((terms - self._middle) / self._width, (scores - self._offset) / self._unit)

    def coefficients(self) -> Any:
        """Of the terms in their own units, in the order of `terms`."""
        return self._model.coef_ / self._width * self._unit

    def predict(self, mixtures: Sequence[Mixture]) -> tuple[Any, Any]:
        """Expected scores and their standard deviations."""
        mean, deviation = self._model.predict((self.terms(mixtures) - self._middle) / self._width, return_std=True)
        noise = 1 / self._model.alpha_  # of a single measurement; what is asked for is the score itself
        deviation = np.sqrt(np.maximum(deviation**2 - noise, 1e-12))
        return mean * self._unit + self._offset, deviation * self._unit


def expected_improvement(mean: Any, deviation: Any, best: float) -> Any:
    """E[max(score − best, 0)] of normal predictions (Mockus, 1978)."""
    z = (mean - best) / deviation
    return (mean - best) * norm.cdf(z) + deviation * norm.pdf(z)


def pool(space: SearchSpace, known: Known, draw: random.Random, everything: list[Mixture] | None) -> list[Mixture]:
    """Mixtures that may be proposed next: all of a small space; of a large one what is near the best, and some at random."""
    if everything is not None:
        return [mixture for mixture in everything if mixture not in known]
    inside = sorted((mixture for mixture in known if mixture in space), key=lambda one: (-known[one], one.items))
    near = [move for one in inside[:10] for move in (*space.added(one), *space.dropped(one), *space.swapped(one))]
    far = [space.draw(draw) for _ in range(10 * len(space.names))]
    return [mixture for mixture in dict.fromkeys([*near, *far]) if mixture not in known]


def surrogate(problem: SearchProblem) -> Strategy:
    """Bayesian optimisation with `ScoreModel`: fits, proposes the largest expected improvements, fits again.

    Begins with the best by the screen, where there is one, and a few at random. When less than a thousandth of the range of the
    known scores is to be expected from any proposal, twice, it looks around the best one and ends.
    """
    space, known, draw = problem.space, dict(problem.known), random.Random(problem.seed)
    everything = list(space.subsets()) if space.at_most(ENUMERABLE) else None
    model = ScoreModel(problem)
    size = max(4, min(len(space.names), problem.budget // 8))
    first = [mixture for _ in range(size) if (mixture := fresh(space, known, draw)) is not None]
    if problem.screen is not None:
        candidates = pool(space, known, draw, everything)
        values = np.asarray(problem.screen(candidates))
        first = [candidates[n] for n in np.argsort(-values, kind="stable")[: 2 * size]] + first[: size // 2]
    spent, low = len(dict.fromkeys(first)), 0
    yield from ask(known, first)
    while spent < problem.budget and low < 2:
        candidates = pool(space, known, draw, everything)
        finite = [score for score in known.values() if math.isfinite(score)]
        if not candidates or len(finite) < 3:
            return
        model.fit(known)
        best = max(score for mixture, score in known.items() if mixture in space)
        gain = expected_improvement(*model.predict(candidates), best)
        order = np.argsort(-gain, kind="stable")[: min(size, problem.budget - spent)]
        low = low + 1 if gain[order[0]] < 1e-3 * (max(finite) - min(finite)) else 0
        yield from ask(known, [candidates[n] for n in order])
        spent += len(order)
    inside = [mixture for mixture in known if mixture in space]
    if inside and spent < problem.budget:
        yield from climb(space, known, best_of(known, inside))


def bayes(problem: SearchProblem) -> Strategy:
    """Optuna's tree-structured Parzen estimator over which candidates are in, or over their weights."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space, known, draw = problem.space, dict(problem.known), random.Random(problem.seed)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=problem.seed))
    kind: Any = (
        optuna.distributions.FloatDistribution(-0.5, 1)  # up to 0 the candidate is out
        if space.continuous
        else optuna.distributions.CategoricalDistribution((False, True))
    )
    kinds = dict.fromkeys(space.names, kind)

    def tell(mixture: Mixture) -> None:
        if math.isfinite(known[mixture]) and set(space.names).issuperset(mixture.names):
            largest = max(mixture.weights.values())
            given = {name: mixture.weights.get(name, -0.25 * largest) / largest for name in space.names}
            values = given if space.continuous else {name: weight > 0 for name, weight in given.items()}
            study.add_trial(optuna.create_trial(params=values, distributions=kinds, value=known[mixture]))

    for before in known:
        tell(before)
    for _ in range(problem.budget):
        mixture: Mixture | None = None
        for _ in range(20):
            trial = study.ask(kinds)
            # What comes of it is told by `tell`, also where it was mended.
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            wanted = {name: float(value) for name, value in trial.params.items()}
            order = draw.sample(space.names, len(space.names))
            order.sort(key=lambda name: -wanted[name])
            names = space.nearest(order, sum(value > 0 for value in wanted.values()))
            shares = {name: max(wanted[name], 0.01) for name in names}
            asked = space.weighted(shares) if space.continuous else Mixture.subset(names)
            if asked not in known and asked in space:
                mixture = asked
                break
        mixture = mixture or fresh(space, known, draw)
        if mixture is None:
            return
        yield from ask(known, [mixture])
        tell(mixture)


STRATEGIES: dict[str, Callable[[SearchProblem], Strategy]] = {
    "exhaustive": exhaustive,
    "random": random_search,
    "greedy": greedy,
    "beam": beam,
    "annealing": annealing,
    "surrogate": surrogate,
    "bayes": bayes,
    "gradient": gradient,
}
FEW = 64  # mixtures of which `auto` scores all


def choose_strategy(space: SearchSpace, likelihoods: bool, max_trials: float = 0) -> tuple[str, str]:
    """What `auto` takes: (strategy, why).

    Args:
        likelihoods: whether all targets have log-probabilities, and with them gradients and a screen.
        max_trials: the budget, where one was given.
    """
    if space.continuous:
        if likelihoods:
            return "gradient", "the likelihood has a gradient in the weights"
        return "bayes", "the targets have no gradient in the weights"
    if space.at_most(FEW):
        return "exhaustive", f"there are at most {FEW} mixtures"
    if space.at_most(int(max_trials) - len(space.names) - 2):  # singles and all together may not be among them
        return "exhaustive", "max_trials is enough for all mixtures"
    if not space.at_most(ENUMERABLE):
        return "beam", "there are far too many mixtures to look at, and it makes large ones of the best small ones"
    screened = ", screened by what the single candidates score" if likelihoods else ""
    return "surrogate", f"there are too many mixtures to score them all; a model of their scores proposes{screened}"
