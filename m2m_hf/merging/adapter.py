"""LoRA adapters as tensors: loading, checking, and the exact average as one adapter."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # of a PEFT folder
NOT_AVERAGEABLE = {
    "use_dora": "DoRA rescales the merged weight by a magnitude of its own, which is not linear in the adapter",
    "modules_to_save": "modules trained in full are replaced, not added",
    "trainable_token_indices": "single token embeddings are replaced, not added",
    "target_parameters": "adapters on bare parameters cannot be gated",
    "lora_bias": "trained biases are not part of B A",
    "layer_replication": "the layers of the adapted model are not those of the base",
    "alora_invocation_tokens": "activated LoRA acts on some tokens only",
    "arrow_config": "Arrow routes every token to adapters of its own",
    "kasa_config": "KaSA takes singular values out of the base weights",
    "monteclora_config": "MonteCLoRA samples its adapter",
    "velora_config": "VeLoRA compresses what the adapter sees",
    "use_bdlora": "block-diagonal factors are stored otherwise",
    "use_qalora": "QALoRA pools the input of the adapter",
}


def refuse_unless_averageable(config: LoraConfig, where: str) -> None:
    """Refuses adapters whose average has no meaning, or is not what the gated stack computes.

    Raises:
        InputError: with the reason.
    """
    for name, reason in NOT_AVERAGEABLE.items():
        if getattr(config, name, None) not in (None, False, []):
            raise InputError(
                f"{where}: {name}={getattr(config, name)!r} cannot be averaged: {reason}. Leave {name} unset"
            )
    if config.bias != "none":
        raise InputError(
            f"{where}: bias={config.bias!r} cannot be averaged: trained biases are not part of B A. Use bias='none'"
        )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise InputError(
            f"{where}: init_lora_weights={config.init_lora_weights!r} cannot be averaged: it changes the base weights or "
            "depends on the data, so the adapters would not share one base. Use the default"
        )


class LowRankChange(Change):
    """s B A, what an adapter adds to one weight.

    Args:
        transposed: the model keeps this weight as (in, out).
    """

    def __init__(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, transposed: bool) -> None:
        super().__init__(weight)
        self.a, self.b, self.scale, self.transposed = a, b, scale, transposed

    def delta(self, part: Part = None) -> torch.Tensor:
        return rows_of(self.product(self.b, self.a, self.scale), part)

    def product(self, b: torch.Tensor, a: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Returns s B A as the weight is kept."""
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
            adapter._check()
        except (InputError, TypeError, AttributeError, re.error) as error:
            raise InputError(f"{folder}: {error}") from error
        return adapter

    def _check(self) -> None:
        """Refuses tensors and scalings that no training leaves behind."""
        pairs = self._pairs()
        if not pairs:
            raise InputError("the adapter holds no tensors")
        for module, (a, b) in pairs.items():
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
                raise InputError(
                    f"{module}: A of shape {tuple(a.shape)} and B of {tuple(b.shape)} are no low-rank pair"
                )
            if not (a.is_floating_point() and b.is_floating_point() and a.isfinite().all() and b.isfinite().all()):
                raise InputError(f"{module}: its weights are not all finite numbers")
            if not math.isfinite(self._alpha(module)):
                raise InputError(f"{module}: lora_alpha is {self._alpha(module)!r}; expected a finite number")

    def _pairs(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module name -> (A, B).

        Raises:
            InputError: tensors that are not pairs of A and B.
        """
        modules: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            for kind in ("A", "B"):
                for infix in (f".lora_{kind}.weight", f".lora_embedding_{kind}"):
                    if name.startswith(PREFIX) and name.endswith(infix):
                        modules.setdefault(name[len(PREFIX) : -len(infix)], {})[kind] = tensor
        known = sum(len(pair) for pair in modules.values())
        if known != len(self.tensors) or any(len(pair) != 2 for pair in modules.values()):
            raise InputError("the adapter holds tensors other than pairs of lora_A and lora_B")
        return {module: (pair["A"], pair["B"]) for module, pair in modules.items()}

    def _alpha(self, module: str) -> float:
        alphas = self.config.alpha_pattern
        return float(alphas.get(get_pattern_key(alphas.keys(), module), self.config.lora_alpha))

    def changes(self, model: PreTrainedModel) -> dict[str, Change]:
        modules = dict(model.named_modules())
        owners = [id(weight) for module in modules.values() for weight in module.parameters(recurse=False)]
        changes: dict[str, Change] = {}
        for layer, (a, b, scale) in sorted(self.parts().items()):
            if layer not in modules or features(modules[layer]) is None:
                raise InputError(
                    f"the adapters adapt {layer!r}, which {type(model).__name__} does not have: another base model?"
                )
            weight = modules[layer].weight
            if type(weight) is not nn.Parameter or not weight.is_floating_point():
                raise InputError(f"merge_method: merged weights cannot be written into {layer!r}, which is quantised")
            if owners.count(id(weight)) > 1:
                raise InputError(
                    f"merge_method: merged weights cannot be written into {layer!r}, whose weights another layer shares"
                )
            transposed = isinstance(modules[layer], (Conv1D, nn.Embedding))
            changes[f"{layer}.weight"] = LowRankChange(weight, a, b, scale, transposed)
        return changes

    def parts(self) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
        """Module name -> (A, B, s) in fp32, A of shape (r, in), B of shape (out, r); the module's delta is s B A.

        s is α/r, or α/√r with rank-stabilised LoRA, with α and r as the adapter's patterns say for this module.

        Raises:
            InputError: tensors that are not pairs of A and B.
        """
        parts = {}
        for module, (a, b) in self._pairs().items():
            rank = a.shape[0]
            scale = self._alpha(module) / (rank**0.5 if self.config.use_rslora else rank)
            parts[module] = (a.float(), b.float(), scale)
        return parts

    def factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module name -> (A, s B): see `parts`."""
        return {module: (a, b * scale) for module, (a, b, scale) in self.parts().items()}


def features(layer: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, quantised or not, or of an embedding; None for anything else."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, Conv1D):  # GPT-2's linear layer, which keeps its weight transposed
        weight: torch.Tensor = layer.weight
        return weight.shape[0], weight.shape[1]
    wide, high = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return (wide, high) if isinstance(wide, int) and isinstance(high, int) else None


def mixture_adapter(
    adapters: Mapping[str, Adapter], weights: Mapping[str, float]
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The mixture as one adapter of rank Σ r_i, exactly: A = [A_i], B = [w_i s_i B_i], scaling 1, in fp32.

    What PEFT's `combination_type="cat"` builds, but also right for rank-stabilised LoRA and without rounding to the base's
    dtype.

    Args:
        adapters: name -> adapter.
        weights: name -> weight; those named are taken.
    """
    factors = {name: adapters[name].factors() for name in sorted(weights)}
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for module in sorted({module for parts in factors.values() for module in parts}):
        parts = [
            (a, weights[name] * b) for name, found in factors.items() if module in found for a, b in [found[module]]
        ]
        embedding = any(f"{PREFIX}{module}.lora_embedding_A" in adapters[name].tensors for name in weights)
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        tensors[f"{PREFIX}{module}.{names[0]}"] = torch.cat([a for a, _ in parts]).contiguous()
        tensors[f"{PREFIX}{module}.{names[1]}"] = torch.cat([b for _, b in parts], dim=1).contiguous()
        ranks[module] = sum(len(a) for a, _ in parts)
    width = max(ranks.values())
    first = adapters[min(weights)].config
    config = LoraConfig(
        r=width,
        lora_alpha=width,
        lora_dropout=0.0,
        target_modules=sorted(ranks),
        rank_pattern={module: rank for module, rank in ranks.items() if rank != width},
        alpha_pattern={module: rank for module, rank in ranks.items() if rank != width},
        fan_in_fan_out=any(adapters[name].config.fan_in_fan_out for name in weights),
        task_type=first.task_type,  # of a classifier's encoder none
        base_model_name_or_path=first.base_model_name_or_path,
        inference_mode=True,
    )
    return config, tensors


def write_adapter(folder: Path, adapters: Mapping[str, Adapter], weights: Mapping[str, float], base: str) -> None:
    """Writes `mixture_adapter` as a PEFT adapter folder of the base model `base`."""
    config, tensors = mixture_adapter(adapters, weights)
    config.base_model_name_or_path = base
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
