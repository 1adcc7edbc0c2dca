"""One pass of the frozen base for the rows of several adapters, each row through its own.

Every adapter is trained by a Trainer of its own, on a twin of the base that shares its weights. For a pass their batches are put
below each other, and one of the twins computes all of them: where its LoRA layers multiply by A and B, the stacked factors of all
adapters multiply the rows of each by its own, in one batched product of rank r. A row's result depends on nothing but the row and
its adapter, and what dropout draws for a batch are the numbers that it would draw were the batch alone.
"""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState
from peft import PeftModel
from peft.tuners.lora import Embedding, LoraLayer
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from m2m_hf.modeling.inspection import positions
from m2m_hf.training.flat import Flat

FILL = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "labels": -100}  # what texts are padded with
BY_TOKEN = {
    "log_probs": 1,
    "entropy": 1,
    "is_top1": 1,
    "label_mask": 1,
}  # outputs that leave out so many of a row's tokens


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own with the same weights in memory: layers may be put around its modules, and hooks on them."""
    memo = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    memo |= {id(layer.state): layer.state for layer in model.modules() if hasattr(layer, "init_8bit_state")}
    return copy.deepcopy(model, memo)


class UnsharedError(Exception):
    """The rows of several adapters cannot share a pass."""


@dataclass(frozen=True)
class Layout:
    """Where the rows of each adapter stand: `high` rows for each, `wide` tokens in each (0 for images), the rest is padding."""

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    wide: int

    @property
    def high(self) -> int:
        return max(self.rows)

    @property
    def total(self) -> int:
        return self.high * len(self.rows)

    def view(self, tensor: torch.Tensor, number: int) -> torch.Tensor:
        """The rows of one adapter without padding. Rows may be split (attention's heads); tokens are any further dimension."""
        part = self._by_row(tensor)[number * self.high :][: self.rows[number]]
        for dim in range(1, part.ndim):
            if self.wide and part.shape[dim] == self.wide:
                part = part.narrow(dim, 0, self.widths[number])
        return part

    def part(self, tensor: torch.Tensor, number: int) -> torch.Tensor:
        """The same as a tensor that lies in memory as it does alone."""
        part = self.view(tensor, number)
        return dense(part if len(tensor) == self.total else part.flatten(0, 1), tensor)

    def joined(self, parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Undoes `part`."""
        whole, padded = len(like) == self.total, []
        tokens = [self.wide > 0 and size == self.wide for size in self._by_row(like).shape]
        for number, part in enumerate(parts):
            rows = part if whole else part.reshape(self.rows[number], -1, *part.shape[1:])
            sides = [0, self.high - len(rows)]
            for dim in range(1, rows.ndim):
                sides = [0, self.wide - rows.shape[dim] if tokens[dim] else 0, *sides]
            padded.append(functional.pad(rows, sides))
        joined = torch.cat(padded)
        return joined if whole else joined.flatten(0, 1)

    def _by_row(self, tensor: torch.Tensor) -> torch.Tensor:
        if len(tensor) % self.total:
            raise UnsharedError(f"a layer sees {tuple(tensor.shape)} where {self.total} rows were given")
        return tensor if len(tensor) == self.total else tensor.reshape(self.total, -1, *tensor.shape[1:])


def dense(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A part of a tensor as it lies in memory when it is whole: what numbers a card draws depends on that."""
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda dim: -int(strides[dim]))
    found = part.permute(order).contiguous()
    if found.data_ptr() % 16:
        found = found.clone()
    return found.permute([order.index(dim) for dim in range(like.ndim)])


def together(inputs: Sequence[Mapping[str, Any]], taken: set[int], spare: int = 0) -> tuple[dict[str, Any], Layout]:
    """The inputs of several batches below each other, padded, to `spare` tokens more.

    The number of tokens is none of `taken`, the model's other sizes, from which it must be told.

    Raises:
        UnsharedError: there are inputs whose rows cannot be padded.
    """
    first = inputs[0]
    tensors = {name for name, value in first.items() if isinstance(value, torch.Tensor)}
    texts = "input_ids" in first
    if any(one.keys() != first.keys() for one in inputs) or tensors - (FILL.keys() if texts else {"pixel_values"}):
        raise UnsharedError(f"batches hold {', '.join(sorted({name for one in inputs for name in one}))}")
    rows = tuple(len(one["input_ids" if texts else "pixel_values"]) for one in inputs)
    widths = tuple(one["input_ids"].shape[1] if texts else 0 for one in inputs)
    wide = max(widths) + (spare if texts else 0)
    while texts and set(widths) != {wide} and wide in taken:
        wide += 1
    layout, batch = Layout(rows, widths, wide), {name: value for name, value in first.items() if name not in tensors}
    for name in tensors:
        parts = []
        for one in inputs:
            value = one[name]
            sides = (0, wide - value.shape[1]) if texts else (0, 0)
            padded = functional.pad(value, sides, value=FILL.get(name, 0))
            more = padded[:1].expand(layout.high - len(value), *padded.shape[1:])  # a row of zeros may be not a number
            padded = torch.cat([padded, torch.full_like(more, -100) if name == "labels" else more])
            parts.append(padded)
        batch[name] = torch.cat(parts)
    return batch, layout


def apart(outputs: Any, layout: Layout, number: int) -> Any:
    """What a pass gave for the rows of one adapter, as its own batch would have given it; sums over all rows are left out."""
    found: dict[str, Any] = {}
    for name, value in outputs.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            continue
        part = value[number * layout.high :][: layout.rows[number]]
        tokens = layout.wide - BY_TOKEN.get(name, 0)
        if layout.wide and part.ndim > (1 if name in BY_TOKEN else 2) and part.shape[1] == tokens:
            part = part[:, : layout.widths[number] - BY_TOKEN.get(name, 0)]
        found[name] = part
    return type(outputs)(**found)


class Stacked(nn.Module):
    """One factor of one LoRA layer of all adapters, (adapters, out, in): a part of the tensor that holds all factors.

    Args:
        start: where it begins in the numbers of an adapter.
    """

    def __init__(self, shape: torch.Size, start: int) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = None
        self.shape, self.span = shape, slice(start, start + shape.numel())
        self.layout: Layout | None = None

    def use(self, block: torch.Tensor) -> None:
        """Computes with the factors in `block` (adapters in a pass, numbers of an adapter)."""
        self.weight = nn.Parameter(block[:, self.span].view(len(block), *self.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.layout is not None
        assert self.weight is not None
        rows = self.layout.total
        if len(x) != rows and not (x.ndim == 2 and len(x) == rows * self.layout.wide):
            raise UnsharedError(f"a layer sees {tuple(x.shape)} where {rows} rows were given")
        product = torch.bmm(x.reshape(len(self.weight), -1, x.shape[-1]), self.weight.transpose(1, 2))
        return product.view(*x.shape[:-1], self.weight.shape[1])


class SharedAdapters:
    """The adapters of several twins: their factors lie in one tensor (adapters, numbers), whose views their parameters become.

    Raises:
        UnsharedError: the factors are of several data types or devices.
    """

    def __init__(self, models: Sequence[PeftModel]) -> None:
        self.models = list(models)
        (self.name,) = models[0].active_adapters
        self._layers = [[layer for layer in model.modules() if isinstance(layer, LoraLayer)] for model in models]
        self.factors = [
            [
                factor[self.name].weight
                for layer in layers
                for factor in (layer.lora_A, layer.lora_B)
                if self.name in factor
            ]
            for layers in self._layers
        ]
        if len({(factor.dtype, factor.device) for factor in chain.from_iterable(self.factors)}) > 1:
            raise UnsharedError("its adapter is of several data types, or on several devices")
        self._stacks, size = [], 0
        for factor in self.factors[0]:
            self._stacks.append(Stacked(factor.shape, size))
            size += factor.numel()
        self._numbers = (self.factors[0][0].data if size else torch.empty(0)).new_empty(len(models), size)
        self.flat = [Flat(nn.Parameter(whole), parts) for whole, parts in zip(self._numbers, self.factors, strict=True)]
        self.bind()
        stacked = {id(factor) for factor in chain.from_iterable(self.factors)}
        self.others = [  # of embeddings, whose gradients are their own from the start
            parameter
            for parameter in chain.from_iterable(model.parameters() for model in models)
            if parameter.requires_grad and id(parameter) not in stacked
        ]
        config = models[0].config.to_dict()
        sizes = {size for parameter in models[0].parameters() for size in parameter.shape}
        numbers = {value for value in [*config.values(), *config.get("text_config", {}).values()] if type(value) is int}
        self.taken = sizes | numbers | {size // other for size in sizes for other in numbers if other}
        self.limit = positions(models[0])  # tokens in a row of a pass that several share
        while self.limit in self.taken:
            self.limit -= 1

    def bind(self) -> None:
        """Makes the adapters' parameters views, with the values that they have, if they are not, or not any more.

        Accelerate moves them when it prepares a model for several processes.
        """
        for numbers, factors in zip(self._numbers, self.factors, strict=True):
            for stack, owner in zip(self._stacks, factors, strict=True):
                part = numbers[stack.span].view(owner.shape)
                if owner.data_ptr() == part.data_ptr():
                    break
                part.copy_(owner.data)
                owner.data = part

    @contextmanager
    def mounted(self, places: Sequence[int], layout: Layout) -> Iterator[Any]:
        """While active, the twin that it gives computes the rows of the adapters at these places."""
        lead = places[0]
        block = self._numbers if len(places) == len(self.models) else self._numbers[list(places)]
        stacks, before = iter(self._stacks), []
        for number, layer in enumerate(self._layers[lead]):
            if self.name in layer.lora_A:
                for factor in (layer.lora_A, layer.lora_B):
                    stack = next(stacks)
                    stack.use(block)
                    stack.layout = layout
                    before.append((factor, factor[self.name]))
                    factor[self.name] = stack
            elif isinstance(layer, Embedding):
                layer.forward = self._embed(number, layer, places, layout)
        try:
            yield self.models[lead]
        finally:
            for factor, own in before:
                factor[self.name] = own
            for layer in self._layers[lead]:
                vars(layer).pop("forward", None)

    def _embed(self, number: int, layer: Any, places: Sequence[int], layout: Layout) -> Callable[..., torch.Tensor]:
        """What an adapted embedding gives for the rows of several adapters."""

        def forward(ids: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = layer.base_layer(ids)
            scale, parts = layer.scaling[self.name] * float(layer._get_embed_scale() or 1.0), []
            for position, place in enumerate(places):
                own, part = self._layers[place][number], ids[position * layout.high :][: layout.high]
                a, b = own.lora_embedding_A[self.name], own.lora_embedding_B[self.name]
                parts.append(functional.embedding(part, a.T) @ b.T * scale)
            return (result + torch.cat(parts)).to(result.dtype)

        return forward

    def share_out(self, places: Sequence[int]) -> None:
        """Gives every adapter of a pass its gradient."""
        found = [stack.weight.grad for stack in self._stacks if stack.weight is not None]
        known = [one.flatten(1) for one in found if one is not None]
        joined = torch.cat(known, 1) if known and len(known) == len(found) else None
        for number, place in enumerate(places):
            flat = self.flat[place]
            if flat.is_whole and joined is not None:
                flat.add(joined[number])
                continue
            flat.leave()
            for owner, gradient in zip(flat.parts, found, strict=True):
                if gradient is not None:
                    owner.grad = gradient[number] if owner.grad is None else owner.grad + gradient[number]
        self.forget()

    @contextmanager
    def random(self) -> Iterator[None]:
        """While active, the factors are random numbers, other ones for each adapter."""
        draw, kept = torch.Generator().manual_seed(0), []
        weights = [
            layer.lora_embedding_B[self.name]
            for layers in self._layers
            for layer in layers
            if isinstance(layer, Embedding)
        ]
        weights += [b for factors in self.factors for b in factors[1::2]]
        for weight in weights:
            kept.append(weight.data.clone())
            weight.data.copy_(torch.randn(weight.shape, generator=draw) * 0.1)
        try:
            yield
        finally:
            for weight, before in zip(weights, kept, strict=True):
                weight.data.copy_(before)

    def forget(self) -> None:
        """Drops what a pass that did not end has left."""
        for stack in self._stacks:
            stack.weight = None


class Randomness:
    """The state of all random numbers, and of accelerate's gradient accumulation, as one Trainer has it while others run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.take()

    def take(self, layers_only: bool = False) -> None:
        """Keeps what is there now; `layers_only` where nothing but the model may have drawn."""
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        if not layers_only:
            self.python, self.numpy = random.getstate(), np.random.get_state()
        self.accumulation = shared_state()

    def give(self, layers_only: bool = False) -> None:
        """Puts it back."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        if not layers_only:
            random.setstate(self.python)
            np.random.set_state(self.numpy)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self.accumulation)

    @property
    def of_layers(self) -> torch.Tensor:
        """What dropout draws from."""
        return self.cpu if self.cuda is None else self.cuda

    @of_layers.setter
    def of_layers(self, state: torch.Tensor) -> None:
        if self.cuda is None:
            self.cpu = state
        else:
            self.cuda = state


def shared_state() -> dict[str, Any]:
    """A copy of what all accelerators of a process share."""
    return {
        name: list(value) if isinstance(value, list) else value for name, value in GradientState._shared_state.items()
    }


class OwnDraws:
    """While active, dropout draws for the rows of every adapter what it would draw were they alone.

    A pass has random numbers of its own, and a number drawn from them names each call: where activation checkpointing computes a
    layer again it draws the same number first, and then the same masks. Functions of torch are replaced rather than watched by a
    `TorchFunctionMode`, which `backward` leaves, and with it the layers that are computed again there.
    """

    def __init__(self, layout: Layout, draws: Sequence[Randomness]) -> None:
        self._layout, self._draws = layout, draws
        self._known: dict[int, list[torch.Tensor]] = {}
        self._dropout, self._attention = functional.dropout, functional.scaled_dot_product_attention

    def __enter__(self) -> None:
        functional.dropout, functional.scaled_dot_product_attention = self._drop, self._attend

    def __exit__(self, *error: object) -> None:
        functional.dropout, functional.scaled_dot_product_attention = self._dropout, self._attention

    @property
    def calls(self) -> int:
        return len(self._known)

    def _drop(self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if not training or p == 0:
            return self._dropout(input, p, training, inplace)
        if not 0 < p < 1 or not input.is_contiguous() or len(input) != self._layout.total:
            return self._each([input], lambda parts: self._dropout(parts[0], p))
        kept = torch.zeros_like(input, requires_grad=False)
        for number in self._turns(input.device):
            part = self._layout.view(kept, number)
            if input.is_cuda:
                part.copy_(torch.native_dropout(part.new_empty(part.shape), p, True)[1])
            else:
                part.bernoulli_(1 - p)
        return input * kept * (1 / (1 - p)) if input.is_cuda else input * kept.div_(1 - p)  # as each is rounded alone

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if dropout_p == 0:
            return self._attention(query, key, value, attn_mask, dropout_p, *args, **kwargs)
        tensors = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]

        def attend(parts: list[torch.Tensor]) -> torch.Tensor:
            mask = None if attn_mask is None else parts[3]
            return self._attention(parts[0], parts[1], parts[2], mask, dropout_p, *args, **kwargs)

        return self._each(tensors, attend)

    def _each(
        self, tensors: Sequence[torch.Tensor], call: Callable[[list[torch.Tensor]], torch.Tensor]
    ) -> torch.Tensor:
        parts = [
            call([self._layout.part(tensor, number) for tensor in tensors]) for number in self._turns(tensors[0].device)
        ]
        return self._layout.joined(parts, tensors[0])

    def _turns(self, device: torch.device) -> Iterator[int]:
        """Every adapter's place, while its random numbers are drawn."""
        name = int(torch.randint(2**62, ()))
        again, of_pass = name in self._known, torch.get_rng_state()
        states = self._known.setdefault(name, [draw.of_layers for draw in self._draws])
        for number, state in enumerate(states):
            set_state(state, device)
            yield number
            if not again:
                self._draws[number].of_layers = get_state(device)
        torch.set_rng_state(of_pass)


def get_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
