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
        required: candidates that every mixture contains.
        min_datasets: fewest candidates in a mixture.
        max_datasets: most candidates in a mixture (None: all).
        costs: name -> cost in any unit; 0 for names that are absent.
        max_cost: most that the candidates of a mixture may cost together.
        continuous: allow mixtures of unequal weights too.

    Raises:
        InputError: no mixture meets the constraints.
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
            raise InputError(f"required: {', '.join(absent)} is excluded, so it cannot be in a mixture")
        if self.fewest > self.most:
            raise InputError(
                f"no mixture is possible: min_datasets or required asks for at least {self.fewest} candidates, but "
                f"max_datasets or excluded allows at most {self.most}"
            )
        cheapest = sorted(set(self.names) - self.required, key=self.cost_of)[: self.fewest - len(self.required)]
        least = sum(map(self.cost_of, [*self.required, *cheapest]))
        if not self.allows_cost(least):
            raise InputError(f"max_cost: the cheapest mixture costs {least:g}, more than {self.max_cost:g}")

    @property
    def fewest(self) -> int:
        return max(1, self.min_datasets, len(self.required))

    @property
    def most(self) -> int:
        return min(len(self.names), self.max_datasets or len(self.names))

    def cost_of(self, name: str) -> float:
        return self.costs.get(name, 0.0)

    def allows(self, names: Collection[str]) -> bool:
        """True if these candidates may form a mixture."""
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
        """True if there are at most `count` subsets, not counting what costs and required candidates rule out."""
        return sum(comb(len(self.names), size) for size in range(self.fewest, self.most + 1)) <= count

    def added(self, mixture: Mixture) -> list[Mixture]:
        """The allowed subsets that add one candidate."""
        return self._allowed([*mixture.names, name] for name in self.names if name not in mixture.names)

    def dropped(self, mixture: Mixture) -> list[Mixture]:
        """The allowed subsets that leave one candidate out."""
        return self._allowed([other for other in mixture.names if other != name] for name in mixture.names)

    def swapped(self, mixture: Mixture) -> list[Mixture]:
        """The allowed subsets that replace one candidate."""
        outside = [name for name in self.names if name not in mixture.names]
        return self._allowed(
            [*(other for other in mixture.names if other != old), new] for old in mixture.names for new in outside
        )

    def _allowed(self, subsets: Iterable[list[str]]) -> list[Mixture]:
        return [Mixture.subset(names) for names in subsets if self.allows(names)]

    def nearest(self, order: Sequence[str], size: int) -> tuple[str, ...]:
        """Picks about `size` candidates: the required ones, then the first of `order` (all names) that `max_cost` allows."""
        size = min(max(size, self.fewest), self.most)
        picked = sorted(self.required)
        optional = [name for name in order if name not in self.required]
        for name in optional:
            if len(picked) == size:
                break
            others = sorted(self.cost_of(other) for other in optional if other != name and other not in picked)
            missing = others[: max(0, self.fewest - len(picked) - 1)]  # the cheapest that still make `fewest`
            if self.allows_cost(sum(map(self.cost_of, [*picked, name])) + sum(missing)):
                picked.append(name)
        return tuple(sorted(picked))

    def draw(self, rng: Random) -> Mixture:
        """A random mixture: uniform over the sizes, then over the candidates; `continuous` weights uniform on the simplex."""
        names = self.nearest(rng.sample(self.names, len(self.names)), rng.randint(self.fewest, self.most))
        if not self.continuous:
            return Mixture.subset(names)
        return self.weighted({name: rng.expovariate(1.0) for name in names})

    @staticmethod
    def weighted(values: Mapping[str, float], drop: bool = False) -> Mixture:
        """The mixture with weights in proportion to `values` (≥ 0, not all 0).

        Weights below 0.01 are left out with `drop`, unless all are; else they are raised to 0.01, or to half an equal weight.
        """
        total = sum(values.values())
        shares = {name: value / total for name, value in values.items()}
        if drop and max(shares.values()) >= 0.01:
            shares = {name: share for name, share in shares.items() if share >= 0.01}
        least = min(0.01, 0.5 / len(shares))
        shares = {name: max(share, least) for name, share in shares.items()}
        return Mixture.of({name: share / sum(shares.values()) for name, share in shares.items()})
