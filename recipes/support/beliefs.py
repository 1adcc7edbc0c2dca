"""What is believed of fine-tuned mixtures, from surrogates, and sharpened by a few that are really fine-tuned.

A surrogate tells useless mixtures from useful ones well, and useful ones from each other badly: averages are optimistic, the
more so the more adapters they hold. Singles are not, since a single's adapter is its fine-tune. So the truth of every mixture is
taken as a Gaussian around what the surrogates say, with what they may have wrong as its covariance: a slope in the number of
datasets, their own scale, what one dataset adds, and a rest that is alike for mixtures that differ in few datasets (a Gaussian
process on memberships; Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, §2.7). Every fine-tuned mixture
then says something of all others. The next one is the one from which the choice is expected to gain most (expected improvement;
Jones, Schonlau and Welch, Efficient global optimization, 1998).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Beliefs:
    """What surrogates may have wrong, in standard deviations of their scores over the mixtures.

    Args:
        level: spread of a shift of all mixtures but the base.
        by_size: spread of the slope in log2 of the number of datasets.
        slope: spread of the surrogates' own slopes.
        members: spread of what holding one candidate adds.
        rest: spread of what is left.
        alike: how alike that is, for each candidate by which two mixtures differ.
        noise: of a training, beside what comes of the rows.
    """

    level: float = 0.2
    by_size: float = 0.5
    slope: float = 0.3
    members: float = 0.3
    rest: float = 0.3
    alike: float = 0.7
    noise: float = 0.1


class Posterior:
    """The mean and covariance of the true scores of mixtures.

    Args:
        members: of shape (mixtures, candidates), whether a mixture holds a candidate; none is empty.
        scores: what each surrogate says of every mixture; finite.
    """

    def __init__(self, members: NDArray[np.bool_], scores: Sequence[Floats], beliefs: Beliefs) -> None:
        mean = np.mean(scores, axis=0)
        self._scale = float(mean.std()) or 1.0
        self._noise = (beliefs.noise * self._scale) ** 2
        size = np.log2(members.sum(1))
        parts = [np.full((1, len(mean)), beliefs.level), beliefs.by_size * size[None]]
        parts += [beliefs.slope * (one - one.max())[None] / self._scale for one in scores]
        parts += [beliefs.members * (members - members.mean(0)).T]
        features = np.concatenate(parts)
        apart = (members[:, None] != members[None]).sum(2)
        self.mean: Floats = mean
        self.covariance: Floats = self._scale**2 * (features.T @ features + beliefs.rest**2 * beliefs.alike**apart)
        self.seen: dict[int, float] = {}

    def learn(self, mixture: int, score: float, variance: float = 0.0) -> None:
        """Takes in what a mixture scores once it is fine-tuned; `variance` is what comes of the rows."""
        column = self.covariance[:, mixture]
        gain = column / (column[mixture] + self._noise + variance)
        self.mean = self.mean + gain * (score - self.mean[mixture])
        self.covariance = self.covariance - np.outer(gain, column)
        self.seen[mixture] = score

    @property
    def spread(self) -> Floats:
        """Standard deviation of every mixture's score."""
        found: Floats = np.sqrt(np.maximum(np.diag(self.covariance), 0.0))
        return found

    @property
    def best(self) -> int:
        return int(self.mean.argmax())

    def worth(self) -> Floats:
        """By how much the choice is expected to gain if a mixture is fine-tuned next; nothing from those that were."""
        spread = np.maximum(self.spread, 1e-12 * self._scale)
        z = (self.mean - self.mean.max()) / spread
        worth: Floats = spread * (z * norm.cdf(z) + norm.pdf(z))
        worth[list(self.seen)] = 0.0
        return worth

    @property
    def next(self) -> int | None:
        """The mixture that is best fine-tuned next; None if all were."""
        unseen = [place for place in range(len(self.mean)) if place not in self.seen]
        worth = self.worth()
        return max(unseen, key=lambda place: (worth[place], self.mean[place]), default=None)

    def sure(self, within: float, seed: int = 0, draws: int = 4000) -> float:
        """The probability that the best mixture here is within so much of the truly best one."""
        mean, covariance = self.mean / self._scale, self.covariance / self._scale**2
        truth = np.random.default_rng(seed).multivariate_normal(mean, covariance, size=draws, method="eigh")
        reached: Any = truth[:, self.best] >= truth.max(1) - within / self._scale
        return float(reached.mean())
