"""YAML in, YAML out: one flat file for `MergeToMixConfig`, TRL's `SFTConfig` and its `ModelConfig`.

Where the file and the command line say nothing, four defaults differ from TRL's:

| field | TRL | here | why |
|---|---|---|---|
| `learning_rate` | 2e-5 | 2e-4 | adapters need about ten times the rate of a full fine-tune |
| `use_cpu` | false | true without an accelerator | the Trainer then agrees with what is there |
| `dtype` | float32 | bfloat16 where the hardware computes in it | the base is frozen; half the memory, twice the speed |
| `bf16` | true | with `dtype: bfloat16` | processors without it are slower in bfloat16 than in float32 |
"""

import argparse
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers.hf_argparser import string_to_bool
from trl import ModelConfig, SFTConfig, TrlParser

from .config import MergeToMixConfig, plain, resolve_existing, unknown_key_message
from .errors import InputError

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
    "push_to_hub": "pushing from a run is not possible yet; use huggingface_hub on the finished folder",
    "resume_from_checkpoint": "a run goes on by itself: give the same command again",
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
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
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
    """`use_cpu`, `dtype` and `bf16` where neither the file nor a flag says them; see the table above."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("use_cpu", "fp16", "bf16"):
        peek.add_argument(f"--{name}", nargs="?", const=True, type=string_to_bool, default=given.get(name))
    peek.add_argument("--dtype", default=given.get("dtype"))
    said = peek.parse_known_args(list(flags))[0]
    if said.use_cpu is None:
        said.use_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if said.dtype is None:
        said.dtype = "bfloat16" if native_bfloat16(bool(said.use_cpu)) and not said.fp16 else "float32"
    if said.bf16 is None:
        said.bf16 = not said.fp16 and said.dtype == "bfloat16"
    return {"use_cpu": said.use_cpu, "dtype": said.dtype, "bf16": said.bf16}


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
    for flag in flags:
        name = flag[2:].split("=")[0]
        if flag.startswith("--") and name not in names and not (name.startswith("no_") and name[3:] in names):
            raise InputError(unknown_key_message(name, names, flag))
    defaults = {"output_dir": f"runs/{config.stem if config else 'm2m'}", "learning_rate": 2e-4}
    parser = Parser(CONFIGS)
    try:
        defaults |= hardware_defaults(given, flags)
        parser.set_defaults_with_config(**{**defaults, **given, "folder": str(folder)})
        *parsed, rest = parser.parse_args_into_dataclasses(
            args=list(flags), return_remaining_strings=True, look_for_args_file=False
        )
    except InputError:
        raise
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise InputError(str(error)) from error
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
    parser = Parser((SFTConfig, ModelConfig))
    parser.set_defaults_with_config(**{**trl_fields(args, model_args), **overrides})
    try:
        new_args, new_model_args = parser.parse_args_into_dataclasses(args=[], look_for_args_file=False)
        check_trl(new_args, new_model_args)
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{where}: {error}") from error
    return new_args, new_model_args


def dump_yaml(values: Mapping[str, Any], comment: str = "") -> str:
    """`values` as YAML in their given order, with `comment` above."""
    above = "".join(f"# {line}\n".replace(" \n", "\n") for line in comment.splitlines())
    return above + yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)
