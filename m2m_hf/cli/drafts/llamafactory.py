"""A configuration of LLaMA-Factory as a draft."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2m_hf.cli.drafts.draft import (
    SAME,
    WHOLE,
    Draft,
    check_message_names,
    earlier_answers,
    instructions,
    renamed,
    said,
    translate,
    whole_text,
)
from m2m_hf.cli.drafts.sources import Source, parse_source, read_columns
from m2m_hf.errors import InputError

FACTORY = dict(zip(SAME, SAME, strict=True)) | {
    "lora_rank": "lora_r", "num_train_epochs": "num_train_epochs", "cutoff_len": "max_length", "packing": "packing",
    "per_device_train_batch_size": "per_device_train_batch_size", "lr_scheduler_type": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps", "use_rslora": "use_rslora", "optim": "optim",
}  # fmt: skip
FACTORY_DEFAULTS = {"lora_r": 8, "learning_rate": 5.0e-5, "num_train_epochs": 3.0}
FACTORY_REPLACED = {
    "model_name_or_path", "dataset", "dataset_dir", "lora_target", "stage", "do_train", "finetuning_type",
}  # fmt: skip
CONVERSATIONS = ("sharegpt", "openai")  # formats of LLaMA-Factory
FACTORY_COLUMNS = ("prompt", "query", "response", "system", "messages", "tools")


def from_llamafactory(config: Mapping[str, Any], folder: Path) -> Draft:
    settings = FACTORY_DEFAULTS | translate(config, FACTORY)
    settings.setdefault("lora_alpha", 2 * settings["lora_r"])
    modules = config.get("lora_target")
    if isinstance(modules, str) and modules != "all":
        settings["lora_target_modules"] = [module.strip() for module in modules.split(",")]
    elif modules:
        settings["lora_target_modules"] = "all-linear"
    draft = Draft(str(config["model_name_or_path"]), settings=settings)
    draft.lost = sorted(said(config) - {*FACTORY, *FACTORY_REPLACED})
    draft.lost += [] if config.get("finetuning_type", "lora") == "lora" else [WHOLE]
    stage = config.get("stage") or "sft"
    draft.lost += [] if stage in ("sft", "pt") else [f"stage: {stage}"]
    index, info = read_dataset_info(str(config.get("dataset_dir") or "data"), folder)
    names = config.get("dataset") or []
    for name in [name.strip() for name in names.split(",")] if isinstance(names, str) else names:
        entry = info.get(name)
        if not isinstance(entry, Mapping):
            raise InputError(f"dataset: {name!r} is not in {index}; it has {', '.join(info)}")
        draft.candidates[parse_source(name)[0]] = read_dataset_entry(name, entry, index.parent, stage)
        columns = entry.get("columns") or {}
        draft.lost += [f"{name}.columns.{key}" for key in columns if key not in FACTORY_COLUMNS]
        draft.lost += [f"{name}.{key}" for key in entry if key in ("folder", "ranking")]
        draft.lost += [earlier_answers(name)] if entry.get("formatting") in CONVERSATIONS else []
    return draft


def read_dataset_info(name: str, folder: Path) -> tuple[Path, Any]:
    """LLaMA-Factory's `dataset_info.json`, its path and content; its own examples name it from where it is started."""
    index = folder / name / "dataset_info.json"
    if not index.exists():
        index = Path(name).absolute() / "dataset_info.json"
    try:
        return index, json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"dataset_dir: expected {index} ({error})") from error


def read_dataset_entry(name: str, entry: Mapping[str, Any], folder: Path, stage: str) -> Source:
    """What load_dataset takes, from an entry of `dataset_info.json`."""
    file = entry.get("file_name")
    if not file and not entry.get("hf_hub_url"):
        raise InputError(
            f"dataset {name}: expected file_name or hf_hub_url, got {', '.join(entry) or 'nothing'}; fetch its rows, and give "
            "them with --data"
        )
    source = parse_source(str(folder / file))[1] if file else {"path": entry["hf_hub_url"]}
    columns = entry.get("columns") or {}
    conversations = entry.get("formatting") in CONVERSATIONS
    for key in ("history", *(["system"] if conversations else ["tools"])):
        if columns.get(key):
            raise InputError(
                f"dataset {name}: its {key}, the column {columns[key]!r}, belongs into a conversation; expected rows of "
                "messages. Put it there, and give the new rows with --data"
            )
    source |= {"name": entry.get("subset"), "split": entry.get("split"), "max_examples": entry.get("num_samples")}
    if stage == "pt":
        whole_text(source, columns.get("prompt", "text"))
    elif conversations:
        check_tags(name, entry.get("tags") or {})
        renamed(source, {columns.get("messages", "conversations"): "messages", columns.get("tools", "tools"): "tools"})
    else:
        query = columns.get("query") if columns else "input"
        asked = [columns.get("system"), columns.get("prompt", "instruction"), query]
        names = [column for column in asked if column]
        instructions(source, names, columns.get("response", "output"), read_columns(source))
    return {key: value for key, value in source.items() if value}


def check_tags(name: str, tags: Mapping[str, str]) -> None:
    """Refuses tags that are neither those of ShareGPT nor those of OpenAI."""
    names = {"role": tags.get("role_tag", "from"), "content": tags.get("content_tag", "value")}
    check_message_names(name, names)
    roles = {
        "user": "user",
        "assistant": "assistant",
        "system": "system",
        "observation": "tool",
        "function": "assistant",
    }
    from m2m_hf.data.conversations import ROLES  # slow to import

    for key, role in roles.items():
        tag = tags.get(f"{key}_tag", role)
        if tag != role and (names["role"] == "role" or ROLES.get(tag) != role):
            raise InputError(f"dataset {name}: expected {key}_tag: {role}, got {tag!r}; rename it in its rows")
