"""The two kinds of experts, LoRA adapters and full fine-tunes: how each is trained, recognised, saved and loaded.

Both have the same members, so that other code need not ask which kind it has.
"""

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from transformers import PreTrainedModel
from trl import ModelConfig, SFTConfig

from m2m_hf.errors import InputError
from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.dense_stack import DenseStack
from m2m_hf.merging.expert import Expert
from m2m_hf.merging.full_experts import DELTA_FILE, FullExpert, save_delta
from m2m_hf.merging.methods import AVERAGE
from m2m_hf.modeling.heads import HeadPlan
from m2m_hf.modeling.inspection import is_trained
from m2m_hf.modeling.lora import lora_config, lora_facts
from m2m_hf.storage.records import find_modified, weights_of

Tensors = Mapping[str, torch.Tensor]
Overrides = Mapping[str, Mapping[str, Any]]  # `final:` and the settings of candidates, by name


@dataclass(frozen=True)
class LoraKind:
    """LoRA adapters of one shape, `expert: lora`."""

    name: ClassVar[str] = "lora"
    gated: ClassVar[bool] = True  # averages are computed by a `GatedStack`, which writes no weights and gives gradients
    whole_model: ClassVar[bool] = False  # what is published is an adapter
    parameters: ClassVar[None] = None
    lora: LoraConfig

    @classmethod
    def of(cls, model_args: ModelConfig, plan: HeadPlan | None, parameters: str | None, dtype: str) -> "LoraKind":
        return cls(lora_config(model_args, plan))

    @classmethod
    def check_settings(cls, args: SFTConfig, model_args: ModelConfig, overrides: Overrides) -> None:
        """Refuses settings that this kind cannot be trained with."""

    def facts(self) -> dict[str, Any]:
        """The part of `uniform_facts` that belongs to this kind."""
        return lora_facts(self.lora)

    def prepare(self, base: PreTrainedModel, plan: HeadPlan | None) -> LoraConfig | None:
        """Frees the parameters to train, or returns the shape of the adapter that a Trainer must put on the base."""
        return copy.deepcopy(self.lora)

    def trained_weights(self, state: Tensors, before: Tensors, learned: set[str]) -> tuple[Tensors, bool]:
        """Returns the weights of `state` that were trained, and whether training changed any; see `BaseSnapshot`."""
        weights = {name: tensor for name, tensor in state.items() if "lora_" in name}
        b = [tensor for name, tensor in weights.items() if "lora_B" in name or "lora_embedding_B" in name]
        return weights, any(bool(tensor.any()) for tensor in b)

    def save(self, model: Any, before: Tensors, weights: Tensors, folder: Path) -> dict[str, Any]:
        """Writes the weights that were trained, and returns what `training.json` says of them alone."""
        shape = model.peft_config["default"]
        for item in fields(shape):
            value = getattr(shape, item.name)
            if isinstance(value, set):  # their order would change from run to run
                setattr(shape, item.name, sorted(value))
        model.save_pretrained(folder, state_dict=dict(weights), save_embedding_layers=False)
        return {}

    @classmethod
    def write_final(cls, trained: Path, folder: Path, base: Callable[[], PreTrainedModel], processing: Any) -> None:
        """Writes what `OUT/final` holds of the expert in `trained`: the adapter, or the whole model."""
        shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("*.json.partial", "test.json"))
        (folder / "training.json").unlink()

    @classmethod
    def origin(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """What the `training.json` in `OUT/final` must add to that of the expert it is made from."""
        return {}


@dataclass(frozen=True)
class FullKind:
    """What full fine-tunes changed of the base's weights, `expert: full`.

    Args:
        parameters: a pattern of the names of the parameters that are trained; None for all.
        dtype: that the differences are kept in.
    """

    name: ClassVar[str] = "full"
    gated: ClassVar[bool] = False
    whole_model: ClassVar[bool] = True
    lora: ClassVar[None] = None
    parameters: str | None = None
    dtype: str = "float32"

    @classmethod
    def of(cls, model_args: ModelConfig, plan: HeadPlan | None, parameters: str | None, dtype: str) -> "FullKind":
        return cls(parameters, dtype)

    @classmethod
    def check_settings(cls, args: SFTConfig, model_args: ModelConfig, overrides: Overrides) -> None:
        if model_args.load_in_4bit or model_args.load_in_8bit:
            raise InputError(
                "load_in_4bit, load_in_8bit: only for LoRA adapters of causal LMs; expert: full trains the base's own weights"
            )
        for where, settings in overrides.items():
            if lora := [key for key in settings if key.startswith("lora_") or key == "use_rslora"]:
                raise InputError(f"{where}.{lora[0]}: belongs to expert: lora")
        if args.deepspeed_plugin is not None:
            raise InputError(
                "expert: full cannot be trained under DeepSpeed, which keeps the base's weights to itself; use FSDP"
            )

    def facts(self) -> dict[str, Any]:
        return {"expert": self.name, "trained_parameters": self.parameters, "delta_dtype": self.dtype}

    def prepare(self, base: PreTrainedModel, plan: HeadPlan | None) -> LoraConfig | None:
        base.requires_grad_(False)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(is_trained(name, plan, self.parameters))
        return None

    def trained_weights(self, state: Tensors, before: Tensors, learned: set[str]) -> tuple[Tensors, bool]:
        weights = {name: state[name] for name in before if name in state}
        changed = (not torch.equal(weights[name].cpu(), before[name]) for name in learned & set(weights))
        return weights, any(changed)

    def save(self, model: Any, before: Tensors, weights: Tensors, folder: Path) -> dict[str, Any]:
        return {"kept": save_delta(folder, before, weights, self.dtype)}

    @classmethod
    def write_final(cls, trained: Path, folder: Path, base: Callable[[], PreTrainedModel], processing: Any) -> None:
        stack = DenseStack(base(), {"trained": FullExpert.load(trained)}, AVERAGE)
        try:
            stack.set({"trained": 1.0})
            stack.model.save_pretrained(folder)
        finally:
            stack.detach()
        processing.save_pretrained(folder)

    @classmethod
    def origin(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        return {"delta": weights_of(record)}


ExpertKind = LoraKind | FullKind


def expert_kind(name: str) -> type[ExpertKind]:
    """The class that `expert: lora` or `expert: full` names; its `of` takes the run's settings."""
    return FullKind if name == "full" else LoraKind


def load_trained(folder: Path) -> Expert:
    """Loads the expert in a folder, of either kind.

    Raises:
        InputError: its files were modified.
    """
    if file := find_modified(folder):
        raise InputError(
            f"{folder / file} is not what was trained: it was modified. Restore it, or delete {folder} to train it again"
        )
    return FullExpert.load(folder) if (folder / DELTA_FILE).exists() else Adapter.load(folder)
