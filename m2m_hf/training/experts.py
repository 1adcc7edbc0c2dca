"""The two kinds of experts, LoRA adapters and full fine-tunes: how each is trained, recognised, saved and loaded."""

import copy
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

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
from m2m_hf.modeling.inspection import check_model, is_trained
from m2m_hf.modeling.lora import lora_config, lora_facts
from m2m_hf.storage.records import experts_noun, weights_of

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ExpertKind(ABC):
    """How the experts of a run are made: `LoraKind` or `FullKind`, with its settings.

    Attributes:
        name: as `expert:` in a configuration says it, `lora` or `full`.
        gated: averages are computed by a `GatedStack`, which writes no weights and gives gradients by the mixture's weights.
        whole_model: published as a whole model, not as an adapter.
        lora: the LoRA shape; None for full experts.
        parameters: a pattern of the names of the parameters that are trained; None for all, and for adapters.
    """

    name: ClassVar[str]
    gated: ClassVar[bool]
    whole_model: ClassVar[bool]
    lora: LoraConfig | None
    parameters: str | None

    @classmethod
    @abstractmethod
    def of(cls, model_args: ModelConfig, plan: HeadPlan | None, parameters: str | None, dtype: str) -> Self:
        """Builds the kind from a run's settings; `trained_parameters` and `delta_dtype` are for full experts alone."""

    @classmethod
    def noun(cls, count: int = 2) -> str:
        """What messages call experts of this kind: adapter, adapters, expert or experts."""
        return experts_noun({"expert": cls.name}, count)

    @classmethod
    def check_settings(
        cls, args: SFTConfig, model_args: ModelConfig, overrides: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Refuses settings that this kind cannot be trained with; `overrides` are `final:` and those of candidates, by name."""
        return

    def check_model(self, model_args: ModelConfig, args: SFTConfig, plan: HeadPlan | None) -> int:
        """See `modeling.inspection.check_model`."""
        return check_model(model_args, args, self.lora, plan, self.parameters)

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """The part of `uniform_facts` that belongs to this kind."""

    @abstractmethod
    def prepare(self, base: PreTrainedModel, plan: HeadPlan | None) -> LoraConfig | None:
        """Frees the parameters to train, or returns the shape of the adapter that a Trainer must put on the base."""

    @abstractmethod
    def may_change(self, tensor: torch.Tensor) -> bool:
        """True if a training may write this weight of the base, so that it must be restored."""

    @abstractmethod
    def trained_weights(
        self, state: Tensors, before: Tensors, learned: set[str]
    ) -> tuple[dict[str, torch.Tensor], bool]:
        """Returns the weights that were trained, and whether training changed any.

        Args:
            state: the state dict of what was trained.
            before: the base's weights that `may_change` names, before the training.
            learned: names of the base's parameters; its other weights are statistics.
        """

    @abstractmethod
    def save(self, model: Any, before: Tensors, weights: Tensors, folder: Path) -> dict[str, Any]:
        """Writes the expert and returns what `training.json` says of it.

        Args:
            model: what was trained.
            before, weights: see `trained_weights`.
        """

    @classmethod
    @abstractmethod
    def write_final(cls, trained: Path, folder: Path, base: Callable[[], PreTrainedModel], processing: Any) -> None:
        """Writes what `OUT/final` holds: an adapter, or the whole model with its tokenizer or image processor.

        Args:
            trained: the folder of the expert that was trained on the chosen mixture.
            base: gives the base model; only called for a whole model.
        """

    @classmethod
    def origin(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """What the `training.json` in `OUT/final` must add to that of the expert it is made from."""
        return {}


@dataclass(frozen=True)
class LoraKind(ExpertKind):
    """LoRA adapters, `expert: lora`."""

    name: ClassVar[str] = "lora"
    gated: ClassVar[bool] = True
    whole_model: ClassVar[bool] = False
    lora: LoraConfig
    parameters: None = None

    @classmethod
    def of(cls, model_args: ModelConfig, plan: HeadPlan | None, parameters: str | None, dtype: str) -> "LoraKind":
        return cls(lora_config(model_args, plan))

    def facts(self) -> dict[str, Any]:
        return lora_facts(self.lora)

    def prepare(self, base: PreTrainedModel, plan: HeadPlan | None) -> LoraConfig | None:
        return copy.deepcopy(self.lora)

    def may_change(self, tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, torch.nn.Parameter)  # running statistics of normalisation

    def trained_weights(
        self, state: Tensors, before: Tensors, learned: set[str]
    ) -> tuple[dict[str, torch.Tensor], bool]:
        weights = {name: tensor for name, tensor in state.items() if "lora_" in name}
        b = [tensor for name, tensor in weights.items() if "lora_B" in name or "lora_embedding_B" in name]
        return weights, any(bool(tensor.any()) for tensor in b)

    def save(self, model: Any, before: Tensors, weights: Tensors, folder: Path) -> dict[str, Any]:
        shape = model.peft_config["default"]
        for item in fields(shape):
            value = getattr(shape, item.name)
            if isinstance(value, set):  # their order would change from run to run
                setattr(shape, item.name, sorted(value))
        model.save_pretrained(folder, state_dict=dict(weights), save_embedding_layers=False)
        return {}

    @classmethod
    def write_final(cls, trained: Path, folder: Path, base: Callable[[], PreTrainedModel], processing: Any) -> None:
        shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("*.json.partial", "test.json"))
        (folder / "training.json").unlink()


@dataclass(frozen=True)
class FullKind(ExpertKind):
    """What full fine-tunes changed of the base's weights, `expert: full`.

    Args:
        dtype: that the differences are kept in.
    """

    name: ClassVar[str] = "full"
    gated: ClassVar[bool] = False
    whole_model: ClassVar[bool] = True
    lora: None = None
    parameters: str | None = None
    dtype: str = "float32"

    @classmethod
    def of(cls, model_args: ModelConfig, plan: HeadPlan | None, parameters: str | None, dtype: str) -> "FullKind":
        return cls(None, parameters, dtype)

    @classmethod
    def check_settings(
        cls, args: SFTConfig, model_args: ModelConfig, overrides: Mapping[str, Mapping[str, Any]]
    ) -> None:
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

    def may_change(self, tensor: torch.Tensor) -> bool:
        return True

    def trained_weights(
        self, state: Tensors, before: Tensors, learned: set[str]
    ) -> tuple[dict[str, torch.Tensor], bool]:
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


KINDS: dict[str, type[ExpertKind]] = {kind.name: kind for kind in (LoraKind, FullKind)}


def expert_kind(name: str) -> type[ExpertKind]:
    """The class that `expert: lora` or `expert: full` names; its `of` takes the run's settings."""
    return KINDS[name]


def load_expert(folder: Path) -> Expert:
    """Loads the expert in a folder, of either kind."""
    return FullExpert.load(folder) if (folder / DELTA_FILE).exists() else Adapter.load(folder)
