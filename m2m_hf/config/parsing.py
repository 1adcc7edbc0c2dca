"""One flat YAML for `MergeToMixConfig`, TRL's `SFTConfig` and its `ModelConfig`.

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
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from transformers import get_scheduler
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser

from m2m_hf.config.checks import (
    POSITIVE,
    Rule,
    check_fields,
    integer,
    number,
    one_of,
    resolve_existing,
    shown,
    unknown_key_message,
)
from m2m_hf.config.run_config import YAML_ONLY, MergeToMixConfig
from m2m_hf.config.yaml_files import changed_fields, read_yaml
from m2m_hf.core.jsonable import is_number
from m2m_hf.errors import InputError

Settings = tuple[MergeToMixConfig, SFTConfig, ModelConfig]
SOURCES = ("adapters", "experts")  # a place on the command line; in the YAML also a mapping
TRL_TYPES = typing.get_type_hints(SFTConfig) | typing.get_type_hints(ModelConfig)
CommandLine = dataclasses.make_dataclass(  # the fields of MergeToMixConfig that TrlParser reads
    "CommandLine",
    [
        (item.name, str | None if item.name in SOURCES else item.type, dataclasses.field(default=item.default))
        for item in dataclasses.fields(MergeToMixConfig)
        if item.name not in (*YAML_ONLY, "folder")
    ],
)
TRL_KEYS = [item.name for config in (SFTConfig, ModelConfig) for item in dataclasses.fields(config) if item.init]
KEYS = [item.name for item in dataclasses.fields(MergeToMixConfig) if item.name != "folder"] + TRL_KEYS
NOT_IN_FINAL = {
    **dict.fromkeys(
        ("model_name_or_path", "model_revision"),
        "the final model is fine-tuned from the base model of the adapters",
    ),
    **dict.fromkeys(
        ("dtype", "attn_implementation", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant",
         "bnb_4bit_quant_storage"),
        "the base model is loaded once",
    ),
    **dict.fromkeys(("assistant_only_loss", "chat_template_path"), "the data are formatted once, for the adapters"),
    **dict.fromkeys(("eos_token", "pad_token"), "the data are tokenised once, for the adapters"),
    "output_dir": "it is OUT/final",
}  # fmt: skip
UNSUPPORTED = {
    "trust_remote_code": "models that bring their own code are never loaded",
    "model_init_kwargs": "use dtype, model_revision and attn_implementation",
    "hub_token": "do not put tokens in files; use the HF_TOKEN environment variable or `hf auth login`",
    "resume_from_checkpoint": "a run resumes by itself: give the same command again",
    "enable_jit_checkpoint": "it would stop training midway; set save_steps and repeat the command to resume",
    "auto_find_batch_size": "adapters must be trained with the same batch size; lower per_device_train_batch_size",
    "ignore_data_skip": "a resumed training would see other rows than one that was not interrupted",
}
BELOW_ONE = Rule("a number from 0 to below 1", lambda value: 0 <= value < 1)
CHOICES = {
    item.name: one_of(*item.metadata["choices"])
    for config in (SFTConfig, ModelConfig)
    for item in dataclasses.fields(config)
    if item.metadata.get("choices")
}
FORMER = {  # names in earlier releases of transformers and TRL -> what to give now; nothing for what is gone
    "max_seq_length": "max_length",
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "use_flash_attention_2": "attn_implementation: flash_attention_2",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "include_tokens_per_second": "include_num_input_tokens_seen",
    **dict.fromkeys(
        ("overwrite_output_dir", "save_safetensors", "logging_dir", "use_mps_device", "jit_mode_eval", "half_precision_backend",
         "push_to_hub_token", "past_index", "fp16_opt_level", "tokenizer_name_or_path"),
        "",
    ),
}  # fmt: skip
SCRIPT_KEYS = (  # of TRL's own script
    "datasets", "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "streaming", "test_split_size",
)  # fmt: skip
TRAINING_RULES = {
    "per_device_train_batch_size": integer(1),
    "gradient_accumulation_steps": integer(1),
    "max_length": integer(1),
    "max_steps": Rule("at least 1, or -1 for num_train_epochs", lambda value: value == -1 or value >= 1),
    "num_train_epochs": POSITIVE,
    "logging_steps": POSITIVE,
    "save_steps": POSITIVE,
    "learning_rate": POSITIVE,
    "torch_compile_mode": one_of("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "max_grad_norm": number(0),
    "warmup_steps": number(0),
    "neftune_noise_alpha": number(0),
    "weight_decay": number(0),
    "dataloader_prefetch_factor": integer(1),
    "label_smoothing_factor": BELOW_ONE,
    "lora_r": integer(1),
    "lora_alpha": integer(1),
    "lora_dropout": BELOW_ONE,
    "seed": Rule("an integer from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32),
}


@contextmanager
def refusing(where: str = "") -> Iterator[None]:
    """Makes one `InputError` of whatever TRL and transformers raise over a wrong value."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{where}{str(error) or type(error).__name__}") from error


class Parser(TrlParser):
    """TRL's parser, but an error is one `InputError` instead of a page of usage."""

    def __init__(self, *configs: type) -> None:
        super().__init__(configs, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def said(self, values: Mapping[str, Any], flags: Sequence[str]) -> Any:
        """What `values` and `flags` say, before the configurations are made of it."""
        with refusing():
            self.set_defaults_with_config(**values)
            said, _ = self.parse_known_args(list(flags))
        return said

    def read(self, values: Mapping[str, Any], flags: Sequence[str] = ()) -> tuple[Any, ...]:
        """The configurations made of `values` and of `flags`, which win."""
        with refusing():
            self.set_defaults_with_config(**values)
            *configs, rest = self.parse_args_into_dataclasses(
                args=list(flags), return_remaining_strings=True, look_for_args_file=False
            )
            refuse_flags(rest)
        return tuple(configs)


def refuse_flags(words: Sequence[str]) -> None:
    """Refuses what the parser does not know: no field, a field that only a YAML can hold, or no flag at all."""
    for word in words:
        name = word[2:].split("=")[0]
        if word.startswith("--") and name in YAML_ONLY:
            raise InputError(f"--{name}: expected in the YAML, under {name}:")
        if word.startswith("--"):
            raise InputError(unknown_field(name, KEYS, word))
    if words:
        raise InputError(f"unrecognised arguments: {' '.join(words)}; expected --field value")


def parse(config: Path | None, flags: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> Settings:
    """Reads a configuration file and what overrides it.

    Args:
        config: the YAML; relative data paths in it are relative to its folder.
        flags: `--field value ...`, as typed; they override everything.
        values: fields that override the file's, as Python values.

    Raises:
        InputError: whatever is wrong with any of them, with the key and what was expected.
    """
    settings = {**(read_yaml(config) if config is not None else {}), **(values or {})}
    folder = config.absolute().parent if config is not None else Path.cwd()
    if "env" in settings:
        raise InputError("env: set environment variables where the command is started; libraries read them on import")
    check_keys(settings, KEYS, f"--config {config}")
    check_types(settings)
    structured = {key: settings.pop(key) for key in YAML_ONLY if key in settings}
    sources = {key: settings.pop(key) for key in SOURCES if isinstance(settings.get(key), Mapping)}
    parser = Parser(CommandLine, SFTConfig, ModelConfig)
    unsaid = dict.fromkeys(("use_cpu", "dtype", "bf16", "use_peft"))
    defaults: dict[str, Any] = {"output_dir": f"runs/{config.stem if config else 'm2m'}", "use_peft": False}
    given = parser.said(unsaid | settings, flags)
    if given.use_peft is not None and given.use_peft == (given.expert == "full"):
        raise InputError(
            f"use_peft: {given.use_peft} contradicts expert: {given.expert}, which decides here; leave it out"
        )
    defaults |= hardware_defaults(given)
    said, args, model_args = parser.read(defaults | settings, flags)
    structured |= {key: source for key, source in sources.items() if getattr(said, key) is None}
    ours = MergeToMixConfig(**{**vars(said), **structured, "folder": str(folder)})
    check_trl(args, model_args)
    model_args.model_name_or_path = resolve_existing(model_args.model_name_or_path, folder)
    args.output_dir = str(Path(args.output_dir).absolute())
    return ours, args, model_args


def check_keys(settings: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in settings:
        if key not in known:
            raise InputError(unknown_field(str(key), known, where))


def unknown_field(key: str, known: Sequence[str], where: str) -> str:
    """What to give in place of a key that is not known, or is no longer."""
    if key in SCRIPT_KEYS:
        return f"{where}: unknown key {key!r}; rows stand under candidates: here, and m2m init --from FILE makes them of TRL's"
    if key not in FORMER:
        return unknown_key_message(key, known, where)
    now = f"it is now {FORMER[key]}" if FORMER[key] else "transformers has it no longer; remove it"
    return f"{where}: unknown key {key!r}; {now}"


def check_types(settings: Mapping[str, Any]) -> None:
    """Refuses values of TRL's fields that have another type than theirs."""
    for name, hint in TRL_TYPES.items():
        if name in settings and not fits(settings[name], hint):
            words = str(hint if typing.get_origin(hint) else getattr(hint, "__name__", hint)).replace("typing.", "")
            raise InputError(f"{name}: expected {words}, got {shown(settings[name])}")
    check_fields({name: settings[name] for name in CHOICES if settings.get(name) is not None}, CHOICES)


def fits(value: Any, hint: Any) -> bool:
    """True if a value of a YAML file has a field's type; text passes for what the parser can convert it to."""
    kind = typing.get_origin(hint) or hint
    if kind in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if kind is typing.Literal:
        return isinstance(value, (str, int))
    if kind is Any or not isinstance(kind, type):
        return True
    if issubclass(kind, enum.Enum):
        return isinstance(value, (str, int))
    if isinstance(value, str):
        return kind in (str, int, float, bool, dict, list)
    if kind in (int, float):
        in_range = isinstance(value, float) or (is_number(value) and abs(value) < 2**63)
        return is_number(value) and isinstance(value, (int, kind)) and in_range
    if kind is list:
        inner = typing.get_args(hint)
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value if inner)
    return isinstance(value, kind)


def native_bfloat16(use_cpu: bool) -> bool:
    """True if the device that will be used multiplies bfloat16 matrices in hardware."""
    import torch

    if not use_cpu:
        return torch.cuda.is_available() and bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def hardware_defaults(said: argparse.Namespace) -> dict[str, Any]:
    """`use_cpu`, `dtype`, `bf16` and `learning_rate` where neither the file nor a flag says them; see the table above."""
    import torch

    use_cpu, dtype, bf16, full = said.use_cpu, said.dtype, said.bf16, said.expert == "full"
    if use_cpu is None:
        use_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    native = native_bfloat16(use_cpu) and not said.fp16
    if bf16 is None:
        bf16 = native if full or dtype is None else not said.fp16 and dtype == "bfloat16"
    if dtype is None:
        # Small steps on weights in bfloat16 would be rounded away; the Trainer computes in it all the same.
        dtype = "bfloat16" if native and not full else "float32"
    return {"use_cpu": use_cpu, "dtype": dtype, "bf16": bf16, "learning_rate": 2e-5 if full else 2e-4}


def check_trl(args: SFTConfig, model_args: ModelConfig) -> None:
    """Refuses what TRL would take and this package cannot do, or would do wrongly."""
    for name, reason in UNSUPPORTED.items():
        if getattr(args, name, None) or getattr(model_args, name, None):
            raise InputError(f"{name}: {reason}")
    if args.eval_strategy != "no":
        raise InputError(
            "eval_strategy: expected 'no'; the search scores the target's validation set, not the training"
        )
    if args.truncation_mode != "keep_start":
        raise InputError(f"truncation_mode: expected keep_start, got {args.truncation_mode!r} (deprecated in TRL)")
    if args.dataset_text_field != "text":
        raise InputError(
            f"dataset_text_field: rows have a prompt and a completion; to train on all of a text, give its candidate columns: "
            f'{{{args.dataset_text_field}: completion}} and template: {{prompt: ""}}'
        )
    if args.push_to_hub and not args.hub_model_id:
        raise InputError("push_to_hub: expected hub_model_id: org/name beside it")
    given = vars(model_args) | vars(args)
    check_fields({name: given[name] for name in TRAINING_RULES if given[name] is not None}, TRAINING_RULES)
    if args.activation_offloading and args.use_cpu:
        raise InputError(
            "activation_offloading: moves activations from a GPU to the CPU, and use_cpu is true; leave it out"
        )
    try_optimizer(args)
    if not model_args.model_name_or_path:
        raise InputError("model_name_or_path is missing: give a Hub id or a local model folder")


def try_optimizer(args: SFTConfig) -> None:
    """Builds the optimiser and the schedule that the arguments name, on one number."""
    import torch

    with refusing("the training arguments cannot be used: "):
        kind, options = SFTTrainer.get_optimizer_cls_and_kwargs(args)
        get_scheduler(
            args.lr_scheduler_type,
            kind([torch.nn.Parameter(torch.zeros(1))], **options),
            num_warmup_steps=args.get_warmup_steps(10),
            num_training_steps=10,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )


def trl_fields(args: SFTConfig, model_args: ModelConfig) -> dict[str, Any]:
    """The fields in which TRL's configurations differ from their defaults, so that TRL rebuilds the same from them."""
    defaults = SFTConfig(output_dir=args.output_dir, use_cpu=args.use_cpu, bf16=False)
    changed = changed_fields(args, defaults) | changed_fields(model_args, ModelConfig())
    if changed.get("include_num_input_tokens_seen") == "all":  # what true becomes, and the parser does not take
        changed["include_num_input_tokens_seen"] = True
    always = {"bf16": args.bf16, "output_dir": args.output_dir, "use_cpu": args.use_cpu, "dtype": model_args.dtype}
    return dict(sorted((changed | always).items()))


def with_overrides(
    args: SFTConfig, model_args: ModelConfig, overrides: Mapping[str, Any], where: str = "final"
) -> tuple[SFTConfig, ModelConfig]:
    """Both configurations with the fields of `final:`, or of a candidate's `training:`, put over them."""
    check_keys(overrides, TRL_KEYS, where)
    for key in overrides:
        if key in NOT_IN_FINAL:
            raise InputError(f"{where}.{key}: {NOT_IN_FINAL[key]}")
    with refusing(f"{where}: "):
        check_types(overrides)
        new_args, new_model_args = Parser(SFTConfig, ModelConfig).read(trl_fields(args, model_args) | {**overrides})
        check_trl(new_args, new_model_args)
    return new_args, new_model_args
