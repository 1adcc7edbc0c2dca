"""Exact parameter averages of LoRA adapters, scored without merging.

A mixture's model has the weights W = W0 + Σ w_i ΔW_i with ΔW_i = s_i B_i A_i (Merge to Mix, arXiv 2505.16066, with LoRA
adapters as the fine-tuned models). All adapters are stacked once per layer, A = [A_1; …; A_N] and B = [s_1 B_1, …, s_N B_N],
and a gate g multiplies the rows of A x: g = w_i on the rows of adapter i. Then B (g ∘ A x) = Σ w_i ΔW_i x, which is the
average itself and not an approximation of it. Changing the mixture writes N numbers; the base model is never touched, so it
may be quantised.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from m2m_hf.errors import InputError
from m2m_hf.merging.adapter import Adapter, another_base, features


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


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU's on a device, without waiting for what that is at."""
    wait = device.type != "cuda" or tensor.requires_grad
    return tensor.to(device) if wait else tensor.pin_memory().to(device, non_blocking=True)


def two_rows(model: PreTrainedModel) -> dict[str, Any]:
    """The smallest input of two rows that a model takes: three tokens each, or an image."""
    if model.main_input_name == "pixel_values":
        size = getattr(getattr(model.config, "vision_config", model.config), "image_size", 64)
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

    A GPU spends on B (g ∘ A x) much more than its arithmetic: narrow products, and reading and writing all outputs once more.
    There, a mixture that is to fill whole passes takes W0 + (B ∘ g) A instead, written into a scratch tensor for one layer at a
    time, summed in fp32 and rounded once, as weights merged in the base's dtype are.

    Args:
        model: the base model; it is used in place and given back by `detach`.
        adapters: name -> adapter; any ranks and scalings, sorted by name inside, so that order plays no part.
        writes: whether linear layers may be written like that; by default on CUDA. Quantised layers and others never are.

    Raises:
        InputError: an adapter that does not fit the model.
    """

    shrink = 1  # by how much less than the token budget fits into memory, as scoring has found

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, Adapter], *, writes: bool | None = None) -> None:
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
        self._writing = False
        for name in sorted({module for parts in factors.values() for module in parts}):
            if name not in modules:
                raise another_base(name, model)
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
        self._written = (
            self._replace_products(modules) if writes or (writes is None and model.device.type == "cuda") else {}
        )
        self.writes = bool(self._written)

    def _replace_products(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
        """Has plain linear layers take, while the stack writes, the mixture's weights for their own; returns them by name."""
        layers = {
            layer: module
            for layer in self._layers
            if type(module := modules[layer.name]) is nn.Linear
            and module.weight.dtype == layer.b.dtype
            and "forward" not in vars(module)
        }
        room: dict[torch.device, int] = {}
        for module in layers.values():
            room[module.weight.device] = max(room.get(module.weight.device, 0), module.weight.numel())
        slots = {device: torch.empty(size, dtype=self.model.dtype, device=device) for device, size in room.items()}
        for layer, module in layers.items():
            module.forward = partial(self._product, layer, module, module.forward, slots[module.weight.device])  # type: ignore[method-assign]
        return {layer.name: module for layer, module in layers.items()}

    def _product(
        self,
        layer: StackedLayer,
        module: nn.Linear,
        own: Callable[[torch.Tensor], torch.Tensor],
        slot: torch.Tensor,
        input: torch.Tensor,
    ) -> torch.Tensor:
        """What a linear layer gives, before the hook."""
        if not self._writing or self._gates is None:
            return own(input)
        weight = slot[: module.weight.numel()].view_as(module.weight)
        torch.addmm(module.weight, (layer.b * self._gates[layer.layout]).to(layer.b.dtype), layer.a, out=weight)
        return nn.functional.linear(input, weight, module.bias)

    def _find_shared_inputs(self, modules: Mapping[str, nn.Module]) -> bool:
        """Sees in one small forward pass which layers are given the same tensor, and has them share their product.

        True if every adapted layer sees rows as rows, so that each may have a mixture of its own. The output head does not while
        only scored positions are kept, nor do layers to which tokens are routed.
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
            if self._gates is None or (self._writing and layer.name in self._written):
                return output
            down = layer.down(args[0])
            gated = (down * self._gates[layer.layout]).to(down.dtype)
            if output.dtype != gated.dtype:
                return output + nn.functional.linear(gated, layer.b).to(output.dtype)
            flat, gated = output.reshape(-1, output.shape[-1]), gated.reshape(-1, gated.shape[-1])
            if layer.name in self._written and not torch.is_grad_enabled():
                return flat.addmm_(gated, layer.b.T).view(output.shape)  # without a copy of what nothing else has seen
            return torch.addmm(flat, gated, layer.b.T).view(output.shape)

        return add

    def set(self, weights: Mapping[str, float]) -> None:
        """Makes the model the one with W0 + Σ w_i ΔW_i from now on; adapters that are not named have weight 0."""
        self.set_rows([weights])

    def write(self, weights: Mapping[str, float]) -> None:
        """The same by writing what layers can be written: for passes of many tokens, without gradients."""
        self.set(weights)
        self._writing = True

    def set_rows(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Gives every row of the next batches a mixture of its own; a single one holds for all rows.

        Raises:
            KeyError: a name that is not in the stack.
        """
        self._writing = False
        different = {id(weights): weights for weights in rows}
        if unknown := {name for weights in different.values() for name in weights} - set(self.names):
            raise KeyError(f"not in the stack: {', '.join(sorted(unknown))}")
        if not any(rows):
            self._gates = None
            return
        values = torch.tensor([[weights.get(name, 0.0) for name in self.names] for weights in different.values()])
        if len(rows) == 1:
            self.set_gates(values[0])
            return
        number = {one: place for place, one in enumerate(different)}
        values = values[[number[id(weights)] for weights in rows]]
        self._gates = {
            layout: to_device(values, owner.device)[:, None, owner] for layout, owner in self._owners.items()
        }

    def set_gates(self, weights: torch.Tensor) -> None:
        """The same with a tensor of one weight per name of `names`, through which gradients pass."""
        self._writing = False
        self._gates = {layout: to_device(weights, owner.device)[owner] for layout, owner in self._owners.items()}

    def detach(self) -> None:
        """Takes the stack off the base model, which is then as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._written.values():
            del module.forward
        self._written = {}
