"""Configurations that were written for TRL, axolotl or LLaMA-Factory, read."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from m2m_hf.config.checks import BUILDERS
from m2m_hf.errors import InputError

SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".arrow": "arrow"}


@dataclass
class Draft:
    """What a configuration is made of.

    Args:
        model: a Hub id or a local folder.
        candidates: name -> what load_dataset takes.
        target: name and what load_dataset takes.
        scorer: one of `SCORERS`.
        settings: fields of TRL's configurations.
        lost: fields of the configuration that this was made from, which have no counterpart.
        task: one that is not a language model's.
    """

    model: str = ""
    candidates: dict[str, dict[str, Any]] = field(default_factory=dict)
    target: tuple[str, dict[str, Any]] | None = None
    scorer: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    task: str | None = None


def named(source: str) -> tuple[str, dict[str, Any]]:
    """(a name, what load_dataset takes) of `name=source` or `source`: a file, a folder, or a Hub id."""
    name, given, path = source.rpartition("=")
    if not given:
        name, path = "", source
    file = Path(path)
    builder = SUFFIXES.get(file.suffix.lower())
    made: dict[str, Any] = {"path": builder, "data_files": path} if builder else {"path": path}
    name = (
        name or re.sub(r"[^A-Za-z0-9_-]", "_", file.stem if builder else path.rsplit("/", 1)[-1]).strip("_-") or "data"
    )
    return name[:64], made


AXOLOTL = {
    "lora_r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_target_modules": "lora_target_modules",
    "learning_rate": "learning_rate", "num_epochs": "num_train_epochs", "max_steps": "max_steps",
    "micro_batch_size": "per_device_train_batch_size", "gradient_accumulation_steps": "gradient_accumulation_steps",
    "sequence_len": "max_length", "lr_scheduler": "lr_scheduler_type", "weight_decay": "weight_decay", "seed": "seed",
    "load_in_4bit": "load_in_4bit", "load_in_8bit": "load_in_8bit", "sample_packing": "packing",
}  # fmt: skip


FACTORY = {
    "lora_rank": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "learning_rate": "learning_rate",
    "num_train_epochs": "num_train_epochs", "max_steps": "max_steps", "cutoff_len": "max_length", "seed": "seed",
    "per_device_train_batch_size": "per_device_train_batch_size", "weight_decay": "weight_decay", "packing": "packing",
    "gradient_accumulation_steps": "gradient_accumulation_steps", "lr_scheduler_type": "lr_scheduler_type",
}  # fmt: skip


def translated(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: given[theirs] for theirs, ours in names.items() if given.get(theirs) is not None}


def entries(datasets: Any) -> dict[str, dict[str, Any]]:
    """Candidates of a list as TRL and axolotl have it: mappings with `path`, and `data_files` and the like."""
    found: dict[str, dict[str, Any]] = {}
    for one in datasets:
        if not isinstance(one, Mapping) or not one.get("path"):
            raise InputError(f"datasets: expected entries with a path, got {one!r}")
        source = {
            key: one[key] for key in ("path", "name", "data_dir", "data_files", "split", "revision") if one.get(key)
        }
        path = str(one["path"])
        if path not in BUILDERS and Path(path).suffix in SUFFIXES:
            source = {"path": one.get("ds_type") or SUFFIXES[Path(path).suffix], "data_files": path}
        files = source.get("data_files")
        first = files[0] if isinstance(files, list) else files
        name = base = named(str(first or source["path"]))[0]
        number = 1
        while name in found:
            number += 1
            name = f"{base}_{number}"
        found[name] = source
    return found


def from_trl(given: Mapping[str, Any], folder: Path) -> Draft:
    if "datasets" in given:
        candidates = entries(given["datasets"])
    else:
        candidates = entries([{"path": given["dataset_name"], "name": given.get("dataset_config")}])
    apart = {"datasets", "dataset_name", "dataset_config", "model_name_or_path", "use_peft"}
    dropped = {
        "output_dir", "eval_strategy", "eval_steps", "test_split_size", "streaming", "push_to_hub", "hub_model_id", "env",
        "dataset_train_split", "dataset_test_split",
    }  # fmt: skip
    settings = {"lora_r": 16, "lora_alpha": 32, "learning_rate": 2.0e-5, "num_train_epochs": 3}  # TRL's defaults
    settings |= {key: value for key, value in given.items() if key not in apart | dropped}
    return Draft(
        str(given.get("model_name_or_path") or ""), candidates, None, "", settings, sorted(dropped & set(given))
    )


def from_axolotl(given: Mapping[str, Any], folder: Path) -> Draft:
    read = ("path", "name", "data_dir", "data_files", "split", "revision", "ds_type")
    unread = {f"datasets.{key}" for one in given.get("datasets") or [] for key in one if key not in read}
    known = {*AXOLOTL, "base_model", "datasets", "adapter"}
    return Draft(
        str(given["base_model"]), entries(given.get("datasets") or []), None, "", translated(given, AXOLOTL),
        sorted((set(given) - known) | unread),
    )  # fmt: skip


def from_llamafactory(given: Mapping[str, Any], folder: Path) -> Draft:
    place = folder / str(given.get("dataset_dir") or "data")
    if not (place / "dataset_info.json").exists():  # its own examples name it from where it is started
        place = Path(str(given.get("dataset_dir") or "data")).absolute()
    try:
        info = json.loads((place / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"dataset_dir: expected {place / 'dataset_info.json'} ({error})") from error
    candidates = {}
    lost: list[str] = []
    names = given.get("dataset") or []
    for name in [one.strip() for one in names.split(",")] if isinstance(names, str) else names:
        about = info.get(name)
        if not isinstance(about, Mapping):
            raise InputError(f"dataset: {name!r} is not in {place / 'dataset_info.json'}; it has {', '.join(info)}")
        local = about.get("file_name")
        source = named(str(place / local))[1] if local else {"path": about.get("hf_hub_url") or name}
        columns = about.get("columns") or {}
        renames = {columns.get("prompt", "instruction"): "prompt", columns.get("response", "output"): "completion"}
        if about.get("formatting") in ("sharegpt", "openai"):
            renames = {columns.get("messages", "conversations"): "messages"}
        for theirs, ours in (("subset", "name"), ("split", "split"), ("num_samples", "max_examples")):
            if about.get(theirs):
                source[ours] = about[theirs]
        kept = {"prompt", "response", "messages"}
        lost += [f"{name}.columns.{one}" for one in columns if one not in kept]
        lost += [f"{name}.{one}" for one in about if one in ("folder", "tags", "ranking")]
        source["columns"] = {theirs: ours for theirs, ours in renames.items() if theirs != ours}
        candidates[named(name)[0]] = {key: value for key, value in source.items() if value}
    settings = {"lora_r": 8, "learning_rate": 5.0e-5, "num_train_epochs": 3.0} | translated(
        given, FACTORY
    )  # its defaults
    settings.setdefault("lora_alpha", 2 * settings["lora_r"])
    targets = given.get("lora_target")
    if isinstance(targets, str) and targets != "all":
        settings["lora_target_modules"] = [one.strip() for one in targets.split(",")]
    elif targets:
        settings["lora_target_modules"] = "all-linear"
    known = {
        *FACTORY,
        "model_name_or_path",
        "dataset",
        "dataset_dir",
        "lora_target",
        "stage",
        "do_train",
        "finetuning_type",
    }
    return Draft(str(given["model_name_or_path"]), candidates, None, "", settings, [*sorted(set(given) - known), *lost])


def read_other(path: Path) -> Draft:
    """The draft of a configuration that was written for TRL, axolotl or LLaMA-Factory.

    Raises:
        InputError: it is none of them.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"--from {path}: cannot be read ({error})") from error
    if isinstance(given, Mapping):
        if "base_model" in given:
            return from_axolotl(given, path.parent)
        if "model_name_or_path" in given and "dataset" in given:
            return from_llamafactory(given, path.parent)
        if "datasets" in given or "dataset_name" in given:
            return from_trl(given, path.parent)
    raise InputError(
        f"--from {path}: expected a configuration of TRL (datasets:), axolotl (base_model:) or LLaMA-Factory (dataset:)"
    )
