"""YAML in, YAML out: one flat file for `MergeToMixConfig`, TRL's `SFTConfig` and its `ModelConfig`.

Where the file and the command line say nothing, four defaults differ from TRL's:

| field | TRL | here | why |
|---|---|---|---|
| `learning_rate` | 2e-5 | 2e-4 | adapters need about ten times the rate of a full fine-tune |
| `use_cpu` | false | true without an accelerator | the Trainer then agrees with what is there |
| `dtype` | float32 | bfloat16 where the hardware computes in it | the base is frozen; half the memory, twice the speed |
| `bf16` | true | as `dtype` | processors without it are slower in bfloat16 than in float32 |
"""

import dataclasses
import enum
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from trl import ModelConfig, SFTConfig, TrlParser

from .config import MergeToMixConfig, resolve_existing, unknown_key_message
from .errors import InputError

Settings = tuple[MergeToMixConfig, SFTConfig, ModelConfig]
CONFIGS = (MergeToMixConfig, SFTConfig, ModelConfig)
UNSUPPORTED = {
    "trust_remote_code": "models that bring their own code are never loaded",
    "model_init_kwargs": "use dtype, model_revision and attn_implementation",
    "load_in_4bit": "quantised base models cannot be used yet",
    "load_in_8bit": "quantised base models cannot be used yet",
    "push_to_hub": "pushing from a run is not possible yet; use huggingface_hub on the finished folder",
    "resume_from_checkpoint": "a run goes on by itself: give the same command again",
}


class Parser(TrlParser):
    """TRL's parser, whose complaints are ours: an exception with one message instead of a page of usage."""

    def __init__(self) -> None:
        super().__init__(CONFIGS, add_help=False, allow_abbrev=False)

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


def with_defaults(given: Mapping[str, Any], flags: Sequence[str], output_dir: str) -> dict[str, Any]:
    """`given` with the defaults of this module, except where a flag of the command line decides."""
    accelerator = torch.cuda.is_available() or torch.backends.mps.is_available()
    use_cpu = "use_cpu" in flags or given.get("use_cpu", not accelerator)
    native = native_bfloat16(bool(use_cpu))
    defaults = {
        "output_dir": output_dir,
        "learning_rate": 2e-4,
        "use_cpu": use_cpu,
        "dtype": "bfloat16" if native else "float32",
    }
    if "fp16" not in given and "fp16" not in flags:
        defaults["bf16"] = native
    return {name: value for name, value in defaults.items() if name not in flags} | dict(given)


def parse(config: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Reads a configuration file and the command-line flags that override it.

    Args:
        config: the YAML; relative data paths in it are relative to its folder.
        overrides: `--field value ...`, as typed.

    Raises:
        InputError: whatever is wrong with either, with the key and what was expected.
    """
    given = read_yaml(config) if config is not None else {}
    folder = config.absolute().parent if config is not None else Path.cwd()
    names = field_names()
    for key in given:
        if key not in names and key != "env":
            raise InputError(unknown_key_message(str(key), names, f"--config {config}"))
    environment = given.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise InputError(f"env: expected names and values, got {environment!r}")
    os.environ.update({str(key): str(value) for key, value in environment.items()})
    flags = [flag[2:].split("=")[0] for flag in overrides if flag.startswith("--")]
    for flag in flags:
        if flag not in names and not (flag.startswith("no_") and flag[3:] in names):
            raise InputError(unknown_key_message(flag, names, f"--{flag}"))
    given = {key: value for key, value in given.items() if value is not None}
    values = with_defaults(given, flags, f"runs/{config.stem if config else 'm2m'}")
    parser = Parser()
    parser.set_defaults_with_config(**values, folder=str(folder))
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            args=list(overrides), return_remaining_strings=True, look_for_args_file=False
        )
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
    if rest:
        raise InputError(f"not understood: {' '.join(rest)}; expected --field value")
    ours, args, model_args = parsed
    for name, reason in UNSUPPORTED.items():
        if getattr(args, name, None) or getattr(model_args, name, None):
            raise InputError(f"{name}: {reason}")
    if not model_args.model_name_or_path:
        raise InputError("model_name_or_path is missing: give a Hub id or a local model folder")
    model_args.model_name_or_path = resolve_existing(model_args.model_name_or_path, folder)
    args.output_dir = str(Path(args.output_dir).absolute())
    return ours, args, model_args


def plain(value: Any) -> Any:
    """`value` as YAML can hold it."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value


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
    args: SFTConfig, model_args: ModelConfig, overrides: Mapping[str, Any]
) -> tuple[SFTConfig, ModelConfig]:
    """Both configurations with the fields of `final:` put over them.

    Raises:
        InputError: a field that neither has, or a value that it does not take.
    """
    names = [item.name for config in (SFTConfig, ModelConfig) for item in dataclasses.fields(config) if item.init]
    for key in overrides:
        if key not in names:
            raise InputError(unknown_key_message(str(key), names, "final"))
    parser = TrlParser((SFTConfig, ModelConfig), add_help=False)
    parser.set_defaults_with_config(**{**trl_fields(args, model_args), **overrides})
    try:
        new_args, new_model_args = parser.parse_args_into_dataclasses(args=[], look_for_args_file=False)
    except (ValueError, TypeError) as error:
        raise InputError(f"final: {error}") from error
    return new_args, new_model_args


def dump_yaml(values: Mapping[str, Any], comment: str = "") -> str:
    """`values` as YAML in their given order, with `comment` above."""
    above = "".join(f"# {line}\n".replace(" \n", "\n") for line in comment.splitlines())
    return above + yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)
