"""Exact parameter averages of LoRA adapters, scored without merging.

A mixture's model has the weights W = W0 + Σ w_i ΔW_i with ΔW_i = s_i B_i A_i (Merge to Mix, arXiv 2505.16066, with LoRA
adapters as the fine-tuned models). All adapters are stacked once per layer, A = [A_1; …; A_N] and B = [s_1 B_1, …, s_N B_N],
and a gate g multiplies the rows of A x: g = w_i on the rows of adapter i. Then B (g ∘ A x) = Σ w_i ΔW_i x, which is the
average itself and not an approximation of it. Changing the mixture writes N numbers; the base model is never touched, so it
may be quantised.
"""

import inspect
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from m2m_hf.errors import InputError

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
        except Exception as error:  # PEFT may raise anything over what a file of another's has in it
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
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            for kind in ("A", "B"):
                for infix in (f".lora_{kind}.weight", f".lora_embedding_{kind}"):
                    if name.startswith(PREFIX) and name.endswith(infix):
                        found.setdefault(name[len(PREFIX) : -len(infix)], {})[kind] = tensor
        known = sum(len(part) for part in found.values())
        if known != len(self.tensors) or any(len(part) != 2 for part in found.values()):
            raise InputError("the adapter holds tensors other than pairs of lora_A and lora_B")
        return {module: (part["A"], part["B"]) for module, part in found.items()}

    def _alpha(self, module: str) -> float:
        alphas = self.config.alpha_pattern
        return float(alphas.get(get_pattern_key(alphas.keys(), module), self.config.lora_alpha))

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


class StackedLayer:
    """One adapted layer of the base model with all adapters' factors: A of shape (Σ r, in), B of shape (out, Σ r).

    Args:
        layout: rank of every adapter of the stack on this layer, 0 where an adapter leaves it alone.
    """

    def __init__(self, name: str, layer: nn.Module, a: torch.Tensor, b: torch.Tensor, layout: tuple[int, ...]) -> None:
        self.name = name
        self.layout = layout
        self.is_embedding = isinstance(layer, nn.Embedding)
        expected = features(layer)
        if expected is None:
            raise InputError(
                f"{name!r} is a {type(layer).__name__}; adapters on linear and embedding layers can be averaged"
            )
        if (a.shape[1], b.shape[0]) != expected:
            raise InputError(
                f"{name!r}: the adapters' shape {(a.shape[1], b.shape[0])} does not fit {expected}: another base model?"
            )
        self.a, self.b = a, b
        # Some embeddings scale what they look up (Gemma); PEFT scales the adapter's part alike.
        self.scale = float(getattr(layer, "embed_scale", 1.0)) if self.is_embedding else 1.0
        self.source: SharedInput | None = None

    def down(self, x: torch.Tensor) -> torch.Tensor:
        """A x, of shape (…, Σ r)."""
        if self.is_embedding:
            return nn.functional.embedding(x, self.a.T) * self.scale
        if self.source is not None:
            return self.source.down(x, self)
        return nn.functional.linear(x.to(self.a.dtype), self.a)


class SharedInput:
    """Layers that are given the same tensor (query, key and value; gate and up): their A x is one product, computed once."""

    def __init__(self, layers: Sequence[StackedLayer]) -> None:
        self.a = torch.cat([layer.a for layer in layers])
        ends = list(accumulate(len(layer.a) for layer in layers))
        self.parts = {id(layer): slice(end - len(layer.a), end) for layer, end in zip(layers, ends, strict=True)}
        for layer in layers:
            layer.a = self.a[self.parts[id(layer)]]
            layer.source = self
        self._x: torch.Tensor | None = None
        self._product = self.a
        self._left = 0

    def down(self, x: torch.Tensor, layer: StackedLayer) -> torch.Tensor:
        if self._x is not x:
            self._x, self._left = x, len(self.parts)
            self._product = nn.functional.linear(x.to(self.a.dtype), self.a)
        product = self._product[..., self.parts[id(layer)]]
        self._left -= 1
        if not self._left:
            self._x, self._product = None, self.a  # nothing is held longer than the layers need it
        return product


def features(layer: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, quantised or not, or of an embedding; None for anything else."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, Conv1D):  # GPT-2's linear layer, which keeps its weight transposed
        weight: torch.Tensor = layer.weight
        return weight.shape[0], weight.shape[1]
    wide, high = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return (wide, high) if isinstance(wide, int) and isinstance(high, int) else None


def two_rows(model: PreTrainedModel) -> dict[str, Any]:
    """The smallest input of two rows that a model takes: three tokens each, or an image."""
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 64)
        high, wide = (size, size) if isinstance(size, int) else size
        channels = getattr(model.config, "num_channels", 3)
        return {"pixel_values": torch.zeros(2, channels, high, wide, dtype=model.dtype, device=model.device)}
    ids = {"input_ids": torch.zeros(2, 3, dtype=torch.long, device=model.device)}
    return ids | ({"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {})


class GatedStack:
    """All adapters of a bank on one base model; `set` makes the base behave as any of their averages.

    Forward hooks on the adapted layers add B (g ∘ A x) to what they give out. A and B are in the base's own dtype, in which the
    adapters were also trained; the gate is applied in fp32, so that no weight of a mixture is rounded. Without a mixture set,
    the base model answers.

    Args:
        model: the base model; it is used in place and given back by `detach`.
        adapters: name -> adapter; any ranks and scalings, sorted by name inside, so that order plays no part.

    Raises:
        InputError: an adapter that does not fit the model.
    """

    shrink = 1  # by how much less than the token budget fits into memory, as scoring has found

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, Adapter]) -> None:
        self.model = model
        self.adapters = dict(sorted(adapters.items()))
        self.names = tuple(self.adapters)
        factors = {name: adapter.factors() for name, adapter in self.adapters.items()}
        # Where PEFT has put its own layer around one of the base's, the latter.
        modules = {name.removesuffix(".base_layer"): module for name, module in model.named_modules()}
        self._layers: list[StackedLayer] = []
        self._owners: dict[tuple[int, ...], torch.Tensor] = {}
        self._gates: dict[tuple[int, ...], torch.Tensor] | None = None
        self._handles: list[RemovableHandle] = []
        for name in sorted({module for parts in factors.values() for module in parts}):
            if name not in modules:
                raise InputError(
                    f"the adapters adapt {name!r}, which {type(model).__name__} does not have: another base model?"
                )
            parts = [factors[adapter].get(name) for adapter in self.names]
            layout = tuple(0 if part is None else len(part[0]) for part in parts)
            device = next(iter(modules[name].parameters())).device
            a = torch.cat([part[0] for part in parts if part]).to(device, model.dtype)
            b = torch.cat([part[1] for part in parts if part], dim=1).to(device, model.dtype)
            self._layers.append(StackedLayer(name, modules[name], a, b, layout))
            owner = torch.repeat_interleave(torch.arange(len(self.names)), torch.tensor(layout))
            self._owners.setdefault(layout, owner.to(device))
        self.takes_rows = self._find_shared_inputs(modules)
        for layer in self._layers:
            self._handles.append(modules[layer.name].register_forward_hook(self._hook(layer)))

    def _find_shared_inputs(self, modules: Mapping[str, nn.Module]) -> bool:
        """Sees in one small forward pass which layers are given the same tensor, and has them share their product.

        Returns:
            Whether every adapted layer sees rows as rows, so that each may have a mixture of its own. The output head does
            not while only scored positions are kept, nor do layers to which tokens are routed.
        """
        by_input: dict[int, list[StackedLayer]] = {}
        seen: list[torch.Tensor] = []
        texts = self.model.main_input_name != "pixel_values"
        by_row = not any(modules[layer.name] is self.model.get_output_embeddings() for layer in self._layers)

        def look(layer: StackedLayer) -> Any:
            def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                nonlocal by_row
                by_row &= args[0].shape[:2] == (2, 3) if texts else len(args[0]) == 2 and args[0].ndim == 3
                seen.append(args[0])  # held, so that no other tensor takes its id
                if not layer.is_embedding:
                    by_input.setdefault(id(args[0]), []).append(layer)

            return hook

        handles = [modules[layer.name].register_forward_pre_hook(look(layer)) for layer in self._layers]
        try:
            if self._layers:
                self.model.eval()
                with torch.inference_mode():
                    self.model(**two_rows(self.model))
        finally:
            for handle in handles:
                handle.remove()
        calls = Counter(id(layer) for layers in by_input.values() for layer in layers)
        for layers in by_input.values():
            if len(layers) > 1 and all(calls[id(layer)] == 1 for layer in layers):
                SharedInput(layers)
        return by_row

    def _hook(self, layer: StackedLayer) -> Any:
        def add(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if self._gates is None:
                return output
            down = layer.down(args[0])
            gated = (down * self._gates[layer.layout]).to(down.dtype)
            if output.dtype != gated.dtype:
                return output + nn.functional.linear(gated, layer.b).to(output.dtype)
            total = torch.addmm(output.reshape(-1, output.shape[-1]), gated.reshape(-1, gated.shape[-1]), layer.b.T)
            return total.view(output.shape)

        return add

    def set(self, weights: Mapping[str, float]) -> None:
        """Makes the model the one with W0 + Σ w_i ΔW_i from now on; adapters that are not named have weight 0.

        Raises:
            KeyError: a name that is not in the stack.
        """
        self.set_rows([weights])

    def set_rows(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Gives every row of the next batches a mixture of its own; a single one holds for all rows.

        Raises:
            KeyError: a name that is not in the stack.
        """
        unknown = {name for weights in rows for name in weights} - set(self.names)
        if unknown:
            raise KeyError(f"not in the stack: {', '.join(sorted(unknown))}")
        if not any(rows):
            self._gates = None
            return
        values = torch.tensor([[weights.get(name, 0.0) for name in self.names] for weights in rows])
        if len(rows) == 1:
            self._gates = {layout: values[0].to(owner.device)[owner] for layout, owner in self._owners.items()}
        else:
            self._gates = {layout: values.to(owner.device)[:, None, owner] for layout, owner in self._owners.items()}

    def set_gates(self, weights: torch.Tensor) -> None:
        """The same with a tensor of one weight per name of `names`, through which gradients pass."""
        self._gates = {layout: weights.to(owner.device)[owner] for layout, owner in self._owners.items()}

    def detach(self) -> None:
        """Takes the stack off the base model, which is then as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


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
        task_type="CAUSAL_LM",
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
