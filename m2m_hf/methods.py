"""Merge methods beside the average, to compare it with; each on the deltas ΔW = s B A themselves, as its paper defines it.

The average and task arithmetic are linear in the deltas, so the gated stack computes them. The others are computed layer by
layer on dense ΔW and written into the base model's weights, which are restored from a copy and never by subtracting.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import MERGE_PARAMETERS
from .errors import InputError
from .journal import fingerprint
from .merging import Adapter, features

Deltas = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class MergeMethod:
    """How the adapters of a mixture are merged.

    Args:
        name: `average` (the paper's), `task_arithmetic` (W0 + λ Σ ΔW; Ilharco et al., 2023), `ties` (trim, elect signs, mean of
            those that agree; Yadav et al., 2023), `dare` (drop at random, rescale, average; Yu et al., 2024), `svd` (the average,
            truncated to a lower rank) or `linear` (what PEFT's `combination_type="linear"` does: factors are summed apart).
        scaling: λ of `task_arithmetic` and `ties`.
        density: share of the entries of a delta that `ties` keeps (its largest), or `dare` (at random).
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
        if self.name == "average":
            return "merged"
        shown = {key: getattr(self, key) for key in MERGE_PARAMETERS[self.name]}
        if self.name == "dare":
            shown["seed"] = self.seed
        return f"{self.name}({', '.join(f'{key}={value:g}' for key, value in shown.items() if value is not None)})"

    @property
    def gated(self) -> bool:
        """Whether it is linear in the deltas, so that the gated stack computes it."""
        return self.name in ("average", "task_arithmetic")

    def gates(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The weights of the deltas, for methods that are linear in them."""
        factor = self.scaling * len(weights) if self.name == "task_arithmetic" else 1.0
        return {name: factor * weight for name, weight in weights.items()}


AVERAGE = MergeMethod()


class DenseStack:
    """All adapters of a bank beside one base model, one mixture at a time written into its weights.

    What the scorers need of a `GatedStack`, for methods that are not linear in the deltas.

    Args:
        model: the base model, not quantised; given back by `detach`.
        adapters: name -> adapter.
        method: how to merge.

    Raises:
        InputError: layers whose weights cannot be written, or adapters that the method cannot merge.
    """

    takes_rows = False
    shrink = 1  # as of a `GatedStack`

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, Adapter], method: MergeMethod) -> None:
        self.model = model
        self.adapters = dict(sorted(adapters.items()))
        self.names = tuple(self.adapters)
        self.method = method
        self._parts = {name: adapter.parts() for name, adapter in self.adapters.items()}
        self._thresholds: dict[str, float] = {}
        modules = dict(model.named_modules())
        owners = [id(one) for module in modules.values() for one in module.parameters(recurse=False)]
        self._weights: dict[str, nn.Parameter] = {}
        self._transposed: set[str] = set()  # layers that keep their weight so
        for name in sorted({module for parts in self._parts.values() for module in parts}):
            if name not in modules or features(modules[name]) is None:
                raise InputError(
                    f"the adapters adapt {name!r}, which {type(model).__name__} does not have: another base model?"
                )
            weight = modules[name].weight
            if type(weight) is not nn.Parameter or not weight.is_floating_point():
                raise InputError(
                    f"merge_method: {method.name} writes merged weights, and those of {name!r} are quantised"
                )
            if owners.count(id(weight)) > 1:
                raise InputError(
                    f"merge_method: {method.name} cannot write {name!r}, whose weights another layer shares"
                )
            self._weights[name] = weight
            if isinstance(modules[name], (Conv1D, nn.Embedding)):
                self._transposed.add(name)
        self._pristine = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._written = False

    def set(self, weights: Mapping[str, float]) -> None:
        """Makes the model that of this mixture; without names, the base model."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                pristine = self._pristine[name]
                if weights:
                    delta = self._merged(name, weights, weight.device)
                    delta = delta.T if name in self._transposed else delta
                    weight.copy_((pristine.float() + delta).to(pristine.dtype))
                elif self._written:
                    weight.copy_(pristine)
        self._written = bool(weights)

    def set_rows(self, rows: Sequence[Mapping[str, float]]) -> None:
        """The same; all rows have one mixture."""
        (weights,) = rows
        self.set(weights)

    def detach(self) -> None:
        """Gives the base model back as it was."""
        self.set({})

    def _merged(self, layer: str, weights: Mapping[str, float], device: torch.device) -> torch.Tensor:
        """The merged delta of one layer, of shape (out, in), in fp32."""
        parts = {name: self._parts[name][layer] for name in sorted(weights) if layer in self._parts[name]}
        factors = {name: (a.to(device), b.to(device), scale) for name, (a, b, scale) in parts.items()}
        method = self.method
        if method.name == "linear":
            return linear(factors, weights)
        if method.name == "svd":
            a = torch.cat([a for a, _, _ in factors.values()])
            b = torch.cat([weights[name] * scale * b for name, (_, b, scale) in factors.items()], dim=1)
            return truncated(a, b, method.rank or max(len(a) for a, _, _ in factors.values()))
        deltas = {name: scale * (b @ a) for name, (a, b, scale) in factors.items()}
        if method.name == "ties":
            for name in set(weights) - set(self._thresholds):
                self._thresholds[name] = self._threshold(name, device)
            return method.scaling * ties(deltas, weights, self._thresholds)
        kept = {
            name: dare(delta, method.density, fingerprint([method.seed, name, layer])) for name, delta in deltas.items()
        }
        return sum_of(weights[name] * delta for name, delta in kept.items())

    def _threshold(self, name: str, device: torch.device) -> float:
        """The smallest magnitude that trimming keeps of an adapter's whole delta, all layers together."""
        parts = self._parts[name]

        def deltas() -> Iterator[torch.Tensor]:
            for a, b, scale in parts.values():
                yield scale * (b.to(device) @ a.to(device))

        total = sum(b.shape[0] * a.shape[1] for a, b, _ in parts.values())
        return kth_largest(deltas, max(1, round(self.method.density * total)))


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
