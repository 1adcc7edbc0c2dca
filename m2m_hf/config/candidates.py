"""The entries of `candidates:`: where rows come from and what they are called."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from m2m_hf.config import checks
from m2m_hf.config.yaml_files import plain
from m2m_hf.errors import InputError, holds_secret

PATH = "json, csv, parquet, a Hub id or a folder of save_to_disk"


@dataclass(frozen=True)
class DataConfig:
    """What `load_dataset` takes, and how its rows become ours.

    Args:
        path: a builder (`json`, `csv`, `parquet`, `text`), a Hub id, or a folder written by `save_to_disk`.
        name: the Hub dataset's configuration.
        data_dir: folder of files, for a builder.
        data_files: file or files, for a builder; relative ones are relative to the YAML file.
        split: default `train`.
        revision: commit, tag or branch of a Hub dataset.
        columns: renames, `{theirs: ours}`, for datasets whose columns are not called prompt/completion or messages.
        template: `{prompt: "...{column}...", completion: "...{column}..."}`, texts made of columns, for datasets without a
            prompt.
        where: `{column: value}`, only the rows that have this value there (before columns are renamed).
        max_examples: at most this many rows, drawn with the run's seed.
        rows: a `datasets.Dataset` already in memory, instead of a path (Python only).
    """

    path: str | None = None
    name: str | None = None
    data_dir: str | None = None
    data_files: str | tuple[str, ...] | None = None
    split: str = "train"
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    template: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    max_examples: int | None = None
    rows: Any = None

    @classmethod
    def parse(cls, entry: Any, where: str, folder: Path) -> "DataConfig":
        """Reads one mapping of the YAML; relative paths are resolved against `folder`.

        Raises:
            InputError: an unknown or missing key, a wrong value, or credentials in an address.
        """
        if not isinstance(entry, Mapping):
            if hasattr(entry, "column_names"):
                return cls(rows=entry)
            raise InputError(
                f"{where}: expected what load_dataset takes, such as {{path: json, data_files: file.jsonl}}, "
                f"got {entry!r}"
            )
        values = checks.read_entry(entry, DATA_RULES, where)
        path, files = values.get("path"), values.get("data_files", ())
        files = (files,) if isinstance(files, str) else tuple(files)
        if path is None:
            raise InputError(f"{where}.path is missing: give {PATH}")
        if path in checks.BUILDERS and not files and "data_dir" not in values:
            raise InputError(f"{where}.data_files is missing: give the file or files that {path} reads")
        if any(map(holds_secret, (path, *files))):
            raise InputError(
                f"{where}: do not put credentials in files; use `hf auth login` or an environment variable"
            )
        # Files beside a Hub id or in a folder are relative to it; datasets resolves those.
        if path in checks.BUILDERS:
            files = tuple(file if "://" in file else checks.absolute(file, folder) for file in files)
            if "data_dir" in values:
                values["data_dir"] = checks.absolute(values["data_dir"], folder)
        return cls(**values | {"path": checks.resolve_existing(path, folder), "data_files": files or None})

    def to_json(self) -> dict[str, Any]:
        """The mapping that `parse` reads, with paths resolved; rows in memory are only counted."""
        if self.rows is not None:
            return {"in_memory_rows": len(self.rows)}
        return {key: plain(value) for key in DATA_RULES if (value := getattr(self, key)) not in (None, {})}


def is_scalar_mapping(value: Any) -> bool:
    return checks.is_mapping(value) and all(
        isinstance(key, str) and isinstance(item, (str, int, float, type(None))) for key, item in value.items()
    )


DATA_RULES: dict[str, checks.Rule] = {
    "path": checks.Rule(PATH, checks.is_text),
    "name": checks.Rule("the name of the dataset's configuration", checks.is_text),
    "data_dir": checks.Rule("a folder", checks.is_text),
    "data_files": checks.Rule(
        "a file or a list of files",
        lambda value: checks.is_text(value) or checks.is_texts(value),
    ),
    "split": checks.Rule("the name of a split", checks.is_text),
    "revision": checks.Rule("a commit, tag or branch", checks.is_text),
    "columns": checks.Rule("{theirs: ours}, both text", checks.is_text_mapping),
    "template": checks.Rule(
        "texts for prompt and completion",
        lambda value: (
            checks.is_mapping(value)
            and all(key in ("prompt", "completion") and isinstance(item, str) for key, item in value.items())
        ),
    ),
    "where": checks.Rule("{column: value}", is_scalar_mapping),
    "max_examples": checks.integer(1),
}


@dataclass(frozen=True)
class CandidateConfig:
    """A dataset that may enter the mixture.

    Args:
        data: where its rows come from.
        required: every proposed mixture contains it.
        excluded: no proposed mixture contains it; its expert is trained and shown all the same.
        cost: what choosing it costs, in any unit, to break ties (default: its tokens).
        license: recorded with the chosen mixture.
        split_by: a column; every value in it makes a candidate of its own, called `<name>-<value>`.
        labels: in classification, other names for its labels, `{theirs: ours}`; labels that are not named stay.
        training: fields of SFTConfig or ModelConfig for its expert alone, with `allow_mixed_training`. Experts that were
            trained differently no longer stand for one model trained on all; this measures what that costs.
    """

    data: DataConfig
    required: bool = False
    excluded: bool = False
    cost: float | None = None
    license: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    split_by: str | None = None
    labels: Mapping[str, str] | None = None

    @classmethod
    def parse(cls, entry: Any, where: str, folder: Path) -> "CandidateConfig":
        """Reads `{path: ..., required: ..., ...}`: the keys of `DataConfig` and of this class on one level."""
        if not isinstance(entry, Mapping):
            return cls(DataConfig.parse(entry, where, folder))
        values = checks.read_entry(entry, DATA_RULES | CANDIDATE_RULES, where)
        own = {key: values.pop(key) for key in CANDIDATE_RULES if key in values}
        if own.get("required") and own.get("excluded"):
            raise InputError(f"{where}: it is both required and excluded")
        own["labels"] = checks.names_of_labels(own.get("labels"))
        return cls(DataConfig.parse(values, where, folder), **own)

    def to_json(self) -> dict[str, Any]:
        """The mapping that `parse` reads, without defaults."""
        return self.data.to_json() | {
            key: plain(value) for key, value in changed_fields(self).items() if key in CANDIDATE_RULES
        }


CANDIDATE_RULES: dict[str, checks.Rule] = {
    "required": checks.BOOLEAN,
    "excluded": checks.BOOLEAN,
    "cost": checks.number(0),
    "license": checks.Rule("the name of a license", checks.is_text),
    "training": checks.Rule("fields of SFTConfig or ModelConfig", checks.is_mapping),
    "split_by": checks.Rule("the name of a column", checks.is_text),
    "labels": checks.Rule("{theirs: ours}", checks.is_mapping),
}


def changed_fields(entry: Any) -> dict[str, Any]:
    """The fields of a dataclass that are neither empty nor at their default."""
    values = {item.name: (getattr(entry, item.name), item.default) for item in fields(entry)}
    return {key: value for key, (value, default) in values.items() if value not in (None, "", (), {}, default)}
