"""Merged weights written into the base model, one mixture at a time."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from m2m_hf.errors import InputError
from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.full_experts import Delta, Part, Shelf, Sums, blocks, floats
from m2m_hf.merging.gated_stack import GatedStack, features
from m2m_hf.merging.methods import MergeMethod, dare, kth_largest, linear, sum_of, ties, truncated, truncated_dense
from m2m_hf.storage.files import fingerprint

Expert = Adapter | Delta


class DenseStack:
    """The experts of a bank beside one base model, one mixture at a time written into its weights.

    What the scorers need of a `GatedStack`, for full-parameter experts and for methods that are not linear in the deltas.
    Averages of full-parameter experts come from running sums (`deltas.Sums`), so that a mixture which differs from the last one
    by a candidate reads the weights of that candidate alone; sums and the base's own weights are on the disk meanwhile. There are
    in memory: the model and one layer of the sums. Otherwise the model, its own weights, and one layer with every expert's part.
    A single expert is added as it is, so that its mixture is that model to the last bit.

    Args:
        model: the base model, not quantised; given back by `detach`.
        adapters: name -> expert.
        method: how to merge.
        scratch: a folder with room for the base's weights (default: where temporary files go).

    Raises:
        InputError: layers whose weights cannot be written, or experts that the method cannot merge.
    """

    takes_rows = False
    shrink = 1  # as of a `GatedStack`

    def __init__(
        self, model: PreTrainedModel, adapters: Mapping[str, Expert], method: MergeMethod, scratch: Path | None = None
    ) -> None:
        self.model = model
        self.adapters = dict(sorted(adapters.items()))
        self.names = tuple(self.adapters)
        self.method = method
        deltas = {name: one for name, one in self.adapters.items() if isinstance(one, Delta)}
        if deltas and (method.name == "linear" or (method.name == "svd" and method.rank is None)):
            raise InputError(
                f"merge method {method.label}: full experts have no factors; expected another one, or svd with a rank"
            )
        self._parts = {name: one.parts() for name, one in self.adapters.items() if isinstance(one, Adapter)}
        self._transposed: set[str] = set()  # layers that keep their weight so
        self._thresholds: dict[str, float] = {}
        # Statistics of normalisation are averaged whatever the method: scaled or trimmed, variances may be none.
        self._statistics = {name for name, _ in model.named_buffers()} if deltas else set()
        self._weights = self._full_weights(deltas) if deltas else self._adapted_weights()
        self._sums: Sums | None = None
        self._pristine: Mapping[str, torch.Tensor] | Shelf
        if len(deltas) > 1 and method.gated:
            self._pristine = Shelf(self._weights, scratch)
            self._sums = Sums(deltas, {name: weight.shape for name, weight in self._weights.items()}, scratch)
        else:
            self._pristine = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._written = False

    def _full_weights(self, deltas: Mapping[str, Delta]) -> dict[str, torch.Tensor]:
        """The model's weights that full-parameter experts change."""
        weights = floats(self.model)
        for one in deltas.values():
            for name, shape in one.shapes.items():
                if name not in weights or tuple(weights[name].shape) != shape:
                    raise InputError(
                        f"{one.path} changes {name!r} of shape {shape}, which {type(self.model).__name__} does not have: another "
                        "base model?"
                    )
        changed = {name for one in deltas.values() for name in one.shapes}
        return {name: weight for name, weight in weights.items() if name in changed}

    def _adapted_weights(self) -> dict[str, torch.Tensor]:
        """The model's weights that LoRA adapters change."""
        modules = dict(self.model.named_modules())
        owners = [id(one) for module in modules.values() for one in module.parameters(recurse=False)]
        weights: dict[str, torch.Tensor] = {}
        for layer in sorted({layer for parts in self._parts.values() for layer in parts}):
            if layer not in modules or features(modules[layer]) is None:
                raise InputError(
                    f"the adapters adapt {layer!r}, which {type(self.model).__name__} does not have: another base model?"
                )
            weight = modules[layer].weight
            if type(weight) is not nn.Parameter or not weight.is_floating_point():
                raise InputError(
                    f"merge_method: {self.method.name} writes merged weights, and those of {layer!r} are quantised"
                )
            if owners.count(id(weight)) > 1:
                raise InputError(
                    f"merge_method: {self.method.name} cannot write {layer!r}, whose weights another layer shares"
                )
            weights[f"{layer}.weight"] = weight
            if isinstance(modules[layer], (Conv1D, nn.Embedding)):
                self._transposed.add(f"{layer}.weight")
        return weights

    def set(self, weights: Mapping[str, float]) -> None:
        """Makes the model that of this mixture; without names, the base model."""
        written, self._written = self._written, True  # also where this is interrupted
        with torch.no_grad():
            if self._sums is not None and len(weights) > 1 and len(set(weights.values())) == 1:
                share = next(iter(weights.values()))
                mean = 1 / len(weights)

                def write(name: str, part: Part, total: torch.Tensor) -> None:
                    self._write(name, total, mean if name in self._statistics else share, part)

                self._sums.to(weights, write)
            elif weights:
                for name, weight in self._weights.items():
                    # What is linear in the deltas needs no weight whole.
                    for part in blocks(weight.shape) if self.method.gated else (None,):
                        self._write(name, self._merged(name, weights, weight.device, part), 1.0, part)
            elif written:
                for name, weight in self._weights.items():
                    for part in blocks(weight.shape):
                        (weight if part is None else weight[part]).copy_(self._base(name, part))
        self._written = bool(weights)

    def _base(self, name: str, part: Part = None) -> torch.Tensor:
        """The base's own weight, or rows of it."""
        if isinstance(self._pristine, Shelf):
            return self._pristine.read(name, part)
        return self._pristine[name] if part is None else self._pristine[name][part]

    def _write(self, name: str, delta: torch.Tensor, share: float, part: Part = None) -> None:
        weight = self._weights[name] if part is None else self._weights[name][part]
        weight.copy_(self._base(name, part).to(delta.device, torch.float32).add(delta, alpha=share))

    def set_rows(self, rows: Sequence[Mapping[str, float]]) -> None:
        """The same; all rows have one mixture."""
        (weights,) = rows
        self.set(weights)

    def detach(self) -> None:
        """Gives the base model back as it was."""
        self.set({})
        for one in (self._pristine, self._sums):
            if isinstance(one, (Shelf, Sums)):
                one.close()

    def _delta(self, expert: str, weight: str, device: torch.device, part: Part = None) -> torch.Tensor:
        """What one expert adds to one weight, or to rows of it, in fp32."""
        one = self.adapters[expert]
        if isinstance(one, Delta):
            return one.delta(weight, device, part)
        a, b, scale = self._parts[expert][weight.removesuffix(".weight")]
        delta = scale * (b.to(device) @ a.to(device))
        return delta.T if weight in self._transposed else delta

    def _changes(self, expert: str) -> list[str]:
        """The weights, and statistics, that an expert changes."""
        one = self.adapters[expert]
        return list(one.shapes) if isinstance(one, Delta) else [f"{layer}.weight" for layer in self._parts[expert]]

    def _merged(
        self, weight: str, weights: Mapping[str, float], device: torch.device, part: Part = None
    ) -> torch.Tensor:
        """The merged delta of one weight, or of rows of it, in fp32."""
        names = [name for name in sorted(weights) if weight in self._changes(name)]
        method = self.method
        if not names:
            return torch.zeros_like(self._base(weight, part), dtype=torch.float32, device=device)
        if weight in self._statistics:
            whole = sum(weights.values())
            return sum_of(weights[name] / whole * self._delta(name, weight, device, part) for name in names)
        if self._parts and method.name in ("svd", "linear"):
            return self._from_factors(weight, {name: weights[name] for name in names}, device)
        if method.name == "ties":
            for name in set(weights) - set(self._thresholds):
                self._thresholds[name] = self._threshold(name, device)
            deltas = {name: self._delta(name, weight, device) for name in names}
            return method.scaling * ties(deltas, weights, self._thresholds)

        def kept(name: str) -> torch.Tensor:
            delta = self._delta(name, weight, device, part)
            seed = [method.seed, name, weight.removesuffix(".weight")]
            return dare(delta, method.density, fingerprint(seed)) if method.name == "dare" else delta

        total = sum_of(weights[name] * kept(name) for name in names)
        if method.name == "svd" and total.ndim > 1 and method.rank is not None:
            return truncated_dense(total, method.rank)
        return total

    def _from_factors(self, weight: str, weights: Mapping[str, float], device: torch.device) -> torch.Tensor:
        """The same of methods that work on the factors of LoRA."""
        layer = weight.removesuffix(".weight")
        parts = {name: self._parts[name][layer] for name in weights}
        factors = {name: (a.to(device), b.to(device), scale) for name, (a, b, scale) in parts.items()}
        if self.method.name == "linear":
            found = linear(factors, weights)
        else:
            a = torch.cat([a for a, _, _ in factors.values()])
            b = torch.cat([weights[name] * scale * b for name, (_, b, scale) in factors.items()], dim=1)
            found = truncated(a, b, self.method.rank or max(len(a) for a, _, _ in factors.values()))
        return found.T if weight in self._transposed else found

    def _threshold(self, name: str, device: torch.device) -> float:
        """The smallest magnitude that trimming keeps of an expert's whole delta, all layers together."""
        changes = [weight for weight in self._changes(name) if weight not in self._statistics]
        total = sum(self._weights[weight].numel() for weight in changes)
        return kth_largest(
            lambda: (self._delta(name, weight, device) for weight in changes),
            max(1, round(self.method.density * total)),
        )


Stack = GatedStack | DenseStack


def open_stack(model: PreTrainedModel, experts: Mapping[str, Expert], method: MergeMethod, scratch: Path) -> Stack:
    """The experts on their base model, ready to be merged in this way: gated where that can be, else written.

    Args:
        scratch: see `DenseStack`.
    """
    if method.gated and not any(isinstance(one, Delta) for one in experts.values()):
        return GatedStack(model, {name: one for name, one in experts.items() if isinstance(one, Adapter)})
    return DenseStack(model, experts, method, scratch)
