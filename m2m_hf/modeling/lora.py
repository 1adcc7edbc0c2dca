"""The LoRA shape of a run."""

import copy
import json
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from trl import ModelConfig, get_peft_config

from m2m_hf.errors import InputError
from m2m_hf.merging.adapter import refuse_unless_averageable
from m2m_hf.modeling.heads import HeadPlan


def lora_config(model_args: ModelConfig, plan: HeadPlan | None = None) -> LoraConfig:
    """The LoRA shape that `model_args` describe, as TRL builds it; with a head, on the layers below it."""
    model_args = copy.copy(model_args)
    model_args.use_peft = True
    try:
        config = get_peft_config(model_args)
    except Exception as error:  # PEFT raises many kinds
        raise InputError(f"lora: {str(error) or type(error).__name__}") from error
    if plan is None and config.task_type != "CAUSAL_LM":
        raise InputError(f"lora_task_type: expected CAUSAL_LM, got {config.task_type}; to classify, give task: instead")
    if plan is not None:
        config.task_type = None  # PEFT would train a classifier's head beside the adapter
        config.exclude_modules = plan.untrained
    refuse_unless_averageable(config, "configuration")
    return config


def model_config(model: str, lora: LoraConfig, loading: Mapping[str, Any]) -> ModelConfig:
    """TRL's `ModelConfig` of a base model and a LoRA shape, as `lora_config` takes it; refuses what that cannot express.

    `loading` are arguments of `from_pretrained`.
    """
    names = {name: name for name in ("dtype", "attn_implementation")}
    names |= {"torch_dtype": "dtype", "revision": "model_revision"}
    if others := loading.keys() - names:
        raise InputError(f"model_init_kwargs: expected only {', '.join(names)}, got {', '.join(sorted(others))}")
    modules = sorted(lora.target_modules) if isinstance(lora.target_modules, set) else lora.target_modules
    if isinstance(modules, list) and len(modules) == 1:
        modules *= 2  # ModelConfig makes a list of one a text, which PEFT takes for a regular expression
    options: dict[str, Any] = {"dtype": "float32"}
    options |= {names[name]: str(value).removeprefix("torch.") for name, value in loading.items()}
    model_args = ModelConfig(
        model_name_or_path=model,
        use_peft=True,
        lora_r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        lora_target_modules=modules,
        use_rslora=lora.use_rslora,
        **options,
    )
    refuse_unless_averageable(lora, "peft_config")
    expressed = lora_facts(lora_config(model_args))
    for name, value in lora_facts(lora).items():
        if name != "lora_config.task_type" and value != expressed[name]:
            raise InputError(
                f"peft_config: {name.removeprefix('lora_config.')}={value!r} has no key in a run's configuration, which knows "
                "lora_r, lora_alpha, lora_dropout, lora_target_modules and use_rslora; leave it out"
            )
    return model_args


def lora_facts(config: LoraConfig) -> dict[str, Any]:
    """The shape of an adapter, as JSON gives it back."""
    ignored = ("base_model_name_or_path", "inference_mode", "revision", "peft_version", "auto_mapping")
    facts = {
        f"lora_config.{name}": sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if name not in ignored
    }
    return dict(json.loads(json.dumps(facts, default=str)))
