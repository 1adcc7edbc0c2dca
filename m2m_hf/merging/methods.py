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
        """The method with these parameters and the defaults of `MERGE_PARAMETERS`."""
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
        """The weights of the deltas, for methods that are linear in them."""
        factor = self.scaling * len(weights) if self.name == "task_arithmetic" else 1.0
        return {name: factor * weight for name, weight in weights.items()}


AVERAGE = MergeMethod()


def weighted_sum(parts: Iterable[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """Σ w t over pairs (t, w), added up in their order."""
    left = iter(parts)
    tensor, weight = next(left)
    total = weight * tensor
    for tensor, weight in left:
        total.add_(tensor, alpha=weight)
    return total


def kth_largest(tensors: Callable[[], Iterator[torch.Tensor]], k: int) -> float:
    """The k-th largest magnitude in several fp32 tensors, exactly, without holding them together.

    Magnitudes are sorted as their bit patterns are, so counting finds it in two passes over what `tensors` gives: first the upper
    half of its bits, then, among the numbers that share them, the lower.
    """
    known = 0
    for shift in (16, 0):
        counts = torch.zeros(1 << 16, dtype=torch.long)
        for tensor in tensors():
            bits = tensor.abs().contiguous().view(torch.int32).flatten()
            alike = bits[bits >> 16 >> shift == known]
            counts += torch.bincount((alike >> shift) & 0xFFFF, minlength=1 << 16).cpu()
        at_least = counts.flip(0).cumsum(0)  # of the half 0xFFFF, of that and the one below it, ...
        place = int((at_least >= k).nonzero()[0])
        known = known << 16 | (0xFFFF - place)
        k -= int(at_least[place - 1]) if place else 0
    return float(torch.tensor([known], dtype=torch.int32).view(torch.float32))


def ties(deltas: Deltas, weights: Mapping[str, float], thresholds: Mapping[str, float]) -> torch.Tensor:
    """TIES of one layer: trims below an expert's threshold, elects the sign with more mass, averages the entries that have it."""
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
    """Σ √(w s) B times Σ √(w s) A of one layer, which has cross terms and is not Σ w s B A.

    This is PEFT's `combination_type="linear"`.
    """
    pairs = {name: change for name, change in changes.items() if isinstance(change, LowRankChange)}
    if len(pairs) < len(changes):
        raise InputError("merge_method: linear merges the factors of LoRA adapters; full experts have none")
    ranks = {name: len(pair.a) for name, pair in pairs.items()}
    if len(set(ranks.values())) > 1:
        raise InputError(f"merge_method: linear needs adapters of one rank, got {ranks}")
    roots = {name: math.sqrt(weights[name] * pair.scale) for name, pair in pairs.items()}
    a = weighted_sum((pair.a, roots[name]) for name, pair in pairs.items())
    b = weighted_sum((pair.b, roots[name]) for name, pair in pairs.items())
    return next(iter(pairs.values())).product(b, a)
