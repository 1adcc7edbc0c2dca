"""What fine-tuning on a mixture is expected to give: what surrogates say, corrected by the few mixtures that were fine-tuned.

A surrogate tells useless mixtures from useful ones well, and useful ones from each other badly. Averages are optimistic, the more
so the more adapters they hold, while the fine-tuned mixture may train longer. Singles are not: a single's adapter is its
fine-tune. So the true score of a mixture is taken as normal around what surrogates say. What they have wrong is a shift of all,
a slope in the number of datasets, a slope of each surrogate, what one dataset adds, and a rest that is alike for mixtures that
differ in few datasets: a Gaussian process over memberships (Rasmussen and Williams, Gaussian Processes for Machine Learning,
2006, §2.7). By how much they are wrong in all differs by a factor of fifty from case to case. So that factor is not fixed, but
weighed by how well each value explains what was fine-tuned (§5.2). Every fine-tuned mixture thus says something of all others.
The next one is the one from which the choice is expected to gain most (expected improvement; Jones, Schonlau and Welch, Efficient
global optimization of expensive black-box functions, 1998).
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.special import logsumexp, ndtr

Floats = NDArray[np.float64]
SCALES = (
    0.1,
    0.2,
    0.4,
    0.8,
    1.6,
    3.2,
    6.4,
)  # by how much surrogates may be wrong in all, each as likely before anything is known
DRAWS = 4000


@dataclass(frozen=True)
class Prior:
    """What surrogates have wrong: standard deviations, in those of their own scores over the mixtures.

    The defaults are fitted to the cases of the selection study (`recipes/selection_study/replay.py --fit`), apart from those
    that were set aside.

    Args:
        level: of a shift of all mixtures.
        by_size: of the slope in log2 of the number of datasets.
        slope: of each surrogate's own slope.
        members: of what holding one candidate adds.
        rest: of what is left.
        alike: how alike that is, for each candidate by which two mixtures differ; above 0, below 1.
        noise: of a training with another seed.
        factor: of the natural logarithm of the factor by which surrogates are more or less wrong in all.
    """

    level: float = 0.26
    by_size: float = 0.82
    slope: float = 0.28
    members: float = 0.5
    rest: float = 1.06
    alike: float = 0.63
    noise: float = 0.38
    factor: float = 0.74


class Beliefs:
    """The distribution of the true scores of mixtures, in the light of those that are known.

    Args:
        weights: of shape (mixtures, candidates), of each mixture; only their ratios count. None is empty.
        scores: what each surrogate says of every mixture; finite.
        prior: what these may have wrong.
    """

    def __init__(self, weights: NDArray[Any], scores: Sequence[Floats], prior: Prior | None = None) -> None:
        prior = prior or Prior()
        members = weights / weights.max(1, keepdims=True)
        self.surrogate: Floats = np.mean(scores, axis=0)
        self._unit = float(self.surrogate.std()) or 1.0
        size = np.log2(np.maximum(1.0, (members > 0).sum(1)))
        parts = [np.full((1, len(size)), prior.level), prior.by_size * size[None]]
        parts += [prior.slope * (one - one.max())[None] / (float(one.std()) or 1.0) for one in scores]
        parts += [prior.members * (members - members.mean(0)).T]
        features = np.concatenate(parts)
        apart = cdist(members, members, "cityblock")
        self._covariance: Floats = features.T @ features + prior.rest**2 * prior.alike**apart
        self._noise = prior.noise
        before = -0.5 * np.square(np.log(SCALES) / prior.factor)
        self._before: Floats = before - logsumexp(before)
        self.known: dict[int, float] = {}
        self._seen: dict[int, float] = {}
        self._out: set[int] = set()
        self._update()

    def learn(self, mixture: int, score: float, is_surrogate: bool = False, may_be_chosen: bool = True) -> None:
        """Takes in what a mixture scores once it is fine-tuned.

        Args:
            is_surrogate: what surrogates say of it is this very score, as of a single; it tells nothing of how wrong they are.
            may_be_chosen: False of one that falls below a limit: it still tells of others.
        """
        if may_be_chosen:
            self.known[mixture] = score
        else:
            self._out.add(mixture)
        if not is_surrogate:
            self._seen[mixture] = score
        self._update()

    def forget(self, mixture: int) -> None:
        """Takes back that a mixture may be chosen for the score that it is known by, before it is known by another."""
        del self.known[mixture]

    def leave_out(self, mixture: int) -> None:
        """Forgets a mixture that cannot be fine-tuned."""
        self._out.add(mixture)

    def _update(self) -> None:
        seen = [*self._seen]
        wrong = np.array([(score - self.surrogate[place]) / self._unit for place, score in self._seen.items()])
        across, noisy = self._covariance[seen], self._noisy(seen)
        gains = np.linalg.solve(noisy, across)
        # The factor scales signal and noise alike, so that it changes spreads and its own likelihood, but no mean.
        self.mean: Floats = self.surrogate + self._unit * (wrong @ gains)
        self._left: Floats = self._unit**2 * (self._covariance - across.T @ gains)
        likelihood = self._before + self._likelihoods(noisy, wrong)
        self.likely: Floats = np.exp(likelihood - logsumexp(likelihood))
        for place, score in self.known.items():
            self.mean[place] = score
            self._left[place] = self._left[:, place] = 0.0

    def _noisy(self, seen: Sequence[int]) -> Floats:
        """Covariance of what mixtures score once they are fine-tuned, for a factor of 1."""
        found: Floats = self._covariance[np.ix_(seen, seen)] + self._noise**2 * np.eye(len(seen))
        return found

    def _likelihoods(self, noisy: Floats, wrong: Floats) -> Floats:
        """Log-likelihood of what surrogates had wrong, for every factor."""
        fit = float(wrong @ np.linalg.solve(noisy, wrong))
        size = float(np.linalg.slogdet(2 * math.pi * noisy)[1]) if len(wrong) else 0.0
        return np.array([-0.5 * (fit / scale**2 + size) - len(wrong) * math.log(scale) for scale in SCALES])

    def evidence(self, mixtures: Sequence[int], scores: Floats) -> float:
        """Log-likelihood of what these mixtures score once they are fine-tuned, before anything is known; to fit a prior."""
        wrong = (scores - self.surrogate[mixtures]) / self._unit
        return float(logsumexp(self._before + self._likelihoods(self._noisy(mixtures), wrong)))

    @property
    def best(self) -> int:
        """The best of those that are known; of none, the one with the highest expectation."""
        return max(self.known or range(len(self.mean)), key=lambda place: (self.mean[place], -place))

    @property
    def spread(self) -> Floats:
        """Standard deviation of every mixture's true score; 0 where it is known."""
        scale = float(self.likely @ np.square(SCALES))
        found: Floats = np.sqrt(scale * np.maximum(np.diag(self._left), 0.0))
        return found

    def gains(self) -> Floats:
        """By how much the choice is expected to gain if a mixture is fine-tuned next; 0 of those that need not or cannot be."""
        deviation = np.sqrt(np.maximum(np.diag(self._left), 1e-18 * self._unit**2))
        better = self.mean - self.mean[self.best]
        gains: Floats = np.zeros(len(self.mean))
        for scale, likely in zip(SCALES, self.likely, strict=True):
            z = better / (scale * deviation)
            gains += likely * (better * ndtr(z) + scale * deviation * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))
        gains[[*self.known, *self._out]] = 0.0
        return gains

    def beaten_by(self, mixture: int) -> float:
        """The probability that a mixture scores higher than the chosen one once it is fine-tuned."""
        deviation = math.hypot(math.sqrt(max(self._left[mixture, mixture], 0.0)), self._noise * self._unit)
        better = self.mean[mixture] - self.mean[self.best]
        return float(self.likely @ ndtr(better / (deviation * np.array(SCALES))))

    def next(self, several: int = 1) -> list[int]:
        """The mixtures that are best fine-tuned next, at most so many.

        Of several that are trained at once, each is chosen as if those before it had come out as expected (the "kriging
        believer"; Ginsbourger, Le Riche and Carraro, Kriging is well-suited to parallelize optimization, 2010).
        """
        beliefs, found = copy.deepcopy(self), list[int]()
        for _ in range(several):
            gains, done = beliefs.gains(), {*beliefs.known, *self._out}
            left = [place for place in range(len(gains)) if place not in done]
            if not left:
                break
            found.append(max(left, key=lambda place: (gains[place], beliefs.mean[place], -place)))
            beliefs.learn(found[-1], float(beliefs.mean[found[-1]]))
        return found

    def behind(self, row_errors: Floats, seed: int = 0) -> tuple[Floats, Floats]:
        """(by how much the best mixture may be better than the chosen one; the noise of a training), each of shape (DRAWS,).

        Args:
            row_errors: of shape (mixtures,), the standard error over rows of the difference between each and the chosen one.
        """
        random = np.random.default_rng(seed)
        scale = np.repeat(SCALES, random.multinomial(DRAWS, self.likely))
        values, vectors = np.linalg.eigh(self._left)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        scores = self.mean + scale[:, None] * (random.standard_normal((DRAWS, len(self.mean))) @ root.T)
        noise: Floats = scale * self._noise * self._unit
        if self.best not in self.known:
            scores[:, self.best] += random.standard_normal(DRAWS) * noise
        scores += random.standard_normal(DRAWS)[:, None] * row_errors
        scores[:, [*self._out]] = -np.inf
        return scores.max(1) - scores[:, self.best], noise
