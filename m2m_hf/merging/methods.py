"""Merge methods to compare the average with, each on the deltas ΔW as its paper defines it.

The average and task arithmetic are linear in the deltas, so for LoRA adapters the gated stack computes them. The others, and
all of them for full-parameter experts, are computed layer by layer and written into the base model's weights.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from m2m_hf.config.run_config import MERGE_PARAMETERS
from m2m_hf.config.search_space import merge_label
from m2m_hf.errors import InputError
from m2m_hf.merging.adapter import LowRankChange
from m2m_hf.merging.expert import Change

Deltas = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class MergeMethod:
    """How the adapters of a mixture are merged.

    Args:
        name: `average` (the paper's), `task_arithmetic` (W0 + λ Σ ΔW; Ilharco et al., 2023), `ties` (trim, elect signs, mean of
            those that agree; Yadav et al., 2023), `dare` (drop at random, rescale, average; Yu et al., 2024) or `linear` (PEFT's
            `combination_type="linear"`: factors are summed separately).
        scaling: λ of `task_arithmetic` and `ties`.
        density: share of a delta's entries that `ties` (the largest) or `dare` (at random) keeps. Weights that training did not
            change do not count as entries.
        seed: of `dare`.
    """

    name: str = "average"
    scaling: float = 1.0
    density: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, name: str, parameters: Mapping[str, Any], seed: int) -> "MergeMethod":
        """Builds the method from these parameters and the defaults of `MERGE_PARAMETERS`."""
        return cls(name, **{**MERGE_PARAMETERS[name], **parameters}, seed=seed if name == "dare" else 0)

    @property
    def label(self) -> str:
        """The objective's name in the journal: `merged` for the average."""
        return merge_label(self.name, {key: getattr(self, key) for key in MERGE_PARAMETERS[self.name]}, self.seed)

    @property
    def gated(self) -> bool:
        """True if the method is linear in the deltas, so that the gated stack can compute it."""
        return self.name in ("average", "task_arithmetic")

    def gates(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Returns the weights of the deltas, for methods that are linear in them."""
        factor = self.scaling * len(weights) if self.name == "task_arithmetic" else 1.0
        return {name: factor * weight for name, weight in weights.items()}


AVERAGE = MergeMethod()


def weighted_sum(parts: Iterable[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """Returns Σ w t over pairs (t, w), added up in their order."""
    total: torch.Tensor | None = None
    for tensor, weight in parts:
        total = weight * tensor if total is None else total.add_(tensor, alpha=weight)
    assert total is not None
    return total


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

    upper = sum(torch.bincount(bits(tensor) >> 16, minlength=1 << 15) for tensor in tensors())
    high, rest = find(torch.as_tensor(upper), k)
    same_high = (one[(one >> 16) == high] for one in map(bits, tensors()))
    lower = sum(torch.bincount(one & 0xFFFF, minlength=1 << 16) for one in same_high)
    low, _ = find(torch.as_tensor(lower), rest)
    return float(torch.tensor([(high << 16) | low], dtype=torch.int32).view(torch.float32))


def ties(deltas: Deltas, weights: Mapping[str, float], thresholds: Mapping[str, float]) -> torch.Tensor:
    """TIES of one layer.

    Entries below an expert's threshold are trimmed, the sign with more mass is elected, and the entries that have it are
    averaged.
    """
    trimmed = {name: torch.where(delta.abs() >= thresholds[name], delta, 0.0) for name, delta in deltas.items()}
    sign = weighted_sum((delta, weights[name]) for name, delta in trimmed.items()).sign()
    agreeing = {name: delta.sign() * sign > 0 for name, delta in trimmed.items()}
    total = weighted_sum((torch.where(agreeing[name], delta, 0.0), weights[name]) for name, delta in trimmed.items())
    mass = weighted_sum((agrees.float(), weights[name]) for name, agrees in agreeing.items())
    return torch.where(mass > 0, total / mass.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)


def dare(delta: torch.Tensor, density: float, seed: str) -> torch.Tensor:
    """Drops entries of a delta at random and scales up the others to the same expectation; the seed decides which."""
    generator = torch.Generator().manual_seed(int(seed, 16) >> 1)
    kept = torch.rand(delta.shape, generator=generator).to(delta.device) < density
    return torch.where(kept, delta / density, 0.0)


def linear(changes: Mapping[str, Change], weights: Mapping[str, float]) -> torch.Tensor:
    """Returns Σ √(w s) B times Σ √(w s) A of one layer, which has cross terms and is not Σ w s B A.

    This is PEFT's `combination_type="linear"`.

    Raises:
        InputError: adapters of different rank, or experts without factors.
    """
    pairs = {name: one for name, one in changes.items() if isinstance(one, LowRankChange)}
    if len(pairs) < len(changes):
        raise InputError("merge_method: linear merges the factors of LoRA adapters; full experts have none")
    ranks = {name: len(one.a) for name, one in pairs.items()}
    if len(set(ranks.values())) > 1:
        raise InputError(f"merge_method: linear needs adapters of one rank, got {ranks}")
    roots = {name: math.sqrt(weights[name] * one.scale) for name, one in pairs.items()}
    a = weighted_sum((one.a, roots[name]) for name, one in pairs.items())
    b = weighted_sum((one.b, roots[name]) for name, one in pairs.items())
    return next(iter(pairs.values())).product(b, a)
