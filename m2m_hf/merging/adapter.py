"""LoRA adapters as tensors: loading, checking, and the exact average as one adapter."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from m2m_hf.errors import InputError
from m2m_hf.merging.expert import Change, Expert, Part, rows_of

PREFIX = "base_model.model."
LINEAR, EMBEDDING = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_embedding_A", "lora_embedding_B"),
)  # as PEFT names factors
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # of a PEFT folder
NOT_AVERAGEABLE = {
    "use_dora": "DoRA rescales the merged weight by a magnitude of its own, which is not linear in the adapter",
    "modules_to_save": "modules trained in full are replaced, not added",
    "trainable_token_indices": "single token embeddings are replaced, not added",
    "target_parameters": "adapters on bare parameters cannot be gated",
    "bias": "trained biases are not part of B A",
    "lora_bias": "trained biases are not part of B A",
    "init_lora_weights": "it changes the base weights or depends on the data, so the adapters would not share one base",
    "layer_replication": "the layers of the adapted model are not those of the base",
    "alora_invocation_tokens": "activated LoRA acts on some tokens only",
    "arrow_config": "Arrow routes every token to adapters of its own",
    "kasa_config": "KaSA takes singular values out of the base weights",
    "monteclora_config": "MonteCLoRA samples its adapter",
    "velora_config": "VeLoRA compresses what the adapter sees",
    "use_bdlora": "block-diagonal factors are stored otherwise",
    "use_qalora": "QALoRA pools the input of the adapter",
}
HARMLESS: dict[str, tuple[Any, ...]] = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian")}


def refuse_unless_averageable(config: LoraConfig, where: str) -> None:
    """Refuses adapters whose average has no meaning, or is not what the gated stack computes."""
    for name, reason in NOT_AVERAGEABLE.items():
        value = getattr(config, name, None)
        if value not in HARMLESS.get(name, (None, False, [])):
            raise InputError(f"{where}: {name}={value!r} cannot be averaged: {reason}. Leave {name} unset")


@dataclass(frozen=True, eq=False)
class LowRankChange(Change):
    """s B A, what an adapter adds to one weight; `transposed` where the model keeps that as (in, out)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool

    def delta(self, part: Part = None) -> torch.Tensor:
        return rows_of(self.product(self.b, self.a, self.scale), part)

    def product(self, b: torch.Tensor, a: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """s B A as the weight is kept."""
        device = self.weight.device
        delta = scale * (b.to(device) @ a.to(device))
        return delta.T if self.transposed else delta


@dataclass(frozen=True)
class Adapter(Expert):
    """A LoRA adapter in memory: its configuration and its tensors by PEFT's names."""

    config: LoraConfig
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def load(cls, folder: Path) -> "Adapter":
        """Reads a PEFT adapter folder (safetensors only).

        Raises:
            InputError: not a LoRA adapter, not safetensors, or one that cannot be averaged.
        """
        try:
            config = PeftConfig.from_pretrained(str(folder))
            tensors = load_file(folder / "adapter_model.safetensors")
        except Exception as error:  # PEFT may raise anything if a file is damaged
            raise InputError(
                f"{folder}: expected adapter_config.json and adapter_model.safetensors ({error!r:.300})"
            ) from error
        if not isinstance(config, LoraConfig):
            raise InputError(
                f"{folder}: expected a LoRA adapter, got {getattr(config.peft_type, 'value', config.peft_type)}"
            )
        refuse_unless_averageable(config, str(folder))
        adapter = cls(config, tensors)
        try:
            parts = adapter.parts()
        except (InputError, TypeError, AttributeError, re.error) as error:
            raise InputError(f"{folder}: {error}") from error
        if not parts:
            raise InputError(f"{folder}: the adapter holds no tensors")
        for module, (a, b, _) in parts.items():
            if not (a.isfinite().all() and b.isfinite().all()):
                raise InputError(f"{folder}: {module}: its weights are not all finite numbers")
        return adapter

    def parts(self) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
        """Module name -> (A, B, s) in fp32, A of shape (r, in), B of shape (out, r); the module's delta is s B A.

        s is α/r, or α/√r with rank-stabilised LoRA, with α and r as the adapter's patterns say for this module.

        Raises:
            InputError: tensors that are not low-rank pairs, or a scaling that is no number.
        """
        modules: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            module, _, factor = name.removeprefix(PREFIX).rpartition(".lora_")
            kind = {"A.weight": "A", "B.weight": "B", "embedding_A": "A", "embedding_B": "B"}.get(factor, "")
            pair = modules.setdefault(module, {})
            if not name.startswith(PREFIX) or not kind or kind in pair:
                raise InputError(f"the adapter holds {name!r}, which is no lora_A or lora_B")
            pair[kind] = tensor
        return {module: self._part(module, pair) for module, pair in modules.items()}

    def _part(self, module: str, pair: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, float]:
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or not is_matrix(a) or not is_matrix(b) or a.shape[0] != b.shape[1]:
            found = ", ".join(f"{kind} {tuple(tensor.shape)} {tensor.dtype}" for kind, tensor in sorted(pair.items()))
            raise InputError(
                f"{module}: expected a low-rank pair A (r, in) and B (out, r) of floating-point numbers, got {found}"
            )
        rank, alphas = len(a), self.config.alpha_pattern
        alpha = float(alphas.get(get_pattern_key(alphas.keys(), module), self.config.lora_alpha))
        if not math.isfinite(alpha):
            raise InputError(f"{module}: lora_alpha is {alpha!r}; expected a finite number")
        return a.float(), b.float(), alpha / (rank**0.5 if self.config.use_rslora else rank)

    def factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module name -> (A, s B): see `parts`."""
        return {module: (a, b * scale) for module, (a, b, scale) in self.parts().items()}

    def changes(self, model: PreTrainedModel) -> dict[str, Change]:
        modules = dict(model.named_modules())
        owners = Counter(id(weight) for module in modules.values() for weight in module.parameters(recurse=False))
        changes: dict[str, Change] = {}
        for layer, (a, b, scale) in sorted(self.parts().items()):
            if layer not in modules or features(modules[layer]) is None:
                raise another_base(layer, model)
            weight = modules[layer].weight
            written = f"merge_method: merged weights cannot be written into {layer!r}"
            if type(weight) is not nn.Parameter or not weight.is_floating_point():
                raise InputError(f"{written}, which is quantised")
            if owners[id(weight)] > 1:
                raise InputError(f"{written}, whose weights another layer shares")
            transposed = isinstance(modules[layer], (Conv1D, nn.Embedding))
            changes[f"{layer}.weight"] = LowRankChange(weight, a, b, scale, transposed)
        return changes


def is_matrix(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and tensor.numel() > 0 and tensor.is_floating_point()


def another_base(layer: str, model: PreTrainedModel) -> InputError:
    return InputError(f"the adapters adapt {layer!r}, which {type(model).__name__} does not have: another base model?")


def features(layer: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, quantised or not, or of an embedding; None for anything else."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, Conv1D):  # GPT-2's linear layer, which keeps its weight transposed
        weight: torch.Tensor = layer.weight
        return weight.shape[0], weight.shape[1]
    wide, high = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return (wide, high) if isinstance(wide, int) and isinstance(high, int) else None


def write_adapter(folder: Path, adapters: Mapping[str, Adapter], weights: Mapping[str, float], base: str) -> None:
    """Writes the mixture as one PEFT adapter of rank Σ r_i, exactly: A = [A_i], B = [w_i s_i B_i], scaling 1, in fp32.

    The base model, a mixture of none, becomes an adapter of zeros.

    What PEFT's `combination_type="cat"` builds, but also right for rank-stabilised LoRA and without rounding to the base's
    dtype.
    """
    weights = weights or {min(adapters): 0.0}
    factors: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name in sorted(weights):
        for module, (a, b) in adapters[name].factors().items():
            factors.setdefault(module, []).append((a, weights[name] * b))
    embedded = {name for adapter in weights for name in adapters[adapter].tensors if name.endswith(EMBEDDING)}
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for module, pairs in sorted(factors.items()):
        names = EMBEDDING if f"{PREFIX}{module}.{EMBEDDING[0]}" in embedded else LINEAR
        tensors[f"{PREFIX}{module}.{names[0]}"] = torch.cat([a for a, _ in pairs]).contiguous()
        tensors[f"{PREFIX}{module}.{names[1]}"] = torch.cat([b for _, b in pairs], dim=1).contiguous()
        ranks[module] = sum(len(a) for a, _ in pairs)
    width = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != width}
    config = LoraConfig(
        r=width,
        lora_alpha=width,
        lora_dropout=0.0,
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=others,
        fan_in_fan_out=any(adapters[name].config.fan_in_fan_out for name in weights),
        task_type=adapters[min(weights)].config.task_type,  # of a classifier's encoder none
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
