"""Checks of a model that need no weights."""

import copy
import math
import re
from typing import cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from trl import ModelConfig, SFTConfig

from m2m_hf.errors import InputError, first_line
from m2m_hf.modeling.heads import HeadPlan
from m2m_hf.modeling.loading import load_config, model_class, unsharded


def check_model(
    model_args: ModelConfig,
    args: SFTConfig,
    config: LoraConfig | None,
    plan: HeadPlan | None = None,
    parameters: str | None = None,
) -> int:
    """Checks what needs no weights: the model's configuration, its attention, the layers to be trained.

    Without a LoRA shape in `config`, all parameters are trained, or those that the pattern `parameters` names.

    Returns:
        The number of positions that the model has (a million where it does not say).
    """
    model = meta_model(model_args, args, plan)
    if config is None and not any(is_trained(name, plan, parameters) for name, _ in model.named_parameters()):
        names = ", ".join([name for name, _ in model.named_parameters()][:3])
        raise InputError(f"trained_parameters: {parameters!r} names none of the model's, such as {names}")
    if config is not None:
        adapt(model, config, model_args)
    if plan is not None and plan.prefix and not hasattr(model, plan.prefix):
        raise InputError(
            f"model_name_or_path: cannot tell the classifier of a {plan.model_class} from the layers below it; expected a model "
            f"with a part {plan.prefix!r}"
        )
    return positions(model)


def adapted_layers(
    model_args: ModelConfig, args: SFTConfig, config: LoraConfig, plan: HeadPlan | None
) -> dict[str, tuple[int, int]]:
    """The layers of the base that a LoRA shape adapts -> (in, out) features of each."""
    model = meta_model(model_args, args, plan)
    adapt(model, config, model_args)
    return {
        name: (layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def adapt(model: PreTrainedModel, config: LoraConfig, model_args: ModelConfig) -> None:
    """Puts an adapter of this shape on a model without weights; refuses one that does not fit, or cannot be averaged."""
    shape = copy.deepcopy(config)
    shape.lora_dropout = 0.0  # PEFT's refusal of it would hide that parameters are adapted
    failure = None
    try:
        get_peft_model(model, shape)
    except Exception as error:  # PEFT raises many kinds
        failure = error
    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    routers = [name for name, layer in adapted.items() if "Router" in type(layer.get_base_layer()).__name__]
    if parts := sorted(shape.target_parameters or routers):
        what = "routed experts or routers held as one parameter" if shape.target_parameters else "routers"
        raise InputError(
            f"lora_target_modules {model_args.lora_target_modules!r} would adapt {what} ({', '.join(parts)}), which cannot be "
            "averaged; leave it out for all other linear layers, or name layers, such as q_proj and v_proj"
        )
    if failure is not None:
        raise InputError(
            f"lora_target_modules {model_args.lora_target_modules!r}, lora_r {model_args.lora_r!r} do not fit this model: "
            f"{failure}. Leave lora_target_modules out, or give the names of at least two kinds of layers, one regular "
            "expression such as '.*q_proj', or all-linear"
        ) from failure
    named = config.target_modules if isinstance(config.target_modules, set) else ()
    if unknown := [one for one in sorted(named) if not any(f".{name}".endswith(f".{one}") for name in adapted)]:
        raise InputError(
            f"lora_target_modules: {', '.join(unknown)} names no layer of this model that gets an adapter; correct it, or "
            "leave it out"
        )
    folded = [name for name, factor in model.named_parameters() if ".lora_A." in name and factor.dim() != 2]
    if folded:
        raise InputError(
            f"lora_target_modules: {folded[0].split('.lora_A')[0]} and others are convolutions, whose adapters cannot be "
            "averaged; name linear layers, or use expert: full"
        )


def meta_model(model_args: ModelConfig, args: SFTConfig, plan: HeadPlan | None) -> PreTrainedModel:
    """The base model without weights."""
    model_config = load_config(model_args)
    if plan is None:
        refuse_unless_generative(model_args, model_config)
    try:
        kind = model_class(plan, model_config)
        if plan is not None and plan.two_towers:
            model_config = model_config.vision_config
        with torch.device("meta"), unsharded(args):
            make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
            return cast(PreTrainedModel, make(model_config, attn_implementation=model_args.attn_implementation))
    except Exception as error:
        what = "causal LM" if plan is None else "model for this task"
        raise InputError(
            f"model_name_or_path: {model_args.model_name_or_path!r} cannot be used as a {what} ({first_line(error)})"
        ) from error


def refuse_unless_generative(model_args: ModelConfig, config: PreTrainedConfig) -> None:
    """Refuses a base that predicts no next token, such as an encoder or a classifier: TRL loads the class that its files name."""
    known = {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
    }
    architecture = (config.architectures or ["model whose config.json names no architectures"])[0]
    # GPT-NeoX too says that it is no decoder; an encoder that does not sees the tokens that it is to predict.
    sees_all = getattr(config, "is_decoder", True) is False and config.model_type in (
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    if architecture in known and not sees_all:
        return
    images = config.model_type in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    raise InputError(
        f"model_name_or_path: {model_args.model_name_or_path!r} is a {architecture}, which predicts no next token; give a causal "
        f"LM, or classify with it: task: {'image' if images else 'sequence'}_classification"
    )


def positions(model: PreTrainedModel) -> int:
    """How many tokens a model has positions for; a million where it does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit < 1:  # XLNet says -1
        return 1_000_000
    for name, layer in model.named_modules():
        if name.endswith("position_embeddings") and getattr(layer, "padding_idx", None) is not None:
            return int(limit) - int(layer.padding_idx) - 1  # as RoBERTa counts
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":  # whose limit is where its frequencies begin to change
        return int(limit * rope.get("factor", 1.0))
    return int(limit)


def embedded_tokens(model: PreTrainedModel) -> float:
    """How many tokens a model has embeddings for; infinite where it does not embed tokens."""
    try:
        layer = model.get_input_embeddings()
    except NotImplementedError:
        return math.inf
    return layer.num_embeddings if isinstance(layer, torch.nn.Embedding) else math.inf


def is_trained(name: str, plan: HeadPlan | None, parameters: str | None) -> bool:
    """True if a full expert may change the parameter of this name: the pattern allows it, and it is not the head's."""
    if plan is not None and plan.untrained is not None and re.fullmatch(plan.untrained, name):
        return False
    return parameters is None or re.search(parameters, name) is not None
