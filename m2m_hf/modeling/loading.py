"""Base models: their configuration, commit and weights, loaded as TRL loads them."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import patch_environment
from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionResolutionError
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from trl import ModelConfig, SFTConfig, get_quantization_config
from trl.trainer.utils import create_model_from_path

from m2m_hf.errors import InputError, first_line
from m2m_hf.modeling.devices import is_sharded
from m2m_hf.modeling.heads import HeadPlan, plan_head
from m2m_hf.storage.files import digest_of


def load_config(model_args: ModelConfig, auto_class: Any = transformers.AutoConfig) -> Any:
    """The base model's configuration, or what another `auto_class` of transformers loads, such as its tokenizer."""
    try:
        return auto_class.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise not_found(model_args, error) from error


def pin_revision(model_args: ModelConfig) -> ModelConfig:
    """`model_args` with the revision of a Hub model replaced by its commit, so that everything is loaded from the same one."""
    if Path(model_args.model_name_or_path).is_dir():
        return model_args
    try:
        revision = HfApi().resolve_revision(model_args.model_name_or_path, revision=model_args.model_revision)
    except (OSError, ValueError, RevisionResolutionError) as error:
        raise not_found(model_args, error) from error
    pinned = copy.copy(model_args)
    pinned.model_revision = revision.resolved
    return pinned


def not_found(model_args: ModelConfig, error: Exception) -> InputError:
    return InputError(
        f"model_name_or_path: {model_args.model_name_or_path!r} is neither a local model folder nor a model that the Hub "
        f"shows ({first_line(error)})"
    )


@contextmanager
def unsharded(args: SFTConfig) -> Iterator[None]:
    """While active, every process loads all weights of a model, even where training will shard it."""
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
    """Where the head of a classification run comes from; None for a causal LM."""
    if task == "causal_lm":
        return None
    return plan_head(load_config(model_args), model_args.model_name_or_path, model_args.model_revision, task)


def model_class(plan: HeadPlan | None, config: Any = None) -> Any:
    """The class of transformers that loads the base model; of a causal LM that reads images too, one for both."""
    if plan is not None:
        return getattr(transformers, plan.model_class)
    both = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForImageTextToText if both else transformers.AutoModelForCausalLM


def load_base(
    model_args: ModelConfig, args: SFTConfig, to_train: bool = False, plan: HeadPlan | None = None
) -> PreTrainedModel:
    """The base model, loaded as `trl sft` loads it, in evaluation mode on the device that training uses; safetensors only.

    With `load_in_4bit` or `load_in_8bit`, bitsandbytes quantises it while it is loaded. A model `to_train` is left to FSDP or
    DeepSpeed, where they are in use, to be moved and sharded, and cannot be scored then.
    """
    state = PartialState()
    kwargs: dict[str, Any] = {}
    if state.num_processes > 1:
        kwargs["device_map"] = None
    if quantization := get_quantization_config(model_args):
        kwargs["quantization_config"] = quantization
        if state.num_processes > 1 and state.device.type != "cpu":
            kwargs["device_map"] = {"": state.local_process_index}
    to_train = to_train and is_sharded()
    devices = [args.device] if args.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), nullcontext() if to_train else unsharded(args):
            torch.manual_seed(args.seed)
            model, report = create_model_from_path(
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
            model.drawn = Drawn(args.seed, args.device)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise InputError(f"model_name_or_path: {model_args.model_name_or_path!r} cannot be loaded ({error})") from error
    unread = plan.untrained if plan is not None and plan.own is None else None  # such as a pooler
    if missing := sorted(name for name in report["missing_keys"] if unread is None or not re.fullmatch(unread, name)):
        raise InputError(
            f"model_name_or_path: {model_args.model_name_or_path!r} has no weights for {', '.join(missing[:3])}"
            f"{' and others' * (len(missing) > 3)} of {type(model).__name__}, which would be random numbers"
        )
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # On processors with AVX512-BF16, bitsandbytes 0.50 repacks 4-bit weights in place when it first infers with them.
            # That rounds their scales, and silently blocks gradients from then on.
            layer.support_avx512bf16_for_cpu = False
    placed = to_train or quantization or hasattr(model, "hf_device_map")
    return model if placed else model.to(args.device)


class Drawn:
    """Random numbers as they stand once a model was loaded with this seed: some families draw some while they are loaded."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self._device = seed, device
        self._here = torch.get_rng_state()
        self._there = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._here)
        if self._there is not None:
            torch.cuda.set_rng_state(self._there, self._device)


def base_fingerprint(model_args: ModelConfig) -> str:
    """Identifies the base weights: the bytes of a local folder's safetensors, or the commit of a Hub model."""
    folder = Path(model_args.model_name_or_path)
    if not folder.is_dir():
        return str(model_args.model_revision)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").exists():
        raise InputError(f"{folder}: expected config.json and *.safetensors in it; other weight files are not loaded")
    return digest_of(folder / "config.json", *weights)


def quantization_facts(model_args: ModelConfig) -> dict[str, Any] | None:
    """How the base is quantised, as plain values; None where it is not."""
    config = get_quantization_config(model_args)
    return None if config is None else {**config.to_diff_dict(), "version.bitsandbytes": version("bitsandbytes")}
