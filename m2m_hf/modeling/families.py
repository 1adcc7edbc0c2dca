"""What a family of models asks of the settings, read from the model without weights."""

import copy
from dataclasses import dataclass

from transformers import PreTrainedModel
from trl import ModelConfig, SFTConfig


@dataclass(frozen=True)
class Family:
    """What the base model allows, and what unset fields mean for it."""

    name: str
    checkpoints: bool  # its activations can be recomputed

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Family":
        return cls(type(model).__name__, model.supports_gradient_checkpointing)

    def settle(self, args: SFTConfig, model_args: ModelConfig) -> tuple[SFTConfig, ModelConfig, list[str]]:
        """Both configurations as this family can be trained with them, and what is said about it."""
        args, model_args, said = copy.copy(args), copy.copy(model_args), []
        if args.activation_checkpointing and not self.checkpoints:
            args.activation_checkpointing = args.gradient_checkpointing = False
            said.append(
                f"activation_checkpointing: {self.name} does not support it, so training keeps all activations. This takes more "
                "memory and changes no result; lower per_device_train_batch_size where memory does not suffice"
            )
        return args, model_args, said
