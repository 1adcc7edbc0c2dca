"""The bank: one LoRA adapter per candidate, all trained alike, none trained twice.

Uniformity is what makes the average of the adapters stand in for training on the mixture (arXiv 2505.16066), so everything
that could tell two adapters apart except their data is written down, compared, and refused where it differs.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config
from trl.trainer.utils import create_model_from_path

from .callbacks import BankProgress
from .console import Terminal, duration
from .data import Candidate
from .errors import InputError
from .journal import altered, cut_short, file_fingerprint, files_of, fingerprint, hidden, read_json, sync
from .merging import ADAPTER_FILES, Adapter, refuse_unless_averageable
from .training import (
    TrainingFailedError,
    agreed,
    finished,
    load_trained,
    move,
    planned_steps,
    publish,
    sharded,
    train_lora,
)

# Settings that change where or how something is told, not what is learned.
OPERATIONAL = {
    "output_dir", "logging_strategy", "logging_first_step", "logging_steps", "logging_nan_inf_filter", "log_level",
    "log_level_replica", "log_on_each_node", "report_to", "run_name", "project", "trackio_space_id", "disable_tqdm",
    "save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node", "push_to_hub",
    "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision",
    "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay",
    "per_device_eval_batch_size", "dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "local_rank", "ddp_timeout", "skip_memory_metrics",
    "include_num_input_tokens_seen", "remove_unused_columns", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better", "model_init_kwargs", "trackio_bucket_id", "trackio_static_space_id",
}  # fmt: skip
NEEDED = {"fingerprint", "data", "uniform", "steps", "seconds", "files"}  # in every `training.json`
LAUNCH = ("processes", "sharded")  # facts about how the training was launched
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers")


def lora_config(model_args: ModelConfig) -> LoraConfig:
    """The LoRA shape that `model_args` describe, as TRL builds it.

    Raises:
        InputError: one that cannot be averaged (DoRA, modules_to_save, ...).
    """
    model_args = copy.copy(model_args)
    model_args.use_peft = True
    try:
        config = get_peft_config(model_args)
    except Exception as error:  # whatever PEFT makes of what it is given
        raise InputError(f"lora: {str(error) or type(error).__name__}") from error
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


def load_tokenizer(model_args: ModelConfig, args: SFTConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that TRL would load for this model, with the special tokens and the chat template that it would set.

    Raises:
        InputError: no such model or tokenizer, or a token that it does not have.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise not_found(model_args, error) from error
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


def check_model(model_args: ModelConfig, args: SFTConfig, config: LoraConfig) -> int:
    """Tries everything about the model that needs no weights: its configuration, its attention, the LoRA shape on its layers.

    Returns:
        The number of positions that the model has (a million where it does not say).

    Raises:
        InputError: whatever of it cannot work.
    """
    try:
        model_config = transformers.AutoConfig.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise not_found(model_args, error) from error
    try:
        with torch.device("meta"), unsharded(args):
            model = transformers.AutoModelForCausalLM.from_config(
                model_config, attn_implementation=model_args.attn_implementation
            )
    except Exception as error:
        raise InputError(
            f"model_name_or_path: {model_args.model_name_or_path!r} is no causal LM to be used ({error})"
        ) from error
    try:
        get_peft_model(model, copy.deepcopy(config))
    except Exception as error:
        raise InputError(
            f"lora_target_modules {model_args.lora_target_modules!r}, lora_r {model_args.lora_r!r} do not fit this model: "
            f"{error}. Give the names of at least two kinds of layers, one regular expression such as '.*q_proj', or all-linear"
        ) from error
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return positions or 1_000_000


def load_base(model_args: ModelConfig, args: SFTConfig, to_train: bool = False) -> PreTrainedModel:
    """The base model, loaded as `trl sft` loads it, in evaluation mode on the device that training uses; safetensors only.

    With `load_in_4bit` or `load_in_8bit` bitsandbytes quantises it while it is loaded.

    Args:
        to_train: under FSDP or DeepSpeed, as their training wants it, which moves and cuts it itself; it can then not be scored.

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
            model = create_model_from_path(
                model_args.model_name_or_path,
                revision=model_args.model_revision,
                attn_implementation=model_args.attn_implementation,
                dtype=model_args.dtype,
                trust_remote_code=False,
                use_safetensors=True,
                **kwargs,
            )
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise InputError(f"model_name_or_path: {model_args.model_name_or_path!r} cannot be loaded ({error})") from error
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            # On processors with AVX512-BF16 bitsandbytes 0.50 repacks the weights in place when it first infers with them. It
            # rounds their scales, and from then on no gradient passes through the layer, without a word.
            layer.support_avx512bf16_for_cpu = False
    placed = to_train or quantization or hasattr(model, "hf_device_map")
    return model if placed else model.to(args.device)


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


def uniform_facts(
    args: SFTConfig,
    config: LoraConfig,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    dtype: str | None,
    data_format: str,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything beside the data that an adapter depends on, flat, so that what differs can be named.

    Args:
        base: fingerprint of the base weights.
        dtype: the base's dtype as asked for.
        data_format: the run's format (`data.py`).
        quantization: what bitsandbytes does to the base, see `quantization_facts`.
    """
    facts: dict[str, Any] = {"base_model": base, "dtype": dtype, "data_format": data_format}
    if quantization:
        facts["quantization"] = fingerprint(quantization)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    facts["tokenizer"] = fingerprint([content, str(tokenizer.special_tokens_map)])
    facts["chat_template"] = fingerprint(tokenizer.chat_template) if data_format != "text" else None
    facts["processes"] = PartialState().num_processes
    if sharded():
        facts["sharded"] = True  # accelerate then trains in float32 where it would otherwise not
    for name, value in args.to_dict().items():
        if name not in OPERATIONAL:
            facts[name] = getattr(args, name) if name.endswith("_token") else value  # to_dict hides tokens, as secrets
    facts |= lora_facts(config)
    for library in LIBRARIES:
        facts[f"version.{library}"] = version(library)
    # As JSON gives them back, so that what is in memory compares with what was written.
    return dict(sorted(json.loads(json.dumps(facts, default=str)).items()))


def lora_facts(config: LoraConfig) -> dict[str, Any]:
    """The shape of an adapter, as JSON gives it back."""
    aside = ("base_model_name_or_path", "inference_mode", "revision", "peft_version", "auto_mapping")
    found = {
        f"lora_config.{name}": sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if name not in aside
    }
    return dict(json.loads(json.dumps(found, default=str)))


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The names of the facts in which two trainings differ, each with both values."""
    names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    return [f"{name} ({theirs.get(name)!r} there, {ours.get(name)!r} now)" for name in names]


class AdapterBank:
    """The adapters of one run, in `OUT/adapters/<candidate>/`.

    A candidate whose training failed has a folder too, which says why in place of an adapter.

    Args:
        folder: `OUT/adapters`.
        candidates: what there must be an adapter for.
        facts: `uniform_facts` of this run.
        mixed: name -> those of a candidate that is trained otherwise (`allow_mixed_training`).
    """

    def __init__(
        self,
        folder: Path,
        candidates: Mapping[str, Candidate],
        facts: Mapping[str, Any],
        mixed: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.folder = folder
        self.candidates = dict(candidates)
        self.facts = {name: dict((mixed or {}).get(name, facts)) for name in candidates}

    def check(self) -> list[str]:
        """The names of the adapters that are still to be trained, those that a crash cut short among them.

        Processes and sharding count only where adapters are still to be trained: they change what is learned, but a
        complete bank may be searched with any.

        Raises:
            InputError: an adapter is there that was trained otherwise, or on other rows; nothing is overwritten.
        """
        missing = [name for name in self.candidates if cut_short(self.folder / name) is not None]
        trained = self.training(skip=missing)
        for name, there in trained.items():
            self._refuse_others(name, there, self.folder, trained if not missing else {})
        return missing

    def _refuse_others(
        self, name: str, there: Mapping[str, Any], folder: Path, bank: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Refuses an adapter that was trained otherwise than this run asks for, or on other rows.

        Args:
            there: its `training.json`.
            folder: where it stands.
            bank: all of a complete bank, whose launch then does not count.
        """
        launch = {fact: next(iter(bank.values()))["uniform"].get(fact) for fact in LAUNCH} if bank else {}
        ours = folder == self.folder
        differences = differing(self.facts[name] | launch, there["uniform"])
        if differences:
            raise InputError(
                f"adapter {name!r} in {folder} was trained otherwise than this run asks for, and adapters that "
                f"differ in anything but their data cannot be averaged: {'; '.join(differences)}. Restore the settings, "
                + (
                    f"choose another --output_dir, or delete {self.folder} to train all adapters again"
                    if ours
                    else "or leave out adapters:"
                )
            )
        if there["data"] != self.candidates[name].fingerprint:
            raise InputError(
                f"candidate {name!r} has changed since its adapter was trained (rows {there['data']} there, "
                f"{self.candidates[name].fingerprint} now). Restore the data, give the new data another name, or "
                + (
                    f"delete {self.folder / name} to have this adapter trained again"
                    if ours
                    else f"leave out adapters: ({folder})"
                )
            )

    def take(self, folder: Path, missing: Sequence[str], terminal: Terminal) -> None:
        """Copies adapters of a bank that was made elsewhere, where they are missing here and are what this run would train.

        Args:
            folder: with a folder for every candidate, as in `OUT/adapters`.

        Raises:
            InputError: one of them was trained otherwise, on other rows, or is not whole.
        """
        there = {name: read_json(folder / name / "training.json") for name in missing if (folder / name).is_dir()}
        for name, record in there.items():
            if (
                not isinstance(record, dict)
                or not set(record) >= NEEDED
                or "failed" in record
                or not isinstance(record["uniform"], dict)
            ):
                raise InputError(f"{folder / name} holds no adapter that can be taken: see its training.json")
            self._refuse_others(name, record, folder, there if len(there) == len(self.candidates) else {})
            if (reason := cut_short(folder / name)) or altered(folder / name):
                raise InputError(f"{folder / name}: {reason or 'not what was trained'}; fetch it again")
            Adapter.load(folder / name)
        if PartialState().is_main_process:
            for name, record in there.items():
                partial = hidden(self.folder / name)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                for file in ("training.json", *files_of(record)):  # no links, and nothing that is not described
                    shutil.copyfile(folder / name / file, partial / file)
                sync(partial)
                move(self.folder / name)
        PartialState().wait_for_everyone()
        if there:
            terminal.say(f"took {len(there)} adapters that were trained elsewhere: {', '.join(there)}")

    def adopt(self, others: Mapping[str, tuple[str, Path]], terminal: Terminal) -> None:
        """Takes adapters that were not trained by this package, as far as their files tell that they may be averaged.

        What they do not tell, such as the learning rate, is taken on trust: recorded as `unknown` in `training.json`, and
        said in every result.

        Args:
            others: candidate -> (what was given, the folder of the adapter).

        Raises:
            InputError: one that is no LoRA adapter that can be averaged, or of another shape than this run's.
        """
        unknown: list[str] = []
        for name, (source, folder) in others.items():
            adapter = Adapter.load(folder)
            shape = lora_facts(adapter.config)
            del shape["lora_config.task_type"]  # which plain scripts leave out
            ours = {fact: value for fact, value in self.facts[name].items() if fact in shape}
            if differences := differing(ours, shape):
                raise InputError(
                    f"adapters.{name}: {source} has another shape than this run asks for: {'; '.join(differences)}. The final "
                    "model is trained with this run's: give the shape of the adapters in the configuration"
                )
            unknown = [fact for fact in self.facts[name] if fact not in shape]
            base = adapter.config.base_model_name_or_path
            if base:
                terminal.say(f"  {name}: says that it was trained on {base}", "dim")
            if PartialState().is_main_process:
                partial = hidden(self.folder / name)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                for file in ADAPTER_FILES:
                    shutil.copyfile(folder / file, partial / file)
            PartialState().wait_for_everyone()
            weights = file_fingerprint([folder / file for file in ADAPTER_FILES])
            data = self.candidates[name].fingerprint
            publish(
                self.folder / name,
                {
                    "candidate": name,
                    "fingerprint": fingerprint([self.facts[name], data, weights]),
                    "data": data,
                    "rows": len(self.candidates[name].rows),
                    "steps": 0,
                    "seconds": 0.0,
                    "source": source,
                    "unknown": unknown,
                    "uniform": self.facts[name],
                },
            )
        if others:
            terminal.say(
                f"took {len(others)} adapters that others have trained: {', '.join(others)}. Their files tell rank, scaling and "
                "layers; base weights, data, learning rate, epochs, batch size, seed and versions are taken on trust",
                "yellow",
            )

    def train_missing(
        self,
        base: Callable[[], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        settings: Callable[[str], tuple[SFTConfig, LoraConfig]],
        terminal: Terminal,
    ) -> None:
        """Trains the adapters that `check` names, one after another, each on what `base` gives and with what `settings` give.

        An adapter is made in a hidden folder and moved to its place when it is complete, so that an interrupted one
        leaves nothing that looks finished. One that fails leaves its reason, and the others are trained all the same.
        """
        of = {name: fingerprint([self.facts[name], self.candidates[name].fingerprint]) for name in self.candidates}
        asked: list[str] = agreed(self.check())
        torn = {name: cut_short(self.folder / name) for name in asked if (self.folder / name).exists()}
        missing = [name for name in asked if not finished(self.folder / name, of[name])]
        steps = {
            name: planned_steps(settings(name)[0], self.candidates[name].trained_rows, self.candidates[name].tokens)
            for name in missing
        }
        for name in missing:
            if name in torn:
                terminal.say(f"  {name}: {torn[name]}; its adapter is trained again", "yellow")
        done = 0
        with terminal.progress("training adapters", sum(steps.values())) as bar:
            for number, name in enumerate(missing, start=1):
                folder = self.folder / name
                progress = BankProgress(bar, done, f"{name} ({number} of {len(missing)})")
                about = {
                    "candidate": name,
                    "fingerprint": of[name],
                    "data": self.candidates[name].fingerprint,
                    "rows": len(self.candidates[name].rows),
                }
                done += steps[name]
                try:
                    record = train_lora(
                        base(),
                        tokenizer,
                        self.candidates[name].rows,
                        *settings(name),
                        hidden(folder),
                        [progress],
                        of[name],
                        f"adapters/{name}",
                    )
                except TrainingFailedError as error:
                    nothing = {"steps": 0, "seconds": 0.0, "failed": str(error)}
                    publish(folder, {**about, **nothing, "uniform": self.facts[name]})
                    terminal.say(f"  {name}: failed: {error}", "yellow")
                    continue
                publish(folder, {**about, **record, "uniform": self.facts[name]})
                curve = [loss for _, loss in record["loss_curve"]]
                loss = f"{curve[0]:.3f} → {curve[-1]:.3f}" if len(curve) > 1 else f"{record['loss']:.3f} on average"
                terminal.say(
                    f"  {name}: {record['steps']:,} steps, {record['tokens']:,} tokens, "
                    f"loss {loss}, {duration(record['seconds'])}"
                )

        records = self.training().values()
        PartialState().wait_for_everyone()
        if all("failed" in one for one in records):
            if PartialState().is_main_process:
                for name in self.candidates:
                    shutil.rmtree(self.folder / name)
            PartialState().wait_for_everyone()
            reasons = dict.fromkeys(one["failed"] for one in records)
            raise InputError(f"not one adapter could be trained: {'; '.join(reasons)}")

    def training(self, skip: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
        """Name -> `training.json` of every adapter but those to skip; its `fingerprint` says what the adapter is.

        Raises:
            InputError: one that does not say how its adapter was trained.
        """
        records = {}
        for name in self.candidates:
            if name in skip:
                continue
            path = self.folder / name / "training.json"
            record = read_json(path)
            if not isinstance(record, dict) or not set(record) >= NEEDED:
                raise InputError(
                    f"{path} does not say how the adapter was trained; delete {path.parent} to have it trained again"
                )
            records[name] = record
        return records

    def load(self) -> dict[str, Adapter]:
        """Name -> adapter, from the disk; without those that failed.

        Raises:
            InputError: one that is not the one that was trained.
        """
        return {name: load_trained(self.folder / name) for name, one in self.training().items() if "failed" not in one}
