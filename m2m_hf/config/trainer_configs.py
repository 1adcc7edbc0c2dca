"""Configurations of TRL, axolotl and LLaMA-Factory, read as drafts of ours."""

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
DATA_KEYS = ("path", "name", "data_dir", "data_files", "split", "revision")
SAME = {
    name: name
    for name in (
        "lora_alpha", "lora_dropout", "learning_rate", "max_steps", "gradient_accumulation_steps", "weight_decay", "seed",
    )
}  # fmt: skip
AXOLOTL = SAME | {
    "lora_r": "lora_r", "lora_target_modules": "lora_target_modules", "num_epochs": "num_train_epochs",
    "micro_batch_size": "per_device_train_batch_size", "sequence_len": "max_length", "lr_scheduler": "lr_scheduler_type",
    "load_in_4bit": "load_in_4bit", "load_in_8bit": "load_in_8bit", "sample_packing": "packing",
}  # fmt: skip
FACTORY = SAME | {
    "lora_rank": "lora_r", "num_train_epochs": "num_train_epochs", "cutoff_len": "max_length", "packing": "packing",
    "per_device_train_batch_size": "per_device_train_batch_size", "lr_scheduler_type": "lr_scheduler_type",
}  # fmt: skip
TRL_DEFAULTS = {"lora_r": 16, "lora_alpha": 32, "learning_rate": 2.0e-5, "num_train_epochs": 3}
FACTORY_DEFAULTS = {"lora_r": 8, "learning_rate": 5.0e-5, "num_train_epochs": 3.0}
TRL_REPLACED = {"datasets", "dataset_name", "dataset_config", "model_name_or_path", "use_peft"}
TRL_LOST = {
    "output_dir", "eval_strategy", "eval_steps", "test_split_size", "streaming", "push_to_hub", "hub_model_id", "env",
    "dataset_train_split", "dataset_test_split",
}  # fmt: skip
FACTORY_REPLACED = {
    "model_name_or_path", "dataset", "dataset_dir", "lora_target", "stage", "do_train", "finetuning_type",
}  # fmt: skip

Source = dict[str, Any]  # what load_dataset takes


@dataclass
class Draft:
    """A configuration in the making.

    Args:
        model: a Hub id or a local folder.
        candidates: name -> what load_dataset takes.
        target: name and what load_dataset takes.
        scorer: how the target is scored.
        settings: fields of TRL's configurations.
        lost: fields of the other trainer's configuration that have no counterpart.
        task: a classification's task; None for a language model.
    """

    model: str = ""
    candidates: dict[str, Source] = field(default_factory=dict)
    target: tuple[str, Source] | None = None
    scorer: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    task: str | None = None


def parse_source(text: str) -> tuple[str, Source]:
    """(name, what load_dataset takes) of `name=place` or `place`: a file, a folder, or a Hub id."""
    name, _, place = text.rpartition("=")
    builder = SUFFIXES.get(Path(place).suffix.lower())
    if not name:
        stem = Path(place).stem if builder else place.rsplit("/", 1)[-1]
        name = re.sub(r"[^A-Za-z0-9_-]", "_", stem).strip("_-") or "data"
    return name[:64], {"path": builder, "data_files": place} if builder else {"path": place}


def read_trainer_config(path: Path) -> Draft:
    """Reads a configuration that was written for TRL, axolotl or LLaMA-Factory.

    Raises:
        InputError: it is none of them.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"--from {path}: cannot be read ({error})") from error
    if isinstance(config, Mapping):
        if "base_model" in config:
            return from_axolotl(config)
        if "model_name_or_path" in config and "dataset" in config:
            return from_llamafactory(config, path.parent)
        if "datasets" in config or "dataset_name" in config:
            return from_trl(config)
    raise InputError(
        f"--from {path}: expected a configuration of TRL (datasets:), axolotl (base_model:) or LLaMA-Factory (dataset:)"
    )


def from_trl(config: Mapping[str, Any]) -> Draft:
    datasets = config.get("datasets") or [{"path": config.get("dataset_name"), "name": config.get("dataset_config")}]
    settings = {key: value for key, value in config.items() if key not in TRL_REPLACED | TRL_LOST}
    return Draft(
        model=str(config.get("model_name_or_path") or ""),
        candidates=read_datasets(datasets),
        settings=TRL_DEFAULTS | settings,
        lost=sorted(TRL_LOST & set(config)),
    )


def from_axolotl(config: Mapping[str, Any]) -> Draft:
    datasets = config.get("datasets") or []
    candidates = read_datasets(datasets)
    lost = {f"datasets.{key}" for entry in datasets for key in entry if key not in (*DATA_KEYS, "ds_type")}
    return Draft(
        model=str(config["base_model"]),
        candidates=candidates,
        settings=translate(config, AXOLOTL),
        lost=sorted(lost | set(config) - {*AXOLOTL, "base_model", "datasets", "adapter"}),
    )


def from_llamafactory(config: Mapping[str, Any], folder: Path) -> Draft:
    index, info = read_dataset_info(config, folder)
    names = config.get("dataset") or []
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    candidates: dict[str, Source] = {}
    lost = sorted(set(config) - {*FACTORY, *FACTORY_REPLACED})
    for name in names:
        entry = info.get(name)
        if not isinstance(entry, Mapping):
            raise InputError(f"dataset: {name!r} is not in {index}; it has {', '.join(info)}")
        candidates[parse_source(name)[0]] = read_dataset_entry(name, entry, index.parent)
        columns = entry.get("columns") or {}
        lost += [f"{name}.columns.{key}" for key in columns if key not in ("prompt", "response", "messages")]
        lost += [f"{name}.{key}" for key in entry if key in ("folder", "tags", "ranking")]
    settings = FACTORY_DEFAULTS | translate(config, FACTORY)
    settings.setdefault("lora_alpha", 2 * settings["lora_r"])
    modules = config.get("lora_target")
    if isinstance(modules, str) and modules != "all":
        settings["lora_target_modules"] = [module.strip() for module in modules.split(",")]
    elif modules:
        settings["lora_target_modules"] = "all-linear"
    return Draft(model=str(config["model_name_or_path"]), candidates=candidates, settings=settings, lost=lost)


def translate(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}


def read_datasets(datasets: Any) -> dict[str, Source]:
    """Candidates from a list of TRL or axolotl: mappings with `path`, and `data_files` and the like."""
    candidates: dict[str, Source] = {}
    for entry in datasets:
        if not isinstance(entry, Mapping) or not entry.get("path"):
            raise InputError(f"datasets: expected entries with a path, got {entry!r}")
        source = {key: entry[key] for key in DATA_KEYS if entry.get(key)}
        path = str(entry["path"])
        if path not in BUILDERS and Path(path).suffix in SUFFIXES:
            source = {"path": entry.get("ds_type") or SUFFIXES[Path(path).suffix], "data_files": path}
        files = source.get("data_files") or path
        base = parse_source(str(files[0] if isinstance(files, list) else files))[0]
        number = 2
        name = base
        while name in candidates:
            name, number = f"{base}_{number}", number + 1
        candidates[name] = source
    return candidates


def read_dataset_info(config: Mapping[str, Any], folder: Path) -> tuple[Path, Any]:
    """LLaMA-Factory's `dataset_info.json`, its path and content; its own examples name it from where it is started."""
    name = str(config.get("dataset_dir") or "data")
    index = folder / name / "dataset_info.json"
    if not index.exists():
        index = Path(name).absolute() / "dataset_info.json"
    try:
        return index, json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"dataset_dir: expected {index} ({error})") from error


def read_dataset_entry(name: str, entry: Mapping[str, Any], folder: Path) -> Source:
    """What load_dataset takes, from an entry of `dataset_info.json`."""
    file = entry.get("file_name")
    source = parse_source(str(folder / file))[1] if file else {"path": entry.get("hf_hub_url") or name}
    columns = entry.get("columns") or {}
    if entry.get("formatting") in ("sharegpt", "openai"):
        renames = {columns.get("messages", "conversations"): "messages"}
    else:
        renames = {columns.get("prompt", "instruction"): "prompt", columns.get("response", "output"): "completion"}
    source |= {
        "name": entry.get("subset"),
        "split": entry.get("split"),
        "max_examples": entry.get("num_samples"),
        "columns": {theirs: ours for theirs, ours in renames.items() if theirs != ours},
    }
    return {key: value for key, value in source.items() if value}
