"""A mixture: candidate names and their weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, isclose


@dataclass(frozen=True)
class Mixture:
    """Candidate names and their weights: sorted by name, every weight > 0, sum 1.

    A subset is a mixture of equal weights. The empty mixture stands for the base model, which is scored like every other
    but can never be chosen.
    """

    items: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        names = self.names
        if list(names) != sorted(set(names)):
            raise ValueError(f"names must be sorted and unique, got {names}")
        if any(not 0 < weight < inf for weight in self.weights.values()):
            raise ValueError(f"weights must be positive and finite, got {self.weights}")
        if names and not isclose(sum(self.weights.values()), 1.0, rel_tol=1e-9):
            raise ValueError(f"weights must sum to 1, got {sum(self.weights.values())}")

    @classmethod
    def subset(cls, names: Iterable[str]) -> "Mixture":
        """The equal-weight mixture of `names`; without names, the base model."""
        ordered = sorted(names)
        return cls(tuple((name, 1.0 / len(ordered)) for name in ordered))

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> "Mixture":
        """The mixture with these weights (> 0, sum 1)."""
        return cls(tuple(sorted(weights.items())))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.items)

    @property
    def weights(self) -> dict[str, float]:
        return dict(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __str__(self) -> str:
        """`base model`, `a + b`, or `0.7 a + 0.3 b` where the weights differ."""
        if not self.items:
            return "base model"
        if len(set(self.weights.values())) == 1:
            return " + ".join(self.names)
        return " + ".join(f"{weight:.3g} {name}" for name, weight in self.items)


BASE = Mixture(())


def row_counts(mixture: Mixture, rows: Mapping[str, int]) -> dict[str, int]:
    """How many rows of each candidate the mixture takes: all if the weights are equal, otherwise in proportion to them."""
    if len(set(mixture.weights.values())) <= 1:
        return {name: rows[name] for name in mixture.names}
    total = min(rows[name] / weight for name, weight in mixture.items)
    return {name: max(1, min(rows[name], round(weight * total))) for name, weight in mixture.items}
