"""Strategies that fit a model to the scores so far and propose where it expects an improvement; the list of all strategies."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.special import ndtr

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.space import SearchSpace
from m2m_hf.search.strategies import (
    Proposals,
    SearchProblem,
    Strategy,
    beam,
    climb,
    exhaustive,
    gradient,
    greedy,
    random_search,
)

ENUMERABLE = 4096  # a space of up to so many mixtures is looked at as a whole
PAIRS = 30  # the model has a term for every pair of so many candidates, the best single ones
FEW = 64  # `auto` scores all mixtures if there are at most so many
SUBSETS = 1000  # the best mixtures that an ensemble search keeps where it looks at all subsets
MAX_SUBSETS = 22  # so many candidates still have all their subsets looked at


class ScoreModel:
    """Bayesian ridge regression of the score on the weights, their products, which candidates are in, and 1/|S|.

    The score of averaged parameters is a smooth function of the weights, and its second-order expansion has just these terms:
    Σ wᵢ gᵢ + Σ wᵢ wⱼ hᵢⱼ. A linear model with a normal prior is also a Gaussian process, so its predictions have a standard
    deviation. Terms are standardised, and the priors fitted (MacKay, 1992; scikit-learn's `BayesianRidge`).
    """

    def __init__(self, problem: SearchProblem) -> None:
        self.names = problem.space.names
        best = sorted(range(len(self.names)), key=lambda n: (-problem.single(self.names[n]), n))[:PAIRS]
        self._pairs = np.array(list(combinations(sorted(best), 2)), dtype=int).reshape(-1, 2).T
        self.screen = problem.screen
        from sklearn.linear_model import BayesianRidge  # takes a second to import

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
            columns.append(np.array([[self.screen(mixture)] for mixture in mixtures]))
        return np.hstack(columns)

    def fit(self, known: Mapping[Mixture, float]) -> None:
        """Fits the finite scores of mixtures that may be proposed."""
        names = set(self.names)
        seen = [mixture for mixture, score in known.items() if math.isfinite(score) and names.issuperset(mixture.names)]
        terms, scores = self.terms(seen), np.array([known[mixture] for mixture in seen])
        self._middle, self._width = terms.mean(0), terms.std(0)
        self._width[self._width < 1e-12] = 1.0
        self._offset, self._unit = scores.mean(), scores.std() or 1.0
        self._model.fit((terms - self._middle) / self._width, (scores - self._offset) / self._unit)

    def coefficients(self) -> Any:
        """The coefficients of the terms in their own units, in the order of `terms`."""
        return self._model.coef_ / self._width * self._unit

    def predict(self, mixtures: Sequence[Mixture]) -> tuple[Any, Any]:
        """Expected scores and their standard deviations."""
        mean, deviation = self._model.predict((self.terms(mixtures) - self._middle) / self._width, return_std=True)
        noise = 1 / self._model.alpha_  # of a measurement, which is not part of the score
        deviation = np.sqrt(np.maximum(deviation**2 - noise, 1e-12))
        return mean * self._unit + self._offset, deviation * self._unit


def expected_improvement(mean: Any, deviation: Any, best: float) -> Any:
    """E[max(score − best, 0)] of normal predictions (Mockus, 1978)."""
    z = (mean - best) / deviation
    return (mean - best) * ndtr(z) + deviation * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def unscored(problem: SearchProblem, everything: list[Mixture] | None) -> list[Mixture]:
    """What may be proposed next: the rest of a small space; of a large one, mixtures near the best and some random ones."""
    space, known = problem.space, problem.known
    if everything is not None:
        return [mixture for mixture in everything if mixture not in known]
    inside = sorted((mixture for mixture in known if mixture in space), key=lambda one: (-known[one], one.items))
    near = [move for one in inside[:10] for move in (*space.added(one), *space.dropped(one), *space.swapped(one))]
    far = [space.draw(problem.random) for _ in range(10 * len(space.names))]
    return [mixture for mixture in dict.fromkeys([*near, *far]) if mixture not in known]


def surrogate(problem: SearchProblem) -> Proposals:
    """Bayesian optimisation with `ScoreModel`: fits, proposes the largest expected improvements, fits again.

    Begins with a few random mixtures and, if there is a screen, with the best by it. Ends when it has twice expected less than a
    thousandth of the range of the scores from any proposal; then it climbs from the best mixture.
    """
    space, known = problem.space, problem.known
    everything = list(space.subsets()) if space.at_most(ENUMERABLE) else None
    model = ScoreModel(problem)
    size = max(4, min(len(space.names), problem.budget // 8))
    first = [mixture for _ in range(size) if (mixture := problem.draw_new()) is not None]
    if problem.screen is not None:
        mixtures = unscored(problem, everything)
        first = sorted(mixtures, key=problem.screen, reverse=True)[: 2 * size] + first[: size // 2]
    spent, low = len(dict.fromkeys(first)), 0
    yield from problem.ask(first)
    while spent < problem.budget and low < 2:
        mixtures = unscored(problem, everything)
        finite = [score for score in known.values() if math.isfinite(score)]
        if not mixtures or len(finite) < 3:
            return
        model.fit(known)
        best = max(score for mixture, score in known.items() if mixture in space)
        gain = expected_improvement(*model.predict(mixtures), best)
        order = np.argsort(-gain, kind="stable")[: min(size, problem.budget - spent)]
        low = low + 1 if gain[order[0]] < 1e-3 * (max(finite) - min(finite)) else 0
        yield from problem.ask(mixtures[n] for n in order)
        spent += len(order)
    inside = [mixture for mixture in known if mixture in space]
    if inside and spent < problem.budget:
        yield from climb(problem, problem.best_of(inside))


def bayes(problem: SearchProblem) -> Proposals:
    """Optuna's tree-structured Parzen estimator over which candidates are in, or over their weights."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space, known = problem.space, problem.known
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=problem.seed))
    kind: Any = (
        optuna.distributions.FloatDistribution(-0.5, 1)  # a candidate is out at 0 or below
        if space.continuous
        else optuna.distributions.CategoricalDistribution((False, True))
    )
    kinds = dict.fromkeys(space.names, kind)

    def tell(mixture: Mixture) -> None:
        if math.isfinite(known[mixture]) and set(space.names).issuperset(mixture.names):
            largest = max(mixture.weights.values())
            shares = {name: mixture.weights.get(name, -0.25 * largest) / largest for name in space.names}
            values = shares if space.continuous else {name: share > 0 for name, share in shares.items()}
            study.add_trial(optuna.create_trial(params=values, distributions=kinds, value=known[mixture]))

    def suggest() -> Mixture | None:
        trial = study.ask(kinds)
        # `tell` adds the scored mixture, which may differ from this suggestion.
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        wanted = {name: float(number) for name, number in trial.params.items()}
        order = problem.random.sample(space.names, len(space.names))
        order.sort(key=lambda name: -wanted[name])
        names = space.nearest(order, sum(number > 0 for number in wanted.values()))
        shares = {name: max(wanted[name], 0.01) for name in names}
        mixture = space.weighted(shares) if space.continuous else Mixture.subset(names)
        return mixture if mixture not in known and mixture in space else None

    for mixture in list(known):
        tell(mixture)
    for _ in range(problem.budget):
        suggestions = (suggest() for _ in range(20))
        proposal = next((mixture for mixture in suggestions if mixture is not None), None) or problem.draw_new()
        if proposal is None:
            return
        yield from problem.ask([proposal])
        tell(proposal)


STRATEGIES: dict[str, Strategy] = {
    "exhaustive": exhaustive,
    "random": random_search,
    "greedy": greedy,
    "beam": beam,
    "surrogate": surrogate,
    "bayes": bayes,
    "gradient": gradient,
}


def ensemble_shortcut(space: SearchSpace, strategy: str, targets: int) -> str | None:
    """What the ensemble objective can work out in place of a strategy: the best `weights` or `subsets`; None if neither."""
    if targets > 1 or strategy not in ("auto", "exhaustive"):
        return None
    if space.continuous:
        return "weights"
    return "subsets" if len(space.names) <= MAX_SUBSETS and not space.at_most(FEW) else None


def choose_strategy(space: SearchSpace, likelihoods: bool, max_trials: float = 0) -> tuple[str, str]:
    """The strategy that `auto` takes, and why. With `likelihoods` all targets have gradients and a screen."""
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
