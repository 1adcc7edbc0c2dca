"""The parameters of one adapter as one tensor, so that clipping and an optimizer's step visit one instead of hundreds."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

BY_NUMBER = (Adagrad, Adam, AdamW, RMSprop, SGD)  # optimizers that treat every number by itself


class Flat:
    """One adapter's parameters for its Trainer, which trains them as one tensor while it `is_whole`.

    What the optimizer saves and reads is the state of the single parameters, as without this.

    Args:
        whole: all parameters one after another; they are views of it.
    """

    def __init__(self, whole: nn.Parameter, parts: Sequence[nn.Parameter]) -> None:
        self.whole, self.parts = whole, list(parts)
        self.is_whole = False
        self._sizes = [part.numel() for part in parts]

    def join(self, optimizer: Optimizer) -> None:
        """Has an optimizer step the whole, where that comes to the same: one that treats all numbers alike, each by itself."""
        groups = [group for group in optimizer.param_groups if group["params"]]
        known = [[*map(id, group["params"])] for group in groups]
        if type(optimizer) not in BY_NUMBER or known != [[*map(id, self.parts)]]:
            return
        state = optimizer.state_dict()
        self._optimizer, self.is_whole = optimizer, True
        groups[0]["params"] = [self.whole]
        optimizer.register_state_dict_post_hook(lambda _, state: self._split(state))
        optimizer.register_load_state_dict_pre_hook(lambda _, state: self._joined(state))
        if state["state"]:
            optimizer.load_state_dict(state)

    def take(self) -> None:
        """Moves the parts' gradients to the whole. A part without one is left as it is by a step: then all are parts again."""
        if not self.is_whole:
            return
        gradients = [part.grad.flatten() for part in self.parts if part.grad is not None]
        if len(gradients) < len(self.parts):
            self.leave()
        else:
            self.add(torch.cat(gradients))
            for part in self.parts:
                part.grad = None

    def add(self, gradient: torch.Tensor) -> None:
        """Adds to the whole's gradient."""
        if self.whole.grad is None:
            self.whole.grad = gradient
        else:
            self.whole.grad.add_(gradient)

    def clip(self, largest: float) -> torch.Tensor:
        """Clips the gradient to a norm, and returns the norm that it had, which is added up as that of single parameters is."""
        assert self.whole.grad is not None
        norm = get_total_norm(torch.split(self.whole.grad, self._sizes))
        clip_grads_with_norm_([self.whole], largest, norm)
        return norm

    def leave(self) -> None:
        """From now on the parts are trained one by one."""
        if not self.is_whole:
            return
        state = self._optimizer.state_dict()
        self.is_whole = False
        for group in self._optimizer.param_groups:
            group["params"] = self.parts if group["params"] else []
        self._optimizer.load_state_dict(state)
        if self.whole.grad is not None:
            for part, gradient in zip(self.parts, self._pieces(self.whole.grad), strict=True):
                part.grad = gradient if part.grad is None else part.grad + gradient
        self.whole.grad = None

    def _pieces(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [one.view(part.shape) for one, part in zip(torch.split(tensor, self._sizes), self.parts, strict=True)]

    def _split(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of the parts, from the whole's."""
        if not self.is_whole:
            return state
        numbers = range(len(self.parts))
        groups = [group | {"params": [*numbers] if group["params"] else []} for group in state["param_groups"]]
        parts: dict[int, dict[str, Any]] = {number: {} for number in numbers} if state["state"] else {}
        for name, value in (state["state"][0] if parts else {}).items():
            whole = isinstance(value, torch.Tensor) and value.shape == self.whole.shape
            pieces = self._pieces(value) if whole else [value for _ in numbers]
            for number, piece in enumerate(pieces):
                parts[number][name] = piece.clone() if isinstance(piece, torch.Tensor) else piece
        return state | {"state": parts, "param_groups": groups}

    def _joined(self, state: dict[str, Any]) -> dict[str, Any]:
        """The whole's state, from that of the parts. Where they had not as many steps, they are trained one by one."""
        states = [state["state"][number] for number in sorted(state["state"])]
        if self.is_whole and states and not self._alike(states):
            self.leave()
        if not self.is_whole:
            return state
        groups = [group | {"params": [0] if group["params"] else []} for group in state["param_groups"]]
        whole = dict(states[0]) if states else {}
        for name, value in whole.items():
            if isinstance(value, torch.Tensor) and value.shape == self.parts[0].shape:
                whole[name] = torch.cat([one[name].flatten() for one in states])
        return state | {"state": {0: whole} if states else {}, "param_groups": groups}

    def _alike(self, states: Sequence[dict[str, Any]]) -> bool:
        kinds = [{name: value for name, value in one.items() if name == "step" or value is None} for one in states]
        return len(states) == len(self.parts) and all(one == kinds[0] for one in kinds)
