"""Merged weights written into the base model, one mixture at a time."""

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.expert import Expert, Part, blocks, rows_of
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.merging.methods import MergeMethod, dare, kth_largest, linear, ties, weighted_sum
from m2m_hf.storage.files import fingerprint


class DenseStack:
    """The experts of a bank beside one base model, one mixture at a time written into its weights.

    It offers scorers what a `GatedStack` offers, for full-parameter experts and for methods that are not linear in the deltas.
    A mixture is summed in fp32, weight by weight, its experts sorted by name: its weights do not depend on what was merged
    before. In memory are the model, a copy of those of the base's weights that experts change (on the CPU), and one block of
    rows of every expert of the mixture, or one whole layer where the method needs it whole.

    The model must not be quantised; `detach` gives it back.
    """

    takes_rows = writes = False  # as of a `GatedStack`
    shrink = 1

    def __init__(self, model: PreTrainedModel, experts: Mapping[str, Expert], method: MergeMethod) -> None:
        self.model = model
        self.adapters = dict(sorted(experts.items()))
        self.names = tuple(self.adapters)
        self.method = method
        self._changes = {name: expert.changes(model) for name, expert in self.adapters.items()}
        self._weights = {name: change.weight for changes in self._changes.values() for name, change in changes.items()}
        self._base = {name: weight.detach().to("cpu", copy=True) for name, weight in self._weights.items()}
        # Scaled or trimmed, a variance could be negative: the running statistics of normalisation are always averaged.
        self._statistics = {name for name, _ in model.named_buffers()}
        self._thresholds: dict[str, float] = {}
        self._set: Mapping[str, float] | None = {}  # the mixture that is written

    def set(self, weights: Mapping[str, float]) -> None:
        """Makes the model that of this mixture; without names, the base model."""
        if weights == self._set:
            return
        self._set = None  # until it is written whole
        by_rows = self.method.gated or not weights
        with torch.no_grad():
            for name, weight in self._weights.items():
                for part in blocks(weight.shape) if by_rows else (None,):
                    base = rows_of(self._base[name], part).to(weight.device)
                    delta = self._merged(name, weights, part)
                    rows_of(weight, part).copy_(base if delta is None else base.float().add(delta))
        self._set = dict(weights)

    def set_rows(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Like `set`: all rows have one mixture."""
        (weights,) = rows
        self.set(weights)

    def detach(self) -> None:
        """Gives the base model back as it was."""
        self.set({})

    def _merged(self, weight: str, weights: Mapping[str, float], part: Part) -> torch.Tensor | None:
        """The merged delta of one weight, or of rows of it, in fp32; None if no expert of the mixture changes it."""
        changes = {name: self._changes[name][weight] for name in sorted(weights) if weight in self._changes[name]}
        if not changes:
            return None
        method = self.method
        if weight in self._statistics:
            total = sum(weights.values())
            weights = {name: share / total for name, share in weights.items()}
        elif method.name == "linear":
            return linear(changes, weights)
        elif method.name == "ties":
            thresholds = {name: self._threshold(name) for name in changes}
            deltas = {name: change.delta() for name, change in changes.items()}
            return method.scaling * ties(deltas, weights, thresholds)
        elif method.name == "dare":
            seeds = {name: fingerprint([method.seed, name, weight.removesuffix(".weight")]) for name in changes}
            return weighted_sum(
                (dare(change.delta(), method.density, seeds[name]), weights[name]) for name, change in changes.items()
            )
        return weighted_sum((change.delta(part), weights[name]) for name, change in changes.items())

    def _threshold(self, name: str) -> float:
        """The smallest magnitude that trimming keeps of an expert's whole delta, all layers together."""
        if name not in self._thresholds:
            changes = [change for weight, change in self._changes[name].items() if weight not in self._statistics]
            count = max(1, round(self.method.density * sum(change.weight.numel() for change in changes)))
            self._thresholds[name] = kth_largest(lambda: (change.delta() for change in changes), count)
        return self._thresholds[name]


Stack = GatedStack | DenseStack


def open_stack(model: PreTrainedModel, experts: Mapping[str, Expert], method: MergeMethod) -> Stack:
    """Puts the experts on their base model, ready to be merged: gated where that is possible, else written."""
    adapters = {name: one for name, one in experts.items() if isinstance(one, Adapter)}
    if method.gated and len(adapters) == len(experts):
        return GatedStack(model, adapters)
    return DenseStack(model, experts, method)
