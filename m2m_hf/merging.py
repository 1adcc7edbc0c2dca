"""Exact parameter averages of LoRA adapters, scored without merging.

A mixture's model has the weights W = W0 + Σ w_i ΔW_i with ΔW_i = s_i B_i A_i (Merge to Mix, arXiv 2505.16066, with LoRA
adapters as the fine-tuned models). All adapters are stacked once per layer, A = [A_1; …; A_N] and B = [s_1 B_1, …, s_N B_N],
and a gate g multiplies the rows of A x: g = w_i on the rows of adapter i. Then B (g ∘ A x) = Σ w_i ΔW_i x, which is the
average itself and not an approximation of it. Changing the mixture writes N numbers; the base model is never touched.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .errors import InputError

PREFIX = "base_model.model."
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
    """Refuses adapters whose parameter average would not mean anything, or would not be what the gated stack computes.

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
            "depends on the data, so the adapters of a bank would not share one base. Use the default"
        )


@dataclass(frozen=True)
class Adapter:
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
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise InputError(
                f"{folder}: expected adapter_config.json and adapter_model.safetensors ({error})"
            ) from error
        if not isinstance(config, LoraConfig):
            raise InputError(
                f"{folder}: expected a LoRA adapter, got {getattr(config.peft_type, 'value', config.peft_type)}"
            )
        refuse_unless_averageable(config, str(folder))
        return cls(config, tensors)

    def factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module name -> (A, s B) in fp32, A of shape (r, in), B of shape (out, r).

        s is α/r, or α/√r with rank-stabilised LoRA, with α and r as the adapter's patterns say for this module.
        """
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            for kind in ("A", "B"):
                for infix in (f".lora_{kind}.weight", f".lora_embedding_{kind}"):
                    if name.startswith(PREFIX) and name.endswith(infix):
                        parts.setdefault(name[len(PREFIX) : -len(infix)], {})[kind] = tensor.float()
        known = sum(len(part) for part in parts.values())
        if known != len(self.tensors) or any(len(part) != 2 for part in parts.values()):
            raise InputError("the adapter holds tensors other than pairs of lora_A and lora_B")
        scaled = {}
        for module, part in parts.items():
            rank = part["A"].shape[0]
            alphas = self.config.alpha_pattern
            alpha = alphas.get(get_pattern_key(alphas.keys(), module), self.config.lora_alpha)
            scale = alpha / (rank**0.5 if self.config.use_rslora else rank)
            scaled[module] = (part["A"], part["B"] * scale)
        return scaled


class GatedStack:
    """All adapters of a bank on one base model; `set` makes the base behave as any of their averages.

    Linear layers are gated by a forward hook, embeddings through their B. The stack is fp32 whatever the base is in, since the
    deltas are small against the weights. Without a mixture set, the base model answers.

    Args:
        model: the base model; it is used in place and given back by `detach`.
        adapters: name -> adapter; any ranks and scalings, sorted by name inside, so that order plays no part.

    Raises:
        InputError: an adapter that does not fit the model.
    """

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, Adapter]) -> None:
        self.model = model
        self.names = tuple(sorted(adapters))
        factors = {name: adapters[name].factors() for name in self.names}
        modules = sorted({module for parts in factors.values() for module in parts})
        missing = sorted(set(modules) - {name for name, _ in model.named_modules()})
        if missing:
            raise InputError(
                f"the adapters adapt {missing[0]!r}, which {type(model).__name__} does not have: another base model?"
            )
        ranks = {
            module: [factors[name][module][0].shape[0] if module in factors[name] else 0 for name in self.names]
            for module in modules
        }
        width = max(sum(rank) for rank in ranks.values())
        config = LoraConfig(
            r=width,
            lora_alpha=width,
            lora_dropout=0.0,
            target_modules=modules,
            rank_pattern={module: sum(rank) for module, rank in ranks.items() if sum(rank) != width},
            alpha_pattern={module: sum(rank) for module, rank in ranks.items() if sum(rank) != width},
            fan_in_fan_out=any(adapter.config.fan_in_fan_out for adapter in adapters.values()),
        )
        self._peft_model = get_peft_model(model, config)
        self._peft_model.requires_grad_(False)
        self._owners: dict[tuple[int, ...], torch.Tensor] = {}
        self._gates: dict[tuple[int, ...], torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._embeddings: list[tuple[nn.Parameter, torch.Tensor, tuple[int, ...]]] = []
        for module in modules:
            layer = model.get_submodule(module)
            layout = tuple(ranks[module])
            parts = [factors[name][module] for name in self.names if module in factors[name]]
            stacked = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)
            device = self._place(layer, module, stacked, layout)
            owner = torch.repeat_interleave(torch.arange(len(self.names)), torch.tensor(layout))
            self._owners.setdefault(layout, owner.to(device))
        self.set({})

    def _place(
        self, layer: nn.Module, module: str, stacked: tuple[torch.Tensor, torch.Tensor], layout: tuple[int, ...]
    ) -> torch.device:
        """Copies the stacked A and s B into `layer` and puts its gate in place."""
        if not isinstance(layer, LoraLayer):
            raise InputError(f"{module!r} is not a layer that PEFT's LoRA covers")
        if "default" in layer.lora_embedding_A:
            places = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
            # PEFT multiplies embedding factors without a module between them, so the gate goes into B.
            self._embeddings.append((places[1], stacked[1].to(places[1].device), layout))
        else:
            places = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            hook = self._gate_hook(layout)
            self._handles.append(layer.lora_A["default"].register_forward_hook(hook))
        for place, value in zip(places, stacked, strict=True):
            if place.shape != value.shape:
                raise InputError(
                    f"{module!r}: the adapters' shape {tuple(value.shape)} does not fit {tuple(place.shape)}: another base model?"
                )
            place.data = value.to(place.device)
        device: torch.device = places[0].device
        return device

    def _gate_hook(self, layout: tuple[int, ...]) -> Any:
        def gate(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output * self._gates[layout].to(output.device)

        return gate

    def set(self, weights: Mapping[str, float]) -> None:
        """Makes the model the one with W0 + Σ w_i ΔW_i from now on; adapters that are not named have weight 0.

        Raises:
            KeyError: a name that is not in the stack.
        """
        unknown = set(weights) - set(self.names)
        if unknown:
            raise KeyError(f"not in the stack: {', '.join(sorted(unknown))}")
        values = torch.tensor([weights.get(name, 0.0) for name in self.names], dtype=torch.float32)
        self._gates = {layout: values.to(owner.device)[owner] for layout, owner in self._owners.items()}
        for place, pristine, layout in self._embeddings:
            place.data = pristine * self._gates[layout]

    def detach(self) -> None:
        """Takes the stack off the base model, which is then as it was before."""
        for handle in self._handles:
            handle.remove()
        self._peft_model.unload()
