"""The mixtures that may be proposed."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb, inf
from random import Random

from m2m_hf.core.mixture import Mixture
from m2m_hf.errors import InputError


@dataclass(frozen=True)
class SearchSpace:
    """The mixtures that may be proposed.

    Args:
        names: the candidates that may be in a mixture.
        required: every mixture contains these.
        min_datasets: fewest candidates in a mixture.
        max_datasets: most candidates in a mixture (None: all).
        costs: what each candidate costs, in any unit; absent ones nothing.
        max_cost: most that the candidates of a mixture may cost together.
        continuous: whether mixtures of unequal weights may be proposed too.

    Raises:
        InputError: no mixture meets all of it.
    """

    names: tuple[str, ...]
    required: frozenset[str] = frozenset()
    min_datasets: int = 1
    max_datasets: int | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    max_cost: float = inf
    continuous: bool = False

    def __post_init__(self) -> None:
        absent = sorted(self.required - set(self.names))
        if absent:
            raise InputError(f"required: {', '.join(absent)} cannot be in a mixture, being excluded")
        if self.fewest > self.most:
            raise InputError(
                f"no mixture is possible: at least {self.fewest} candidates are asked for (min_datasets, or those required) "
                f"and at most {self.most} allowed (max_datasets, or those not excluded)"
            )
        cheapest = sorted(set(self.names) - self.required, key=self.cost_of)[: self.fewest - len(self.required)]
        least = sum(map(self.cost_of, [*self.required, *cheapest]))
        if not self.allows_cost(least):
            raise InputError(f"max_cost: the cheapest mixture allowed costs {least:g}, more than {self.max_cost:g}")

    @property
    def fewest(self) -> int:
        return max(1, self.min_datasets, len(self.required))

    @property
    def most(self) -> int:
        return min(len(self.names), self.max_datasets or len(self.names))

    def cost_of(self, name: str) -> float:
        return self.costs.get(name, 0.0)

    def allows(self, names: Collection[str]) -> bool:
        """Whether these candidates may be a mixture."""
        return (
            self.fewest <= len(names) <= self.most
            and self.required <= set(names) <= set(self.names)
            and self.allows_cost(sum(map(self.cost_of, names)))
        )

    def allows_cost(self, cost: float) -> bool:
        return cost <= self.max_cost * (1 + 1e-9)

    def __contains__(self, mixture: Mixture) -> bool:
        return self.allows(mixture.names) and (self.continuous or len(set(mixture.weights.values())) == 1)

    def subsets(self) -> Iterator[Mixture]:
        """Every allowed subset, smaller ones first, then in the order of `names`."""
        for size in range(self.fewest, self.most + 1):
            for names in combinations(self.names, size):
                if self.allows(names):
                    yield Mixture.subset(names)

    def at_most(self, count: int) -> bool:
        """Whether there are no more than `count` subsets, costs and required candidates aside."""
        return sum(comb(len(self.names), size) for size in range(self.fewest, self.most + 1)) <= count

    def added(self, mixture: Mixture) -> list[Mixture]:
        """The allowed subsets with one candidate more."""
        return self._allowed([*mixture.names, name] for name in self.names if name not in mixture.names)

    def dropped(self, mixture: Mixture) -> list[Mixture]:
        """The allowed subsets with one candidate less."""
        return self._allowed([other for other in mixture.names if other != name] for name in mixture.names)

    def swapped(self, mixture: Mixture) -> list[Mixture]:
        """The allowed subsets in which one candidate has taken another's place."""
        outside = [name for name in self.names if name not in mixture.names]
        return self._allowed(
            [*(other for other in mixture.names if other != old), new] for old in mixture.names for new in outside
        )

    def _allowed(self, several: Iterable[list[str]]) -> list[Mixture]:
        return [Mixture.subset(names) for names in several if self.allows(names)]

    def step(self, mixture: Mixture, rng: Random, tries: int = 100) -> Mixture | None:
        """A random allowed subset that one candidate more, one less or another one makes; None where many tries find none."""
        inside, outside = list(mixture.names), [name for name in self.names if name not in mixture.names]
        for _ in range(tries):
            kind = rng.choice(("add", "drop", "swap"))
            names = set(inside)
            if kind != "add":
                names.discard(rng.choice(inside))
            if kind != "drop" and outside:
                names.add(rng.choice(outside))
            if names != set(inside) and self.allows(names):
                return Mixture.subset(names)
        return None

    def nearest(self, order: Sequence[str], size: int) -> tuple[str, ...]:
        """The allowed candidates that come first in `order`: what is required, and others up to `size` as far as `max_cost` goes.

        Args:
            order: all names, the most wanted first.
        """
        size = min(max(size, self.fewest), self.most)
        taken = sorted(self.required)
        left = [name for name in order if name not in self.required]
        for name in list(left):
            if len(taken) == size:
                break
            others = sorted(self.cost_of(other) for other in left if other != name and other not in taken)
            rest = others[: max(0, self.fewest - len(taken) - 1)]  # what it takes to be as many as there must be
            if self.allows_cost(sum(map(self.cost_of, [*taken, name])) + sum(rest)):
                taken.append(name)
        return tuple(sorted(taken))

    def draw(self, rng: Random) -> Mixture:
        """A random mixture: all sizes alike, then all candidates alike; with `continuous`, its weights uniform on the simplex."""
        names = self.nearest(rng.sample(self.names, len(self.names)), rng.randint(self.fewest, self.most))
        return (
            self.weighted({name: rng.expovariate(1.0) for name in names}) if self.continuous else Mixture.subset(names)
        )

    @staticmethod
    def weighted(values: Mapping[str, float], drop: bool = False) -> Mixture:
        """The mixture whose weights are in proportion to `values` (≥ 0, not all 0).

        Args:
            drop: leave out shares below a hundredth, unless all are; otherwise they are raised to it, or to half an equal share.
        """
        total = sum(values.values())
        shares = {name: value / total for name, value in values.items()}
        if drop and max(shares.values()) >= 0.01:
            shares = {name: share for name, share in shares.items() if share >= 0.01}
        least = min(0.01, 0.5 / len(shares))
        shares = {name: max(share, least) for name, share in shares.items()}
        return Mixture.of({name: share / sum(shares.values()) for name, share in shares.items()})
