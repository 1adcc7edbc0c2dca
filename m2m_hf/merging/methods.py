"""Merge methods beside the average, to compare it with; each on the deltas ΔW themselves, as its paper defines it.

The average and task arithmetic are linear in the deltas, so of LoRA adapters the gated stack computes them. The others, and all
of them for full-parameter experts, are computed layer by layer and written into the base model's weights, which are restored
from a copy and never by subtracting.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from m2m_hf.config.run_config import MERGE_PARAMETERS
from m2m_hf.config.search_space import merge_label
from m2m_hf.errors import InputError

Deltas = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class MergeMethod:
    """How the adapters of a mixture are merged.

    Args:
        name: `average` (the paper's), `task_arithmetic` (W0 + λ Σ ΔW; Ilharco et al., 2023), `ties` (trim, elect signs, mean of
            those that agree; Yadav et al., 2023), `dare` (drop at random, rescale, average; Yu et al., 2024), `svd` (the average,
            truncated to a lower rank) or `linear` (what PEFT's `combination_type="linear"` does: factors are summed apart).
        scaling: λ of `task_arithmetic` and `ties`.
        density: share of the entries of a delta that `ties` keeps (its largest), or `dare` (at random); weights that training
            left as they were are no entries.
        rank: of `svd`; None: that of the adapters.
        seed: of `dare`.
    """

    name: str = "average"
    scaling: float = 1.0
    density: float = 1.0
    rank: int | None = None
    seed: int = 0

    @classmethod
    def of(cls, name: str, parameters: Mapping[str, Any], seed: int) -> "MergeMethod":
        """The method with the parameters given and the defaults of `config.MERGE_PARAMETERS`."""
        return cls(name, **{**MERGE_PARAMETERS[name], **parameters}, seed=seed if name == "dare" else 0)

    @property
    def label(self) -> str:
        """What the journal calls the objective: `merged` for the average."""
        return merge_label(self.name, {key: getattr(self, key) for key in MERGE_PARAMETERS[self.name]}, self.seed)

    @property
    def gated(self) -> bool:
        """Whether it is linear in the deltas, so that the gated stack computes it."""
        return self.name in ("average", "task_arithmetic")

    def gates(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The weights of the deltas, for methods that are linear in them."""
        factor = self.scaling * len(weights) if self.name == "task_arithmetic" else 1.0
        return {name: factor * weight for name, weight in weights.items()}


AVERAGE = MergeMethod()


def sum_of(tensors: Iterator[torch.Tensor]) -> torch.Tensor:
    first = next(tensors)
    for other in tensors:
        first = first + other
    return first


def kth_largest(tensors: Callable[[], Iterator[torch.Tensor]], k: int) -> float:
    """The k-th largest magnitude in several fp32 tensors, exactly, without holding them together.

    Magnitudes are sorted as their bit patterns are, so two passes of counting find it: first by the upper half of the bits, then,
    among those that share the right one, by the lower.

    Args:
        tensors: gives them, each time it is called.
    """

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.abs().contiguous().view(torch.int32).flatten()

    def find(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
        above = counts.flip(0).cumsum(0)
        place = int((above >= wanted).nonzero()[0])
        return len(counts) - 1 - place, wanted - int(above[place] - counts.flip(0)[place])

    upper = sum_of(torch.bincount(bits(one) >> 16, minlength=1 << 15) for one in tensors())
    high, rest = find(upper, k)
    lower = sum_of(
        torch.bincount(found[(found >> 16) == high] & 0xFFFF, minlength=1 << 16) for found in map(bits, tensors())
    )
    low, _ = find(lower, rest)
    return float(torch.tensor([(high << 16) | low], dtype=torch.int32).view(torch.float32))


def ties(deltas: Deltas, weights: Mapping[str, float], thresholds: Mapping[str, float]) -> torch.Tensor:
    """TIES of one layer: entries below an adapter's threshold are trimmed, the sign with more mass is elected, and those that
    have it are averaged."""
    trimmed = {name: torch.where(delta.abs() >= thresholds[name], delta, 0.0) for name, delta in deltas.items()}
    sign = sum_of(weights[name] * delta for name, delta in trimmed.items()).sign()
    agreeing = {name: delta.sign() * sign > 0 for name, delta in trimmed.items()}
    total = sum_of(weights[name] * torch.where(agreeing[name], delta, 0.0) for name, delta in trimmed.items())
    mass = sum_of(weights[name] * agrees.float() for name, agrees in agreeing.items())
    return torch.where(mass > 0, total / mass.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)


def dare(delta: torch.Tensor, density: float, seed: str) -> torch.Tensor:
    """A delta with entries dropped at random and the others scaled up to the same expectation; the same seed, the same ones."""
    generator = torch.Generator().manual_seed(int(seed, 16) >> 1)
    kept = torch.rand(delta.shape, generator=generator).to(delta.device) < density
    return torch.where(kept, delta / density, 0.0)


def truncated(a: torch.Tensor, b: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of B A of this rank (Eckart and Young, 1936), by the SVD of a small core."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    product: torch.Tensor = ((q_b @ u[:, :rank]) * s[:rank]) @ (q_a @ v[:rank].T).T
    return product


def truncated_dense(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The same of a matrix that is not given by factors; of more dimensions the first against all others."""
    u, s, v = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
    product: torch.Tensor = (u[:, :rank] * s[:rank]) @ v[:rank]
    return product.view(matrix.shape)


def linear(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]], weights: Mapping[str, float]
) -> torch.Tensor:
    """What PEFT's `combination_type="linear"` makes: Σ √(w s) B times Σ √(w s) A, which has cross terms and is not Σ w s B A.

    Raises:
        InputError: adapters of different rank.
    """
    ranks = {name: len(a) for name, (a, _, _) in factors.items()}
    if len(set(ranks.values())) > 1:
        raise InputError(f"merge_method: linear needs adapters of one rank, got {ranks}")
    roots = {name: math.sqrt(weights[name] * scale) for name, (_, _, scale) in factors.items()}
    a = sum_of(roots[name] * a for name, (a, _, _) in factors.items())
    b = sum_of(roots[name] * b for name, (_, b, _) in factors.items())
    return b @ a
