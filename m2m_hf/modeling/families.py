"""What a family of models asks of the settings, read from the model without weights."""

import copy
import re
from collections.abc import Iterable, Sequence
from functools import cached_property

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, SFTConfig

from m2m_hf.errors import InputError
from m2m_hf.modeling.heads import HeadPlan

PLAIN = (nn.Linear.forward, Conv1D.forward)  # a router may be a linear layer that gives more than one tensor
ROUTER = re.compile(r"(.*\.)?(gate|\w*router|shared_expert_gate)(\..*)?")


class Family:
    """What the base model allows, and what unset fields mean for it.

    Args:
        model: without weights.
        lora: whether the experts are adapters.
    """

    def __init__(self, model: PreTrainedModel, plan: HeadPlan | None, lora: bool) -> None:
        self._model, self._plan, self._lora = model, plan, lora
        self._name = type(model).__name__

    def settle(self, args: SFTConfig, model_args: ModelConfig) -> tuple[SFTConfig, ModelConfig, list[str]]:
        """Both configurations as this family can be trained with them, and what is said about it."""
        args, model_args, said = copy.copy(args), copy.copy(model_args), []
        if args.activation_checkpointing and not self._model.supports_gradient_checkpointing:
            args.activation_checkpointing = args.gradient_checkpointing = False
            said.append(
                f"activation_checkpointing: {self._name} does not support it, so training keeps all activations. This takes more "
                "memory and changes no result; lower per_device_train_batch_size where memory does not suffice"
            )
        if self._plan is None and self._model.base_model is self._model:
            raise InputError(
                f"model_name_or_path: TRL cannot train a {self._name}, as it does not find the layers below the output head; "
                "expected a model of another class"
            )
        if self._plan is None and self._lacks_router_loss(args.router_aux_loss_coef):
            if args.router_aux_loss_coef:
                raise InputError(
                    f"router_aux_loss_coef: TRL cannot compute the routers' auxiliary loss of a {self._name}, whose "
                    f"configuration has no num_experts; expected 0, got {args.router_aux_loss_coef:g}"
                )
            args.router_aux_loss_coef = 0.0
            said.append(
                f"router_aux_loss_coef: 0, as TRL cannot compute the routers' auxiliary loss of a {self._name}, whose "
                "configuration has no num_experts"
            )
        if self._lora and model_args.lora_target_modules is None and self._layers:
            names = self._layers * (2 if len(self._layers) == 1 else 1)  # see `model_config`
            pattern = rf"{re.escape(self._tower)}.*\.({'|'.join(map(re.escape, self._layers))})"
            model_args.lora_target_modules = pattern if self._tower else names
            said += self._said_of_layers
        return args, model_args, said

    def _lacks_router_loss(self, coefficient: float | None) -> bool:
        """True if TRL would add the routers' auxiliary loss, and fail at it."""
        config = self._model.config.get_text_config()
        wanted = getattr(config, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
        counted = hasattr(config, "num_experts") and hasattr(config, "num_experts_per_tok")
        return bool(wanted) and hasattr(config, "output_router_logits") and not counted

    @cached_property
    def _layers(self) -> list[str]:
        """The names that unset `lora_target_modules` stand for; empty where PEFT has a default of its own."""
        if not self._tower and self._takes(None):
            return []
        taken = [name for name in self._linear if self._takes([name])]
        if not taken:
            raise InputError(
                f"lora_target_modules: unset, and PEFT can adapt no linear layer of a {self._name}; name layers, or use "
                "expert: full"
            )
        return taken

    @property
    def _said_of_layers(self) -> list[str]:
        said = [f"lora_target_modules: unset, which for a {self._name} means {', '.join(self._layers)}"]
        kinds = {
            type(module).__name__
            for module in self._model.modules()
            if "expert" in type(module).__name__.lower() and any(one.dim() == 3 for one in module.parameters(False))
        }
        if kinds:
            said.append(
                f"the routed experts ({', '.join(sorted(kinds))}) are held as one parameter, and adapters on that cannot be "
                "averaged: they stay as they are in the base model"
            )
        if left := [name for name in self._linear if name not in self._layers]:
            said.append(f"no adapters are on {', '.join(left)}, which PEFT refuses or takes for experts in this family")
        return said

    def _takes(self, layers: Sequence[str] | None) -> bool:
        """True if PEFT can adapt these layers, and not parameters in their place."""
        untrained = None if self._plan is None else self._plan.untrained
        shape = LoraConfig(r=1, target_modules=layers and list(layers), exclude_modules=untrained)
        try:
            adapted = get_peft_model(copy.deepcopy(self._model), shape)
        except Exception:  # PEFT raises many kinds
            return False
        return not adapted.peft_config["default"].target_parameters

    @cached_property
    def _linear(self) -> list[str]:
        """The shortest names of all linear layers of the text or image tower, without output head and routers."""
        untrained = None if self._plan is None else self._plan.untrained
        head, tower = self._model.get_output_embeddings(), self._tower
        wanted: list[str] = []
        others: list[str] = []
        for name, module in self._model.named_modules():
            if not name.startswith(tower) or (untrained is not None and re.fullmatch(untrained, name)):
                continue
            # The kernels of Mamba-like blocks read the weight of the last projection and pass its adapter by.
            bypassed = name.endswith("out_proj") and f"{name.removesuffix('out_proj')}conv1d" in self._names
            plain = isinstance(module, (nn.Linear, Conv1D)) and type(module).forward in PLAIN and module is not head
            fits = plain and not ROUTER.fullmatch(name) and not bypassed
            (wanted if fits else others).append(name)
        taken = {ending for name in others for ending in endings(name)}
        return sorted({next((one for one in endings(name) if one not in taken), name) for name in wanted})

    @cached_property
    def _names(self) -> set[str]:
        return {name for name, _ in self._model.named_modules()}

    @cached_property
    def _tower(self) -> str:
        """How the names of the text tower's layers begin, where the model reads more than texts."""
        config, images = self._model.config, self._plan is not None and self._plan.task == "image_classification"
        if images or config.get_text_config() is config:
            return ""
        text = self._model.get_decoder()
        return next((f"{name}." for name, module in self._model.named_modules() if module is text and name), "")


def endings(name: str) -> Iterable[str]:
    """The names that mean this module to PEFT, the shortest first."""
    parts = name.split(".")
    return (".".join(parts[place:]) for place in range(len(parts) - 1, -1, -1))
