"""YAML in, YAML out: one flat file for `MergeToMixConfig`, TRL's `SFTConfig` and its `ModelConfig`.

Where the file and the command line say nothing, four defaults differ from TRL's:

| field | TRL | here | why |
|---|---|---|---|
| `learning_rate` | 2e-5 | 2e-4 with `expert: lora` | adapters need about ten times the rate of a full fine-tune |
| `use_cpu` | false | true without an accelerator | the Trainer then agrees with what is there |
| `dtype` | float32 | with `expert: lora` bfloat16 where that is native | the base is frozen; half the memory, twice the speed |
| `bf16` | true | where the hardware computes in it | processors without it are slower in bfloat16 than in float32 |
"""

import argparse
import dataclasses
import enum
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
import yaml
from transformers.hf_argparser import string_to_bool
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser

from m2m_hf.config.checks import plain, resolve_existing, unknown_key_message
from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.errors import InputError

Settings = tuple[MergeToMixConfig, SFTConfig, ModelConfig]
CONFIGS = (MergeToMixConfig, SFTConfig, ModelConfig)
NULLABLE = {
    name
    for config in CONFIGS
    for name, hint in typing.get_type_hints(config).items()
    if type(None) in typing.get_args(hint)
}
NOT_IN_FINAL = {
    "model_name_or_path": "the final model is fine-tuned from the base model of the adapters",
    "model_revision": "the final model is fine-tuned from the base model of the adapters",
    "dtype": "the base model is loaded once",
    "attn_implementation": "the base model is loaded once",
    "load_in_4bit": "the base model is loaded once",
    "load_in_8bit": "the base model is loaded once",
    "bnb_4bit_quant_type": "the base model is loaded once",
    "use_bnb_nested_quant": "the base model is loaded once",
    "bnb_4bit_quant_storage": "the base model is loaded once",
    "assistant_only_loss": "the data are formatted once, for the adapters",
    "chat_template_path": "the data are formatted once, for the adapters",
    "eos_token": "the data are tokenised alike for everything",
    "pad_token": "the data are tokenised alike for everything",
    "output_dir": "it is OUT/final",
}
UNSUPPORTED = {
    "trust_remote_code": "models that bring their own code are never loaded",
    "model_init_kwargs": "use dtype, model_revision and attn_implementation",
    "hub_token": "a token must not stand in a file; use the HF_TOKEN environment variable or `hf auth login`",
    "resume_from_checkpoint": "a run goes on by itself: give the same command again",
    "enable_jit_checkpoint": "it would end a training half done; set save_steps, and give the same command again",
    "auto_find_batch_size": "adapters must be trained with the same batch size; lower per_device_train_batch_size",
    "ignore_data_skip": "a training that goes on would see other rows than one that was not interrupted",
}


class Parser(TrlParser):
    """TRL's parser, whose complaints are ours: an exception with one message instead of a page of usage."""

    def __init__(self, configs: Sequence[type]) -> None:
        super().__init__(configs, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def field_names() -> list[str]:
    """Every key that a configuration file may have."""
    return [
        item.name for config in CONFIGS for item in dataclasses.fields(config) if item.init and item.name != "folder"
    ]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, safely loaded.

    Raises:
        InputError: not there, not YAML, not a mapping.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--config {path}: there is no such file") from None
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise InputError(f"--config {path}: expected YAML, got {error}") from error
    if not isinstance(given, dict):
        raise InputError(f"--config {path}: expected keys and values, got {type(given).__name__}")
    return given


def native_bfloat16(use_cpu: bool) -> bool:
    """Whether the device that will be used multiplies bfloat16 matrices in hardware."""
    if not use_cpu and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not use_cpu:
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def hardware_defaults(given: Mapping[str, Any], flags: Sequence[str]) -> dict[str, Any]:
    """`use_cpu`, `dtype`, `bf16` and `learning_rate` where neither the file nor a flag says them; see the table above."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("use_cpu", "fp16", "bf16"):
        peek.add_argument(f"--{name}", nargs="?", const=True, type=string_to_bool, default=given.get(name))
    peek.add_argument("--dtype", default=given.get("dtype"))
    peek.add_argument("--expert", default=given.get("expert"))
    said = peek.parse_known_args(list(flags))[0]
    if said.use_cpu is None:
        said.use_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    full = said.expert == "full"
    native = native_bfloat16(bool(said.use_cpu)) and not said.fp16
    if said.bf16 is None:
        said.bf16 = native if full or said.dtype is None else not said.fp16 and said.dtype == "bfloat16"
    if said.dtype is None:
        # Small steps on weights in bfloat16 would be rounded away; the Trainer computes in it all the same.
        said.dtype = "bfloat16" if native and not full else "float32"
    rate = 2e-5 if full else 2e-4
    return {"use_cpu": said.use_cpu, "dtype": said.dtype, "bf16": said.bf16, "learning_rate": rate}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a YAML file is of a field's type; text is left to the parser, which converts it."""
    if hint is Any or isinstance(hint, (str, typing.TypeVar)):
        return True
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    if kind is type(None):
        return value is None
    if kind is typing.Literal or (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        return isinstance(value, (str, int))
    if isinstance(value, str) or kind is str:
        return isinstance(value, str) and kind in (str, int, float, bool, dict, list)
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return abs(value) < 2**63 if isinstance(value, int) else kind is float and math.isfinite(value)
    if kind is list:
        inner = typing.get_args(hint)
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value if inner)
    return isinstance(value, kind) if isinstance(kind, type) else True


def check_types(given: Mapping[str, Any]) -> None:
    """Refuses values of TRL's fields that are of another type than theirs.

    Raises:
        InputError: naming the field.
    """
    for config in (SFTConfig, ModelConfig):
        for name, hint in typing.get_type_hints(config).items():
            if name in given and not fits(given[name], hint):
                words = str(hint if typing.get_origin(hint) else getattr(hint, "__name__", hint)).replace("typing.", "")
                raise InputError(f"{name}: expected {words}, got {given[name]!r:.100}")


def check_training(args: SFTConfig) -> None:
    """Tries the optimiser and the schedule that the arguments name, on one number.

    Raises:
        InputError: what they say of it.
    """
    try:
        kind, options = SFTTrainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **options)
        transformers.get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(10),
            num_training_steps=10,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except Exception as error:  # whatever a library makes of them
        raise InputError(f"the training arguments cannot be used: {str(error) or type(error).__name__}") from error
    lowest = {
        "learning_rate": 0, "num_train_epochs": 1e-9, "logging_steps": 1e-9, "save_steps": 1e-9, "seed": 0, "max_grad_norm": 0,
        "warmup_steps": 0, "neftune_noise_alpha": 0,
    }  # fmt: skip
    for name, least in lowest.items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            words = "above 0" if 0 < least < 1 else "0 or above"
            raise InputError(f"{name}: expected a number {words}, got {value!r}")
    if args.seed >= 2**32:
        raise InputError(f"seed: expected less than 2^32, got {args.seed}")
    if args.max_steps == 0 or args.max_steps < -1:
        raise InputError(f"max_steps: expected at least 1, or -1 for num_train_epochs, got {args.max_steps}")


def parse(config: Path | None, flags: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> Settings:
    """Reads a configuration file and what overrides it.

    Args:
        config: the YAML; relative data paths in it are relative to its folder.
        flags: `--field value ...`, as typed; they override everything.
        values: fields that override the file's, as Python values.

    Raises:
        InputError: whatever is wrong with any of them, with the key and what was expected.
    """
    given = {**(read_yaml(config) if config is not None else {}), **(values or {})}
    folder = config.absolute().parent if config is not None else Path.cwd()
    names = field_names()
    for key, value in given.items():
        if key == "env":
            raise InputError(
                "env: set environment variables where the command is started; libraries read them on import"
            )
        if key not in names:
            raise InputError(unknown_key_message(str(key), names, f"--config {config}"))
        if value is None and key not in NULLABLE:
            raise InputError(f"{key}: nothing given; expected a value, or leave the key out")
    check_types(given)
    for flag in flags:
        name = flag[2:].split("=")[0]
        if flag.startswith("--") and name not in names and not (name.startswith("no_") and name[3:] in names):
            raise InputError(unknown_key_message(name, names, flag))
    defaults = {
        "output_dir": f"runs/{config.stem if config else 'm2m'}",
    }
    parser = Parser(CONFIGS)
    try:
        defaults |= hardware_defaults(given, flags)
        parser.set_defaults_with_config(**{**defaults, **given, "folder": str(folder)})
        *parsed, rest = parser.parse_args_into_dataclasses(
            args=list(flags), return_remaining_strings=True, look_for_args_file=False
        )
    except InputError:
        raise
    except Exception as error:  # the libraries' configurations may raise anything over what they are given
        raise InputError(str(error) or type(error).__name__) from error
    if rest:
        raise InputError(f"not understood: {' '.join(rest)}; expected --field value")
    ours, args, model_args = parsed
    check_trl(args, model_args)
    model_args.model_name_or_path = resolve_existing(model_args.model_name_or_path, folder)
    args.output_dir = str(Path(args.output_dir).absolute())
    return ours, args, model_args


def check_trl(args: SFTConfig, model_args: ModelConfig) -> None:
    """Refuses what TRL would take and this package cannot do, or would do wrongly.

    Raises:
        InputError: with the reason.
    """
    for name, reason in UNSUPPORTED.items():
        if getattr(args, name, None) or getattr(model_args, name, None):
            raise InputError(f"{name}: {reason}")
    if args.eval_strategy != "no":
        raise InputError(
            "eval_strategy: expected 'no'; the target's validation set is scored by the search, not while training"
        )
    if args.truncation_mode != "keep_start":
        raise InputError(f"truncation_mode: expected keep_start, got {args.truncation_mode!r} (deprecated in TRL)")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length"):
        value = getattr(args, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name}: expected an integer of at least 1, got {value!r}")
    if args.push_to_hub and not args.hub_model_id:
        raise InputError("push_to_hub: expected hub_model_id: org/name beside it")
    check_training(args)
    if not model_args.model_name_or_path:
        raise InputError("model_name_or_path is missing: give a Hub id or a local model folder")


def trl_fields(args: SFTConfig, model_args: ModelConfig) -> dict[str, Any]:
    """The fields in which TRL's configurations differ from their defaults, so that TRL rebuilds the same from them."""
    defaults = SFTConfig(output_dir=args.output_dir, use_cpu=args.use_cpu, bf16=False)
    fields: dict[str, Any] = {"bf16": args.bf16}
    for given, default in ((args, defaults), (model_args, ModelConfig())):
        for item in dataclasses.fields(given):
            value = plain(getattr(given, item.name))
            if item.init and value != plain(getattr(default, item.name)) and is_plain(value):
                fields[item.name] = value
    fields["output_dir"] = args.output_dir
    fields["use_cpu"] = args.use_cpu
    fields["dtype"] = model_args.dtype
    return dict(sorted(fields.items()))


def hub_field(name: str) -> bool:
    """Whether a field of TRL says what goes to the Hub: that is ours to do, and nobody's who is handed a recipe."""
    return name == "push_to_hub" or name.startswith("hub_")


def is_plain(value: Any) -> bool:
    """Whether YAML gives this value back as it was."""
    return value is None or yaml.safe_load(yaml.safe_dump(value)) == value if is_scalar_or_tree(value) else False


def is_scalar_or_tree(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(is_scalar_or_tree, value))
    if isinstance(value, dict):
        return all(map(is_scalar_or_tree, value.values()))
    return value is None or isinstance(value, (str, int, float, bool))


def with_overrides(
    args: SFTConfig, model_args: ModelConfig, overrides: Mapping[str, Any], where: str = "final"
) -> tuple[SFTConfig, ModelConfig]:
    """Both configurations with the fields of `final:`, or of a candidate's `training:`, put over them.

    Raises:
        InputError: a field that neither has, or a value that it does not take.
    """
    names = [item.name for config in (SFTConfig, ModelConfig) for item in dataclasses.fields(config) if item.init]
    for key in overrides:
        if key not in names:
            raise InputError(unknown_key_message(str(key), names, where))
        if key in NOT_IN_FINAL:
            raise InputError(f"{where}.{key}: {NOT_IN_FINAL[key]}")
    try:
        check_types(overrides)
    except InputError as error:
        raise InputError(f"{where}.{error}") from error
    parser = Parser((SFTConfig, ModelConfig))
    parser.set_defaults_with_config(**{**trl_fields(args, model_args), **overrides})
    try:
        new_args, new_model_args = parser.parse_args_into_dataclasses(args=[], look_for_args_file=False)
        check_trl(new_args, new_model_args)
    except Exception as error:
        raise InputError(f"{where}: {str(error) or type(error).__name__}") from error
    return new_args, new_model_args


def dump_yaml(values: Mapping[str, Any], comment: str = "") -> str:
    """`values` as YAML in their given order, with `comment` above."""
    above = "".join(f"# {line}\n".replace(" \n", "\n") for line in comment.splitlines())
    return above + yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)
