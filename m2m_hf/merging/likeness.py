"""How alike the changes are that experts make to their base model: their cosine, and how far their signs conflict."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import cast

import numpy as np
import torch

from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.expert import Expert, blocks
from m2m_hf.merging.full_experts import FullExpert

ROWS = 16  # of every matrix, evenly spaced, whose signs are compared
Pairs = dict[tuple[str, str], tuple[float, float]]


def likeness(experts: Mapping[str, Expert], weights: Sequence[str]) -> Pairs:
    """Pair of names -> (cosine, sign conflict) of what two experts change.

    The cosine is that of all changes ΔW together, as one vector each. Of LoRA adapters ⟨s B A, s' B' A'⟩ is s s' times the
    sum of (BᵀB') ∘ (A A'ᵀ), of r x r numbers, so ΔW is never made.

    The sign conflict is the share of the change common to both, Σ min(|Δ|, |Δ'|), that has opposite signs: what TIES (Yadav
    et al., 2306.01708, section 3) calls interference, weighed by magnitude as it elects signs. 0: all agree; about 0.5:
    unrelated. It is taken over `ROWS` rows of every weight.

    Args:
        weights: the model's parameters; what full experts change beside these, running statistics, does not count.
    """
    names = sorted(experts)
    gram, conflict, common = (np.zeros((len(names), len(names))) for _ in range(3))
    adapters = [one for name in names if isinstance(one := experts[name], Adapter)]
    if len(adapters) == len(names):
        parts = low_rank(adapters)
    else:
        parts = full([cast(FullExpert, experts[name]) for name in names], set(weights))
    for products, sampled in parts:
        gram += products
        for first in range(len(names) - 1):
            mine, others = sampled[first], sampled[first + 1 :]
            both = torch.minimum(mine.abs(), others.abs())
            common[first, first + 1 :] += both.sum(1, dtype=torch.float64).numpy()
            conflict[first, first + 1 :] += both.mul_((mine < 0) != (others < 0)).sum(1, dtype=torch.float64).numpy()
    norms = np.sqrt(gram.diagonal())
    with np.errstate(invalid="ignore"):  # of two that change no weight in common there is no conflict to share
        cosines, conflicts = gram / np.outer(norms, norms), conflict / common
    pairs = combinations(range(len(names)), 2)
    return {(names[i], names[j]): (float(cosines[i, j]), float(conflicts[i, j])) for i, j in pairs}


def spread(rows: int) -> torch.Tensor:
    """Up to `ROWS` of so many rows, evenly spaced."""
    return torch.linspace(0, rows - 1, min(ROWS, rows)).long()


Parts = Iterator[tuple[np.ndarray, torch.Tensor]]  # inner products of all pairs; sampled changes (experts, numbers)


def low_rank(adapters: Sequence[Adapter]) -> Parts:
    """By layer, of LoRA adapters."""
    factors = [adapter.factors() for adapter in adapters]
    for layer in sorted({layer for of in factors for layer in of}):
        pairs = [of.get(layer) for of in factors]
        a = torch.cat([pair[0] for pair in pairs if pair]).double()
        b = torch.cat([pair[1] for pair in pairs if pair], dim=1).double()
        owners = torch.repeat_interleave(torch.tensor([len(pair[0]) if pair else 0 for pair in pairs]))
        owner = torch.nn.functional.one_hot(owners, len(adapters)).double()
        rows = spread(len(b))
        empty = torch.zeros(len(rows) * a.shape[1])
        sampled = torch.stack([(pair[1][rows] @ pair[0]).flatten() if pair else empty for pair in pairs])
        yield (owner.T @ ((b.T @ b) * (a @ a.T)) @ owner).numpy(), sampled


def full(experts: Sequence[FullExpert], weights: set[str]) -> Parts:
    """By block of a weight, of full experts."""
    shapes = {name: shape for one in experts for name, shape in one.shapes.items() if name in weights}
    for name, shape in sorted(shapes.items()):
        rows = spread(shape[0] if shape else 1)
        for part in blocks(shape):
            start, size = (part.start, part.stop - part.start) if part else (0, shape[0] if shape else 1)
            zeros = torch.zeros(size, *shape[1:])
            deltas = [one.delta(name, part).float() if name in one.shapes else zeros for one in experts]
            whole = torch.stack([delta.reshape(size, -1) for delta in deltas])
            flat = whole.flatten(1).double()
            inside = rows[(rows >= start) & (rows < start + size)] - start
            yield (flat @ flat.T).numpy(), whole[:, inside].flatten(1)
