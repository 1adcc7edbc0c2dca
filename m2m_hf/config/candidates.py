"""The entries of `candidates:`: where rows come from and what they are called."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

from m2m_hf.config import checks
from m2m_hf.config.checks import BUILDERS, Rule, absolute, mapping, option, text
from m2m_hf.config.yaml_files import plain
from m2m_hf.errors import InputError, holds_secret

PATH = "json, csv, parquet, a Hub id or a folder of save_to_disk"
FILES = Rule("a file or a list of files", lambda value: checks.is_text(value) or checks.is_texts(value))
RENAMED = Rule("{theirs: ours}", lambda value: isinstance(value, Mapping) and not checks.unquoted(value))
TEXT = mapping("texts", str, str)
TEMPLATE = Rule(
    "texts for prompt, completion and answer, and for choices [text, ...] or {label: text}",
    lambda value: (
        isinstance(value, Mapping)
        and {*value} <= {"prompt", "completion", "choices", "answer"}
        and all(
            checks.is_texts(text) or TEXT.accepts(text) if name == "choices" else isinstance(text, str)
            for name, text in value.items()
        )
    ),
)
WITHOUT = mapping("{without: value}", str, str | int | float | list | tuple)


@dataclass(frozen=True)
class DataConfig:
    """What `load_dataset` takes, and how its rows become ours."""

    path: str | None = option(text(PATH))
    name: str | None = option(text("the name of the dataset's configuration"))
    data_dir: str | None = option(text("a folder"))
    data_files: str | tuple[str, ...] | None = option(FILES)  # for a builder relative to the YAML file
    field: str | None = option(text("the key of the list of rows in a JSON file"))
    split: str = option(text("the name of a split"), "train")
    revision: str | None = option(text("a commit, tag or branch"))
    # Renames, for datasets whose columns are not called prompt/completion or messages.
    columns: Mapping[str, str] = option(mapping("{theirs: ours}, both text", str, str), dict)
    # Texts made of columns, such as {prompt: "...{column}..."}, for datasets without a prompt; {column[key]} and {column[0]}
    # are what a mapping or a list holds there.
    template: Mapping[str, Any] = option(TEMPLATE, dict)
    # Only the rows that have this value there, before columns are renamed; {without: value}: that do not hold it there, or
    # none of a list.
    where: Mapping[str, Any] = option(
        Rule(
            "{column: value} or {column: {without: value}}",
            lambda value: (
                mapping("", str).accepts(value)
                and all(
                    isinstance(one, str | int | float | NoneType) or (WITHOUT.accepts(one) and {*one} == {"without"})
                    for one in value.values()
                )
            ),
        ),
        dict,
    )
    max_examples: int | None = option(checks.integer(1))  # drawn with the run's seed
    null: str | None = (
        None  # what stands for a null in a prompt, as `columns` or `template` say; None refuses such rows
    )
    rows: Any = None  # a `datasets.Dataset` already in memory, instead of a path (Python only)

    @classmethod
    def parse(cls, entry: Any, where: str, folder: Path) -> "DataConfig":
        """Reads one mapping of the YAML; relative paths are resolved against `folder`."""
        if not isinstance(entry, Mapping):
            if hasattr(entry, "column_names"):
                return cls(rows=entry)
            raise InputError(
                f"{where}: expected what load_dataset takes, such as {{path: json, data_files: file.jsonl}}, "
                f"got {entry!r}"
            )
        entry, null = without_null(entry, where)
        values = checks.read_entry(entry, checks.rules(cls), where) | {"null": null}
        path, files = values.get("path"), values.get("data_files", ())
        files = (files,) if isinstance(files, str) else tuple(files)
        if path is None:
            raise InputError(f"{where}.path is missing: give {PATH}")
        if path in BUILDERS and not files and "data_dir" not in values:
            raise InputError(f"{where}.data_files is missing: give the file or files that {path} reads")
        if "field" in values and path != "json":
            raise InputError(f"{where}.field: belongs to path: json, not to {path}")
        if any(map(holds_secret, (path, *files))):
            raise InputError(
                f"{where}: do not put credentials in files; use `hf auth login` or an environment variable"
            )
        # Files beside a Hub id or in a folder are relative to it; datasets resolves those.
        if path in BUILDERS:
            files = tuple(file if "://" in file else absolute(file, folder) for file in files)
            if "data_dir" in values:
                values["data_dir"] = absolute(values["data_dir"], folder)
        return cls(**values | {"path": checks.resolve_existing(path, folder), "data_files": files or None})

    def to_json(self) -> dict[str, Any]:
        """The mapping that `parse` reads, with paths resolved; rows in memory are only counted."""
        if self.rows is not None:
            return {"in_memory_rows": len(self.rows)}
        values = {key: getattr(self, key) for key in checks.rules(DataConfig)}
        if self.null is not None:
            key = "template" if self.template else "columns"
            values[key] = {**values[key], "null": self.null}
        return {key: plain(value) for key, value in values.items() if value not in (None, {})}


def without_null(entry: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str | None]:
    """An entry without the key `null` of `columns` and `template`, and what it says: the text that stands for a null."""
    entry, null = dict(entry), None
    for name in ("columns", "template"):
        if isinstance(entry.get(name), Mapping):
            values = {"null" if key is None else key: value for key, value in entry[name].items()}
            if "null" in values:
                null = values.pop("null")
                checks.check_fields(
                    {"null": null}, {"null": Rule("a text", lambda value: isinstance(value, str))}, f"{where}.{name}"
                )
            entry[name] = values
    return entry, null


@dataclass(frozen=True)
class CandidateConfig:
    """A dataset that may enter the mixture."""

    data: DataConfig
    required: bool = option(checks.BOOLEAN, False)  # every proposed mixture contains it
    excluded: bool = option(checks.BOOLEAN, False)  # none does; its expert is trained and shown all the same
    cost: float | None = option(checks.number(0))  # of choosing it, in any unit (default: its tokens)
    license: str | None = option(text("the name of a license"))
    # With `allow_mixed_training`, for its expert alone. Experts that were trained differently no longer stand for one
    # model trained on all; this measures what that costs.
    training: Mapping[str, Any] = option(mapping("fields of SFTConfig or ModelConfig"), dict)
    split_by: str | None = option(text("the name of a column"))  # each of its values becomes a candidate <name>-<value>
    labels: Mapping[str, str] | None = option(RENAMED)  # labels that are not named stay

    @classmethod
    def parse(cls, entry: Any, where: str, folder: Path) -> "CandidateConfig":
        """Reads `{path: ..., required: ..., ...}`: the keys of `DataConfig` and of this class on one level."""
        if not isinstance(entry, Mapping):
            return cls(DataConfig.parse(entry, where, folder))
        values = checks.read_entry(without_null(entry, where)[0], checks.rules(DataConfig) | checks.rules(cls), where)
        own = {key: value for key, value in values.items() if key in checks.rules(cls)}
        if own.get("required") and own.get("excluded"):
            raise InputError(f"{where}: it is both required and excluded")
        own["labels"] = checks.names_of_labels(own.get("labels"))
        data = {key: value for key, value in entry.items() if key not in checks.rules(cls)}
        return cls(DataConfig.parse(data, where, folder), **own)

    def to_json(self) -> dict[str, Any]:
        """The mapping that `parse` reads, without defaults."""
        return self.data.to_json() | changed_options(self)


def changed_options(entry: Any) -> dict[str, Any]:
    """The options of an entry that are neither empty nor at their default."""
    values = {item.name: (getattr(entry, item.name), item.default) for item in fields(entry) if item.metadata}
    return {key: plain(value) for key, (value, default) in values.items() if value not in (None, "", (), {}, default)}
