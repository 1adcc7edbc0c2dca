"""Models and tokenizers, loaded as TRL and transformers load them, and checked before any weights are there."""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import patch_environment
from bitsandbytes.nn import Linear4bit
from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionResolutionError
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config
from trl.trainer.utils import create_model_from_path

from m2m_hf.errors import InputError
from m2m_hf.merging.gated_stack import refuse_unless_averageable
from m2m_hf.modeling.heads import Head, HeadPlan, head_of_names, plan_head
from m2m_hf.storage.journal import file_fingerprint
from m2m_hf.training.fine_tune import is_trained, sharded

PATCHES = 256  # of an image, where the model does not cut it into any: for how many are scored at once


def load_config(model_args: ModelConfig) -> Any:
    """The base model's configuration.

    Raises:
        InputError: no such model.
    """
    try:
        return transformers.AutoConfig.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise not_found(model_args, error) from error


def image_mode(config: Any) -> str:
    """What images are converted to before a model sees them: `L` where it takes one channel, else `RGB`."""
    return "L" if getattr(getattr(config, "vision_config", config), "num_channels", 3) == 1 else "RGB"


def lora_config(model_args: ModelConfig, plan: HeadPlan | None = None) -> LoraConfig:
    """The LoRA shape that `model_args` describe, as TRL builds it; with a head, of what is below it.

    Raises:
        InputError: one that cannot be averaged (DoRA, modules_to_save, ...).
    """
    model_args = copy.copy(model_args)
    model_args.use_peft = True
    try:
        config = get_peft_config(model_args)
    except Exception as error:  # whatever PEFT makes of what it is given
        raise InputError(f"lora: {str(error) or type(error).__name__}") from error
    if plan is not None:
        config.task_type = None  # PEFT would train a classifier's head beside the adapter
        config.exclude_modules = plan.untrained
    refuse_unless_averageable(config, "configuration")
    return config


def model_config(model: str, lora: LoraConfig, loading: Mapping[str, Any]) -> ModelConfig:
    """TRL's `ModelConfig` of a base model and a LoRA shape, as `lora_config` takes it.

    Args:
        loading: what `from_pretrained` is given: `dtype`, `revision`, `attn_implementation`.

    Raises:
        InputError: a shape, or a way of loading, that it cannot say.
    """
    names = {
        "dtype": "dtype",
        "torch_dtype": "dtype",
        "revision": "model_revision",
        "attn_implementation": "attn_implementation",
    }
    if others := loading.keys() - names:
        raise InputError(f"model_init_kwargs: expected {', '.join(names)} alone, got {', '.join(sorted(others))}")
    modules = sorted(lora.target_modules) if isinstance(lora.target_modules, set) else lora.target_modules
    if isinstance(modules, list) and len(modules) == 1:
        modules *= 2  # of a list of one ModelConfig would make a text, which PEFT takes for a regular expression
    options: dict[str, Any] = {"dtype": "float32"}
    options |= {names[name]: str(value).removeprefix("torch.") for name, value in loading.items()}
    made = ModelConfig(
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
    given, said = lora_facts(lora), lora_facts(lora_config(made))
    for name, value in given.items():
        if name != "lora_config.task_type" and value != said[name]:
            raise InputError(
                f"peft_config: {name.removeprefix('lora_config.')}={value!r} cannot be said in a run's configuration, which has "
                "lora_r, lora_alpha, lora_dropout, lora_target_modules and use_rslora; leave it out"
            )
    return made


def pin_revision(model_args: ModelConfig) -> ModelConfig:
    """`model_args` with the revision of a Hub model replaced by its commit, so that everything is loaded from the same one.

    Raises:
        InputError: no such model or revision.
    """
    if Path(model_args.model_name_or_path).is_dir():
        return model_args
    model_args = copy.copy(model_args)
    try:
        revision = HfApi().resolve_revision(model_args.model_name_or_path, revision=model_args.model_revision)
    except (OSError, ValueError, RevisionResolutionError) as error:
        raise not_found(model_args, error) from error
    model_args.model_revision = revision.resolved
    return model_args


def not_found(model_args: ModelConfig, error: Exception) -> InputError:
    """What to say where the model cannot be found or read."""
    return InputError(
        f"model_name_or_path: {model_args.model_name_or_path!r} is neither a local model folder nor a model that the Hub "
        f"shows ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
    )


def load_tokenizer(model_args: ModelConfig, args: SFTConfig, generates: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer that TRL would load for this model, with the special tokens and the chat template that it would set.

    Args:
        generates: whether the model does; that of a classifier needs no end-of-text token. It pads on the right, whatever it
            was saved with: there positions begin with the text, so that its score is the same in every batch.

    Raises:
        InputError: no such model or tokenizer, or a token that it does not have.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise not_found(model_args, error) from error
    if not generates:
        tokenizer.pad_token = args.pad_token or tokenizer.pad_token
        if tokenizer.pad_token not in tokenizer.get_vocab():
            raise InputError(
                f"pad_token: {tokenizer.pad_token!r} is not a token of this model, and texts are padded to one length; give one"
            )
        tokenizer.padding_side = "right"
        return tokenizer
    tokenizer.eos_token = args.eos_token or tokenizer.eos_token
    tokenizer.pad_token = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    for name in ("eos_token", "pad_token"):
        if getattr(tokenizer, name) not in tokenizer.get_vocab():
            raise InputError(f"{name}: {getattr(tokenizer, name)!r} is not a token of this model; give one that is")
    if args.chat_template_path is not None:
        if not Path(args.chat_template_path).is_file():
            raise InputError(f"chat_template_path: expected a Jinja file, got {args.chat_template_path!r}")
        tokenizer.chat_template = Path(args.chat_template_path).read_text(encoding="utf-8")
    return tokenizer


@contextmanager
def unsharded(args: SFTConfig) -> Iterator[None]:
    """While active, models are loaded with all their weights on every process, also where training will cut them into pieces."""
    plugin = args.deepspeed_plugin
    with patch_environment(fsdp_cpu_ram_efficient_loading="false"):
        if plugin is not None:
            unset_hf_deepspeed_config()
        try:
            yield
        finally:
            if plugin is not None:
                set_hf_deepspeed_config(plugin.dschf)


def make_plan(model_args: ModelConfig, task: str) -> HeadPlan | None:
    """Where the head of a classification run comes from; None for a causal LM.

    Raises:
        InputError: see `heads.plan_head`.
    """
    if task == "causal_lm":
        return None
    try:
        return plan_head(model_args.model_name_or_path, model_args.model_revision, task)
    except (OSError, ValueError, KeyError) as error:
        raise not_found(model_args, error) from error


def load_image_processor(model_args: ModelConfig) -> Any:
    """What makes a model's input of images, as it stands beside the weights.

    Raises:
        InputError: there is none.
    """
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"model_name_or_path: {model_args.model_name_or_path!r} does not say how images are prepared for it; expected a "
            f"preprocessor_config.json beside its weights ({str(error).splitlines()[0][:200]})"
        ) from error


def patches(config: Any) -> int:
    """Into how many tokens a model cuts an image; `PATCHES` where it does not say."""
    config = getattr(config, "vision_config", config)
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    return (size // patch) ** 2 + 1 if isinstance(size, int) and isinstance(patch, int) else PATCHES


def check_model(
    model_args: ModelConfig,
    args: SFTConfig,
    config: LoraConfig | None,
    plan: HeadPlan | None = None,
    parameters: str | None = None,
) -> int:
    """Tries everything about the model that needs no weights: its configuration, its attention, what is trained of its layers.

    Args:
        config: the LoRA shape; None where all parameters are trained, or those that the pattern `parameters` names.
        plan: of the head; None for a causal LM.

    Returns:
        The number of positions that the model has (a million where it does not say).

    Raises:
        InputError: whatever of it cannot work.
    """
    model = meta_model(model_args, args, plan)
    if config is None and not any(is_trained(name, plan, parameters) for name, _ in model.named_parameters()):
        names = ", ".join([name for name, _ in model.named_parameters()][:3])
        raise InputError(f"trained_parameters: {parameters!r} names none of the model's, such as {names}")
    if config is not None:
        adapt(model, config, model_args)
    if plan is not None and plan.prefix and not hasattr(model, plan.prefix):
        raise InputError(
            f"model_name_or_path: what of {plan.model_class} is its classifier, and what is below it, cannot be told; expected a "
            f"model with a part {plan.prefix!r}"
        )
    return positions(model)


def adapted_layers(
    model_args: ModelConfig, args: SFTConfig, config: LoraConfig, plan: HeadPlan | None
) -> dict[str, tuple[int, int]]:
    """The layers of the base that a LoRA shape adapts -> (in, out) features of each.

    Raises:
        InputError: see `check_model`.
    """
    model = meta_model(model_args, args, plan)
    adapt(model, config, model_args)
    return {
        name: (layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def adapt(model: PreTrainedModel, config: LoraConfig, model_args: ModelConfig) -> None:
    """Puts an adapter of this shape on a model without weights.

    Raises:
        InputError: one that does not fit, or that is on layers whose adapters cannot be averaged.
    """
    try:
        get_peft_model(model, copy.deepcopy(config))
    except Exception as error:
        raise InputError(
            f"lora_target_modules {model_args.lora_target_modules!r}, lora_r {model_args.lora_r!r} do not fit this model: "
            f"{error}. Give the names of at least two kinds of layers, one regular expression such as '.*q_proj', or all-linear"
        ) from error
    folded = [name for name, one in model.named_parameters() if ".lora_A." in name and one.dim() != 2]
    if folded:
        raise InputError(
            f"lora_target_modules: {folded[0].split('.lora_A')[0]} and others are convolutions, whose adapters are no pairs of "
            "matrices to be averaged; name linear layers, or use expert: full"
        )


def meta_model(model_args: ModelConfig, args: SFTConfig, plan: HeadPlan | None) -> PreTrainedModel:
    """The base model without weights.

    Raises:
        InputError: no such model, or none for this task.
    """
    model_config = load_config(model_args)
    try:
        kind = model_class(plan)
        if plan is not None and plan.two_towers:
            model_config = model_config.vision_config
        with torch.device("meta"), unsharded(args):
            make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
            model: PreTrainedModel = make(model_config, attn_implementation=model_args.attn_implementation)
            return model
    except Exception as error:
        what = "causal LM" if plan is None else "model for this task"
        raise InputError(
            f"model_name_or_path: {model_args.model_name_or_path!r} is no {what} to be used ({error})"
        ) from error


def positions(model: PreTrainedModel) -> int:
    """How many tokens a model has positions for; a million where it does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if found is None or found < 1:  # XLNet says -1
        return 1_000_000
    for name, layer in model.named_modules():
        if name.endswith("position_embeddings") and getattr(layer, "padding_idx", None) is not None:
            return int(found) - int(layer.padding_idx) - 1  # as RoBERTa counts
    return int(found)


def model_class(plan: HeadPlan | None) -> Any:
    """The class of transformers that loads the base model."""
    return transformers.AutoModelForCausalLM if plan is None else getattr(transformers, plan.model_class)


def load_base(
    model_args: ModelConfig, args: SFTConfig, to_train: bool = False, plan: HeadPlan | None = None
) -> PreTrainedModel:
    """The base model, loaded as `trl sft` loads it, in evaluation mode on the device that training uses; safetensors only.

    With `load_in_4bit` or `load_in_8bit` bitsandbytes quantises it while it is loaded.

    Args:
        to_train: under FSDP or DeepSpeed, as their training wants it, which moves and cuts it itself; it can then not be scored.
        plan: of the head; None for a causal LM.

    Raises:
        InputError: no such model.
    """
    state = PartialState()
    kwargs: dict[str, Any] = {}
    if state.num_processes > 1:
        kwargs["device_map"] = None
    if quantization := get_quantization_config(model_args):
        kwargs["quantization_config"] = quantization
        if state.num_processes > 1 and state.device.type != "cpu":
            kwargs["device_map"] = {"": state.local_process_index}
    to_train = to_train and sharded()
    try:
        with nullcontext() if to_train else unsharded(args):
            model, told = create_model_from_path(
                model_args.model_name_or_path,
                None if plan is None else model_class(plan),
                revision=model_args.model_revision,
                attn_implementation=model_args.attn_implementation,
                dtype=model_args.dtype,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **kwargs,
            )
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise InputError(f"model_name_or_path: {model_args.model_name_or_path!r} cannot be loaded ({error})") from error
    kept = plan.untrained if plan is not None and plan.own is None else None  # such as a pooler, which nothing reads
    if missing := sorted(name for name in told["missing_keys"] if kept is None or not re.fullmatch(kept, name)):
        raise InputError(
            f"model_name_or_path: {model_args.model_name_or_path!r} has no weights for {', '.join(missing[:3])}"
            f"{' and others' * (len(missing) > 3)} of {type(model).__name__}, which would be random numbers"
        )
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            # On processors with AVX512-BF16 bitsandbytes 0.50 repacks the weights in place when it first infers with them. It
            # rounds their scales, and from then on no gradient passes through the layer, without a word.
            layer.support_avx512bf16_for_cpu = False
    placed = to_train or quantization or hasattr(model, "hf_device_map")
    return model if placed else model.to(args.device)


def load_head(
    plan: HeadPlan,
    words: Mapping[str, str],
    closed: bool,
    template: str,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    model_args: ModelConfig,
    args: SFTConfig,
) -> Head:
    """The frozen head of a classification run that is made of labels' names.

    Args:
        words: label -> words.
        closed, template: see `heads.head_of_names`.
        base: the base model, whose own embedding of them it is; where that is a tower beside it, both are loaded for a moment.
    """
    if plan.two_towers:
        base = load_base(model_args, args, plan=replace(plan, model_class="AutoModel"))
    return head_of_names(plan, words, template, base, tokenizer, closed=closed)


def base_fingerprint(model_args: ModelConfig) -> str:
    """Recognises the base weights: the bytes of a local folder's safetensors, or the commit of a Hub model.

    Raises:
        InputError: a local folder without safetensors.
    """
    folder = Path(model_args.model_name_or_path)
    if not folder.is_dir():
        return str(model_args.model_revision)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").exists():
        raise InputError(f"{folder}: expected config.json and *.safetensors in it; other weight files are not loaded")
    return file_fingerprint([folder / "config.json", *weights])


def quantization_facts(model_args: ModelConfig) -> dict[str, Any] | None:
    """How the base is quantised, as plain values; None where it is not."""
    config = get_quantization_config(model_args)
    return None if config is None else {**config.to_diff_dict(), "version.bitsandbytes": version("bitsandbytes")}


def lora_facts(config: LoraConfig) -> dict[str, Any]:
    """The shape of an adapter, as JSON gives it back."""
    aside = ("base_model_name_or_path", "inference_mode", "revision", "peft_version", "auto_mapping")
    found = {
        f"lora_config.{name}": sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if name not in aside
    }
    return dict(json.loads(json.dumps(found, default=str)))
