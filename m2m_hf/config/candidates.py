"""The entries of `candidates:`: where rows come from and what they are called."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from m2m_hf.config.checks import BUILDERS, absolute, names_of_labels, resolve_existing, unknown_key_message
from m2m_hf.errors import InputError, holds_secret


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
    def parse(cls, given: Any, where: str, folder: Path) -> "DataConfig":
        """Reads one mapping of the YAML; relative paths are resolved against `folder`.

        Raises:
            InputError: unknown keys, wrong types.
        """
        if not isinstance(given, Mapping):
            if hasattr(given, "column_names"):
                return cls(rows=given)
            raise InputError(
                f"{where}: expected what load_dataset takes, such as {{path: json, data_files: file.jsonl}}, "
                f"got {given!r}"
            )
        for key in given:
            if key not in DATA_KEYS:
                raise InputError(unknown_key_message(str(key), DATA_KEYS, where))
        types: dict[str, tuple[type, ...]] = {
            "max_examples": (int,),
            "data_files": (str, list, tuple),
            "columns": (Mapping,),
            "template": (Mapping,),
            "where": (Mapping,),
        }
        for key, value in given.items():
            expected = types.get(key, (str,))
            if value is not None and (not isinstance(value, expected) or isinstance(value, bool)):
                raise InputError(f"{where}.{key}: expected {expected[0].__name__}, got {value!r}")
        values = {key: value for key, value in given.items() if value is not None}
        if not values.get("path"):
            raise InputError(f"{where}.path is missing: give json, csv, parquet, a Hub id or a folder of save_to_disk")
        if values.get("max_examples", 1) < 1:
            raise InputError(f"{where}.max_examples: expected at least 1, got {values['max_examples']}")
        if values["path"] in BUILDERS and not values.get("data_files") and not values.get("data_dir"):
            raise InputError(f"{where}.data_files is missing: give the file or files that {values['path']} is to read")
        addresses = [values["path"], *([files] if isinstance(files := values.get("data_files", ()), str) else files)]
        if any(holds_secret(str(one)) for one in addresses):
            raise InputError(
                f"{where}: credentials must not stand in a file; use `hf auth login` or an environment variable"
            )
        values["path"] = resolve_existing(values["path"], folder)
        for column, value in values.get("where", {}).items():
            if not isinstance(column, str) or not (value is None or isinstance(value, (str, int, float))):
                raise InputError(f"{where}.where: expected {{column: value}}, got {{{column!r}: {value!r}}}")
        for theirs, ours in values.get("columns", {}).items():
            if not isinstance(theirs, str) or not isinstance(ours, str):
                raise InputError(f"{where}.columns: expected {{theirs: ours}}, both text, got {{{theirs!r}: {ours!r}}}")
        for key, text in values.get("template", {}).items():
            if key not in ("prompt", "completion") or not isinstance(text, str):
                raise InputError(
                    f"{where}.template: expected texts for prompt and completion, got {{{key!r}: {text!r}}}"
                )
        if "data_files" in values:
            files = values["data_files"]
            values["data_files"] = tuple([files] if isinstance(files, str) else files)
        # Beside a Hub id or a folder they are relative to it, which datasets resolves.
        if values["path"] in BUILDERS:
            if "data_dir" in values:
                values["data_dir"] = absolute(values["data_dir"], folder)
            if "data_files" in values:
                values["data_files"] = tuple(
                    file if "://" in file else absolute(file, folder) for file in values["data_files"]
                )
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The mapping that `parse` reads, with paths resolved; rows in memory are only counted."""
        if self.rows is not None:
            return {"in_memory_rows": len(self.rows)}
        given = {key: getattr(self, key) for key in DATA_KEYS if getattr(self, key) not in (None, {})}
        if "data_files" in given:
            given["data_files"] = list(given["data_files"])
        for key in ("columns", "template", "where"):
            if key in given:
                given[key] = dict(given[key])
        return given


DATA_KEYS = tuple(item.name for item in fields(DataConfig) if item.name != "rows")


@dataclass(frozen=True)
class CandidateConfig:
    """A dataset that may enter the mixture.

    Args:
        data: where its rows come from.
        required: every proposed mixture contains it.
        excluded: no proposed mixture contains it; its adapter is trained and shown all the same.
        cost: what choosing it costs, in any unit, to break ties (default: its tokens).
        license: recorded with the chosen mixture.
        split_by: a column; every value in it makes a candidate of its own, called `<name>-<value>`.
        labels: in classification, other names for its labels, `{theirs: ours}`; those that are not named keep theirs.
        training: fields of SFTConfig or ModelConfig for its adapter alone, with `allow_mixed_training`. Adapters that are
            trained otherwise no longer stand for one model trained on all; this is for measuring what that does.
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
    def parse(cls, given: Any, where: str, folder: Path) -> "CandidateConfig":
        """Reads `{path: ..., required: ..., ...}`: the keys of `DataConfig` and of this class on one level."""
        if not isinstance(given, Mapping):
            return cls(DataConfig.parse(given, where, folder))
        own: dict[str, tuple[type, ...]] = {
            "required": (bool,),
            "excluded": (bool,),
            "cost": (int, float),
            "license": (str,),
            "training": (Mapping,),
            "split_by": (str,),
            "labels": (Mapping,),
        }
        for key in given:
            if key not in (*DATA_KEYS, *own):
                raise InputError(unknown_key_message(str(key), (*DATA_KEYS, *own), where))
        for key, expected in own.items():
            value = given.get(key)
            if value is not None and (not isinstance(value, expected) or (key == "cost" and isinstance(value, bool))):
                raise InputError(
                    f"{where}.{key}: got {value!r}, expected {key}: {'true' if own[key] == (bool,) else '...'}"
                )
            if key == "cost" and isinstance(value, (int, float)) and not 0 <= value < math.inf:
                raise InputError(f"{where}.cost: expected a number, 0 or above, got {value!r}")
        if given.get("required") and given.get("excluded"):
            raise InputError(f"{where}: it is both required and excluded")
        data = DataConfig.parse({key: value for key, value in given.items() if key not in own}, where, folder)
        flags = bool(given.get("required")), bool(given.get("excluded"))
        training, by = dict(given.get("training") or {}), given.get("split_by")
        labels = names_of_labels(given.get("labels"))
        return cls(data, *flags, given.get("cost"), given.get("license"), training, by, labels)

    def to_json(self) -> dict[str, Any]:
        own = {
            "required": self.required or None,
            "excluded": self.excluded or None,
            "cost": self.cost,
            "license": self.license,
            "training": dict(self.training) or None,
            "split_by": self.split_by,
            "labels": None if self.labels is None else dict(self.labels),
        }
        return self.data.to_json() | {key: value for key, value in own.items() if value is not None}
