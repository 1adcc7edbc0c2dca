"""Ways of choosing a mixture, to be tried on the tables of the study.

A way sees what a user has before anything but the adapters is trained: what surrogates say of every mixture, the rows of every
candidate. It may ask for fine-tuned mixtures, which are counted. A mixture of one is its adapter, so its truth costs nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import rankdata

from m2m_hf.analysis.beliefs import Beliefs, Floats, Prior


@dataclass
class Problem:
    """What a way of choosing sees of one case.

    Args:
        members: (mixtures, candidates), whether a mixture holds a candidate.
        surrogates: name -> (mixtures, validation rows).
        trained: (mixtures, validation rows), to be looked at through `fine_tune`.
        sizes: rows of each candidate.
        similarity: of each candidate with the target.
    """

    members: NDArray[np.bool_]
    surrogates: Mapping[str, Floats]
    trained: Floats
    sizes: Floats
    similarity: Floats
    asked: set[int] = field(default_factory=set)

    @property
    def counts(self) -> NDArray[np.int_]:
        """How many candidates each mixture holds."""
        found: NDArray[np.int_] = self.members.sum(1)
        return found

    @property
    def singles(self) -> list[int]:
        return [int(place) for place in np.flatnonzero(self.counts == 1)]

    @property
    def everything(self) -> int:
        return int(self.counts.argmax())

    def score(self, surrogate: str) -> Floats:
        """What a surrogate says of each mixture; mixtures without a score come last."""
        found: Floats = np.nan_to_num(self.surrogates[surrogate].mean(1), nan=-np.inf)
        return found

    def finite(self, surrogates: Sequence[str]) -> list[Floats]:
        """What those of these surrogates say that there are; of a mixture without a score, the worst."""
        scores = [self.score(name) for name in surrogates if name in self.surrogates]
        return [np.where(np.isfinite(one), one, one[np.isfinite(one)].min()) for one in scores]

    def fine_tune(self, mixture: int) -> float:
        """The validation score of a fine-tuned mixture."""
        if self.counts[mixture] > 1:
            self.asked.add(mixture)
        return float(np.nan_to_num(self.trained[mixture].mean(), nan=-np.inf))


Way = Callable[[Problem], int]


def best_of(problem: Problem, mixtures: Sequence[int]) -> int:
    """The one of these that scores best once it is fine-tuned."""
    return max(mixtures, key=problem.fine_tune)


def all_together(problem: Problem) -> int:
    return problem.everything


def best_single(problem: Problem) -> int:
    return best_of(problem, problem.singles)


def most_similar(problem: Problem) -> int:
    return next(place for place in problem.singles if problem.members[place, problem.similarity.argmax()])


def by(surrogate: str) -> Way:
    """Takes what a surrogate says is best."""
    return lambda problem: int(problem.score(surrogate).argmax())


def by_both(problem: Problem) -> int:
    """The best mean rank by merging and ensemble."""
    return int(order(problem)[0])


def order(problem: Problem, surrogates: Sequence[str] = ("merged", "ensemble")) -> NDArray[np.int_]:
    """Mixtures by their mean rank, best first."""
    known = [name for name in surrogates if name in problem.surrogates]
    return np.argsort(-np.mean([rankdata(problem.score(name)) for name in known], axis=0), kind="stable")


def verified(surrogates: Sequence[str], fine_tunes: int, with_all: bool = True) -> Way:
    """Fine-tunes the first of a ranking, all together, and the next ones; takes the best of these and of the singles."""

    def choose(problem: Problem) -> int:
        larger = [int(place) for place in order(problem, surrogates) if problem.counts[place] > 1]
        first = [problem.everything] if with_all else []
        tried = list(dict.fromkeys([*larger[:1], *first, *larger]))[:fine_tunes]
        return best_of(problem, [*problem.singles, *tried])

    return choose


def believed(problem: Problem, fine_tunes: int, prior: Prior | None = None, with_all: bool = True) -> Beliefs:
    """What is believed once singles are known and so many mixtures were fine-tuned, as `m2m select` does it."""
    beliefs = Beliefs(problem.members.astype(float), problem.finite(("merged", "ensemble")), prior)
    for single in problem.singles:
        beliefs.learn(single, problem.fine_tune(single), is_surrogate=True)
    first = next(int(place) for place in order(problem, ("merged",)) if problem.counts[place] > 1)
    wanted = [*dict.fromkeys([first, problem.everything] if with_all else [first])][:fine_tunes]
    while wanted:
        for mixture in wanted:
            score = problem.fine_tune(mixture)
            if np.isfinite(score):
                beliefs.learn(mixture, score)
            else:
                beliefs.leave_out(mixture)
        wanted = beliefs.next(min(1, fine_tunes - len(problem.asked)))
    return beliefs


def sequential(fine_tunes: int, prior: Prior | None = None, with_all: bool = True) -> Way:
    """Takes the best of those that are known once so many were fine-tuned."""
    return lambda problem: believed(problem, fine_tunes, prior, with_all).best


def fitted(problems: Sequence[Sequence[Problem]]) -> Prior:
    """The prior under which what fine-tuning gave was likeliest, by marginal likelihood, each case weighing the same.

    Args:
        problems: cases, each with its seeds and ways of training.
    """

    def prior(logs: Any) -> Prior:
        values = np.exp(logs)
        level, by_size, slope, members, rest, alike, noise, factor = map(float, values)
        return Prior(level, by_size, slope, members, rest, alike / (1 + alike), noise, factor)

    def unlikely(logs: Any) -> float:
        cases = [np.mean([evidence(problem, prior(logs)) for problem in case]) for case in problems]
        return float(0.02 * np.square(logs - FIRST).sum() - np.sum(cases))

    found = minimize(unlikely, FIRST, method="L-BFGS-B", bounds=[(-5, 3)] * len(FIRST))
    return prior(found.x)


def evidence(problem: Problem, prior: Prior) -> float:
    """Log-likelihood, for each fine-tuned mixture, of what all of two or more have scored."""
    beliefs = Beliefs(problem.members.astype(float), problem.finite(("merged", "ensemble")), prior)
    larger = [*map(int, np.flatnonzero((problem.counts > 1) & np.isfinite(problem.trained.mean(1))))]
    return beliefs.evidence(larger, problem.trained[larger].mean(1)) / len(larger)


FIRST = np.log([0.3, 0.5, 0.5, 0.3, 0.3, 2.2, 0.15, 1.0])  # where the fit of a prior begins, and what it is drawn to
