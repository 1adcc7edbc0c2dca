"""Ways of choosing a mixture, to be tried on the tables of the study.

A way sees what a user has before anything but the adapters is trained: what surrogates say of every mixture, the rows of every
candidate. It may ask for fine-tuned mixtures, which are counted. A mixture of one is its adapter, so its truth costs nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from beliefs import Beliefs, Floats, Posterior
from numpy.typing import NDArray
from scipy.stats import rankdata


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


def believed(problem: Problem, fine_tunes: int, beliefs: Beliefs, with_all: bool = True) -> Posterior:
    """What is believed once singles are known and so many mixtures were fine-tuned, each for what it was expected to add."""
    posterior = Posterior(problem.members, problem.finite(("merged", "ensemble")), beliefs)

    def learn(mixture: int) -> None:
        score = problem.fine_tune(mixture)
        posterior.learn(mixture, score if np.isfinite(score) else float(posterior.mean.min()))

    for single in problem.singles:
        learn(single)
    for number in range(fine_tunes):
        wanted = problem.everything if with_all and number == 0 else posterior.next
        if wanted is not None:
            learn(wanted)
    return posterior


def sequential(fine_tunes: int, beliefs: Beliefs, with_all: bool = True, only_seen: bool = True) -> Way:
    """Takes the best as believed, among those fine-tuned if `only_seen`."""

    def choose(problem: Problem) -> int:
        posterior = believed(problem, fine_tunes, beliefs, with_all)
        if only_seen and fine_tunes:
            return max(posterior.seen, key=lambda place: float(posterior.mean[place]))
        return posterior.best

    return choose


GRID: dict[str, Sequence[Any]] = {
    "by_size": (0.2, 0.5, 1.0),
    "members": (0.1, 0.3, 0.6, 1.0),
    "rest": (0.15, 0.3, 0.6),
    "noise": (0.05, 0.15),
}


def grid() -> list[Beliefs]:
    """Beliefs among which leave-one-case-out chooses."""
    return [Beliefs(**dict(zip(GRID, values, strict=True))) for values in product(*GRID.values())]
