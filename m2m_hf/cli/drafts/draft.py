"""A configuration in the making, and how rows of other trainers become ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2m_hf.cli.drafts.sources import Source, parse_source
from m2m_hf.config.checks import BUILDERS, SUFFIXES
from m2m_hf.errors import InputError

MESSAGE_NAMES = (("role", "content"), ("from", "value"))  # of messages, as rows may have them
DATA_KEYS = ("path", "name", "data_dir", "data_files", "split", "revision")
SAME = (
    "lora_alpha", "lora_dropout", "learning_rate", "max_steps", "gradient_accumulation_steps", "weight_decay", "seed",
    "max_grad_norm", "warmup_steps", "neftune_noise_alpha",
)  # fmt: skip
WHOLE = "full fine-tuning (here adapters; expert: full trains all parameters)"


@dataclass
class Draft:
    """A configuration in the making."""

    model: str = ""
    candidates: dict[str, Source] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # fields of TRL's configurations
    lost: list[str] = field(default_factory=list)  # fields of the other trainer that have no counterpart


def said(config: Mapping[str, Any]) -> set[str]:
    """The keys that say something."""
    return {key for key, value in config.items() if value not in (None, False)}


def translate(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}


def read_datasets(datasets: Any) -> dict[str, Source]:
    """Candidates from a list of TRL or axolotl: mappings with `path`, and `data_files` and the like."""
    candidates: dict[str, Source] = {}
    for entry in datasets:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
            raise InputError(f"datasets: expected entries with a path, got {entry!r}")
        source = {key: entry[key] for key in DATA_KEYS if entry.get(key)}
        path = str(entry["path"])
        if path not in BUILDERS and Path(path).suffix in SUFFIXES:
            source = {"path": entry.get("ds_type") or SUFFIXES[Path(path).suffix], "data_files": path}
        files = source.get("data_files") or path
        base = name = parse_source(str(files[0] if isinstance(files, list) else files))[0]
        number = 2
        while name in candidates:
            name, number = f"{base}_{number}", number + 1
        candidates[name] = source
    return candidates


def check_message_names(name: str, names: Mapping[str, str]) -> None:
    """Refuses messages that are neither of role and content nor of from and value."""
    role, content = names.get("role"), names.get("content")
    others = {key: value for key, value in names.items() if key not in ("role", "content") and key != value}
    if (role, content) not in MESSAGE_NAMES or others:
        raise InputError(
            f"dataset {name}: expected messages of role and content, or of from and value, got {dict(names)}; rename the fields "
            "in its rows, and give them with --data"
        )


def instructions(source: Source, asked: Sequence[str], answer: str, present: set[str], text: str = "") -> None:
    """Makes a prompt of the columns `asked`, or a template, and a completion of `answer`. `present`: all columns, if known."""
    asked = [column for column in asked if not present or column in present]
    if not asked:
        return
    text = text or "\n".join(f"{{{column}}}" for column in asked)
    if text == f"{{{asked[0]}}}":
        renamed(source, {asked[0]: "prompt"})
    else:
        source |= {"template": {"prompt": text}, "columns": {"null": ""}}  # an input may be missing
    renamed(source, {answer: "completion"})


def whole_text(source: Source, column: str) -> None:
    """Trains on all of a text, without a prompt."""
    source["template"] = {"prompt": ""}
    renamed(source, {column: "completion"})


def renamed(source: Source, names: Mapping[str, str]) -> None:
    """Adds to `columns` what is called otherwise."""
    if changed := {theirs: ours for theirs, ours in names.items() if theirs != ours}:
        source["columns"] = source.get("columns", {}) | changed


def earlier_answers(name: str) -> str:
    """What others train on, and TRL only with a field."""
    return f"the earlier answers of conversations in {name} (assistant_only_loss: true trains on all)"
