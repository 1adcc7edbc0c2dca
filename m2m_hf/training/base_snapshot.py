"""The base model before a training, so that it can be given back as it was."""

import copy
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from m2m_hf.merging.full_experts import floats, save_delta
from m2m_hf.modeling.devices import is_sharded
from m2m_hf.training.trainers import CompletionTrainer, LabelTrainer, Settings


class BaseSnapshot:
    """What a base model was before a training, to tell what was trained, and to give it back as it was.

    Args:
        base: before a Trainer has seen it.
        settings: of the training.
    """

    def __init__(self, base: PreTrainedModel, settings: Settings) -> None:
        self._base, self._settings = base, settings
        self._attributes = set(vars(base))
        # By the names that they have while nothing is put around layers; and not the statistics of what a model saw.
        self._learned = {name for name, _ in base.named_parameters()}
        # The Trainer writes the tokenizer's special tokens into both, by which some models find a text's end.
        self._configs = [
            (one, copy.deepcopy(vars(one))) for one in (base.config, getattr(base, "generation_config", None)) if one
        ]
        self._hooks = set(input_hooks(base))
        here = PartialState().is_main_process or not is_sharded()  # or the weights are elsewhere
        # Of an adapter's base only what training changes beside parameters: running statistics of normalisation.
        self._before = {
            name: tensor.detach().cpu().clone()
            for name, tensor in (floats(base).items() if here else ())
            if settings.lora is None or not isinstance(tensor, torch.nn.Parameter)
        }
        self._counts = {  # such as of the batches that running statistics have seen
            name: tensor.detach().clone() for name, tensor in base.named_buffers() if not tensor.is_floating_point()
        }

    def trained(self, trainer: "CompletionTrainer | LabelTrainer") -> tuple[dict[str, torch.Tensor], bool]:
        """(the weights that were trained, whether they changed anything); all processes must ask.

        Where the weights are in pieces all must help to put them together, and the main one gets them.
        """
        whole = (
            trainer.accelerator.get_state_dict(trainer.model_wrapped) if is_sharded() else trainer.model.state_dict()
        )
        if self._settings.lora is not None:
            weights = {name: tensor for name, tensor in whole.items() if "lora_" in name}
            rise = [tensor for name, tensor in weights.items() if "lora_B" in name or "lora_embedding_B" in name]
            return weights, any(tensor.any() for tensor in rise)
        weights = {name: whole[name] for name in self._before if name in whole}
        moved = (not torch.equal(weights[name].cpu(), self._before[name]) for name in self._learned & set(weights))
        return weights, any(moved)

    def save(self, model: Any, weights: Mapping[str, torch.Tensor], folder: Path) -> dict[str, Any]:
        """Writes the expert; on the main process."""
        if self._settings.lora is None:
            dtype = getattr(torch, self._settings.delta_dtype)
            return {"kept": save_delta(folder, self._before, weights, dtype) | {"dtype": self._settings.delta_dtype}}
        shape = model.peft_config["default"]
        for item in fields(shape):
            value = getattr(shape, item.name)
            if isinstance(value, set):  # or their order would change from run to run
                setattr(shape, item.name, sorted(value))
        model.save_pretrained(folder, state_dict=dict(weights), save_embedding_layers=False)
        return {}

    def restore(self, model: Any) -> None:
        """Gives the base back, to be trained or scored as if it were freshly loaded.

        With activation checkpointing TRL and the Trainer each put a hook on the input embeddings and remember the last one
        only, so that transformers' own way to take them off would leave one behind.

        Args:
            model: what was trained: the base, or the PEFT model around it.
        """
        base = self._base
        if isinstance(model, PeftModel):
            model.unload()
        for name, layer in list(base.named_modules()):  # where no trainer came to be around them
            if isinstance(layer, LoraLayer):
                base.set_submodule(name, layer.get_base_layer())
        if base.is_activation_checkpointing:
            base.activation_checkpointing_disable()
        hooks = input_hooks(base)
        for hook in set(hooks) - self._hooks:
            del hooks[hook]
        for name in set(vars(base)) - self._attributes:
            delattr(base, name)
        for config, known in self._configs:
            vars(config).clear()
            vars(config).update(known)
        base.requires_grad_(False)
        with torch.no_grad():
            for name, tensor in floats(base).items():
                if name in self._before:
                    tensor.copy_(self._before[name])
            for name, tensor in base.named_buffers():
                if name in self._counts:
                    tensor.copy_(self._counts[name])
        base.eval()


def input_hooks(model: PreTrainedModel) -> dict[int, Any]:
    """The forward hooks on a model's input embeddings; none where it has no such layer."""
    try:
        hooks: dict[int, Any] = model.get_input_embeddings()._forward_hooks
    except (NotImplementedError, AttributeError):
        return {}
    return hooks
