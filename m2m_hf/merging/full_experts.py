"""Full-parameter experts: what fine-tuning changed of every weight, in safetensors.

An expert is the difference δ = θ - θ0 of its fine-tuned weights from the base's (a task vector: Ilharco et al., 2212.04089).
A mixture's model has the weights θ0 + Σ w_i δ_i. Experts stay on the disk and are read one block of rows at a time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from m2m_hf.errors import InputError
from m2m_hf.merging.expert import Change, Expert, Part, blocks

DELTA_FILE = "delta.safetensors"
DTYPES = {"F64", "F32", "F16", "BF16"}  # as safetensors names them


def floats(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every weight that training may change, once, under its first name: parameters, and buffers that a checkpoint holds."""
    saved = set(model.state_dict(keep_vars=True))
    weights: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in saved and tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            weights[name] = tensor
    return weights


def save_delta(
    folder: Path, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], dtype: str
) -> dict[str, Any]:
    """Writes what changed as `delta.safetensors`; weights that did not change are left out.

    The difference is taken in fp32. It is exact for two fp32 numbers within a factor of two of each other (Sterbenz, 1974), and
    nearly always for two bf16 numbers, so that θ0 + δ is the fine-tuned weight again. A weight that changed its sign, or most
    of its size, is right to the last digit that fp32 has of θ0. A smaller `dtype` loses more.

    Returns `kept` of `training.json`: the dtype, the number of parameters, and the share of the delta's norm lost to the dtype.
    Refuses a change that is too large for the dtype, or nothing but changes that are too small for it.
    """
    tensors: dict[str, torch.Tensor] = {}
    total = lost = 0.0
    for name, weight in before.items():
        delta = after[name].detach().to("cpu", torch.float32) - weight.detach().to("cpu", torch.float32)
        cast = delta.to(getattr(torch, dtype)).contiguous()
        if delta.isfinite().all() and not cast.isfinite().all():
            raise InputError(
                f"delta_dtype: {dtype} cannot hold what was learned of {name}; expected float32 or bfloat16"
            )
        total += float(delta.double().square().sum())
        lost += float((cast.double() - delta.double()).square().sum())
        if cast.any():
            tensors[name] = cast
    if not tensors:
        raise InputError(f"delta_dtype: {dtype} keeps nothing of what was learned; expected float32")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / DELTA_FILE, metadata={"format": "pt"})
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return {"dtype": dtype, "parameters": parameters, "lost": round(math.sqrt(lost / total), 9) if total else 0.0}


@dataclass(frozen=True, eq=False)
class FullExpert(Expert):
    """A full-parameter expert on the disk.

    Its weights stand in the file's order: what is read in that order is read in one go.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def load(cls, folder: Path) -> "FullExpert":
        path = folder / DELTA_FILE
        try:
            with safe_open(path, "pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
                dtypes = {file.get_slice(name).get_dtype() for name in shapes}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: expected the weights of a full-parameter expert ({error})") from error
        if dtypes - DTYPES:
            raise InputError(f"{path}: expected floating-point numbers, got {', '.join(sorted(dtypes - DTYPES))}")
        expert = cls(path, shapes)
        for name, shape in shapes.items():
            if not all(expert.delta(name, part).isfinite().all() for part in blocks(shape)):
                raise InputError(f"{path}: not all numbers of {name} are finite")
        return expert

    def delta(self, name: str, part: Part = None) -> torch.Tensor:
        """What is added to the weight `name`, or to rows of it."""
        with safe_open(self.path, "pt") as file:  # anew each time, or all that was read would stay in memory
            tensor: torch.Tensor = file.get_tensor(name) if part is None else file.get_slice(name)[part]
        return tensor

    def changes(self, model: PreTrainedModel) -> dict[str, Change]:
        weights = floats(model)
        for name, shape in self.shapes.items():
            if name not in weights or tuple(weights[name].shape) != shape:
                raise InputError(
                    f"{self.path} changes {name!r} of shape {shape}, which {type(model).__name__} does not have: another base "
                    "model?"
                )
        return {name: FullChange(weights[name], self, name) for name in self.shapes}


@dataclass(frozen=True, eq=False)
class FullChange(Change):
    """What a full-parameter expert adds to one weight."""

    expert: FullExpert
    name: str

    def delta(self, part: Part = None) -> torch.Tensor:
        return self.expert.delta(self.name, part).to(self.weight.device, torch.float32)
