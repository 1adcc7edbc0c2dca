"""Rows as they are in files, on the Hub, or in memory."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from glob import glob
from itertools import chain, islice
from pathlib import Path
from string import Formatter
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, Value
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionResolutionError

from m2m_hf.config.candidates import CandidateConfig, DataConfig
from m2m_hf.config.checks import BUILDERS, check_name
from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.errors import InputError

MAX_FILES = 10_000  # in a folder that is given as a dataset
MAX_PARTS = 256  # of one dataset with `split_by`
CHECKED: set[tuple[str, int, int]] = (
    set()
)  # (path, time, size) of valid JSON files: every part of a split dataset asks again


def pin_data(config: MergeToMixConfig) -> None:
    """Puts the commit of every Hub dataset into `config`, so that manifest and recipe name what was really read.

    Raises:
        InputError: no such dataset or revision.
    """
    for name, candidate in config.parsed_candidates.items():
        config.parsed_candidates[name] = replace(candidate, data=pinned(candidate.data, f"candidates.{name}"))
    for name, target in config.parsed_targets.items():
        parts: dict[str, Any] = {
            part: data and pinned(data, f"targets.{name}.{part}")
            for part, data in (("data", target.data), ("test_data", target.test_data))
        }
        config.parsed_targets[name] = replace(target, **parts)


def pinned(data: DataConfig, where: str) -> DataConfig:
    """`data` with the commit of its revision, where it is on the Hub."""
    if data.path is None or data.path in BUILDERS or Path(data.path).exists():
        return data
    try:
        commit = HfApi().resolve_revision(data.path, repo_type="dataset", revision=data.revision)
    except (OSError, ValueError, RevisionResolutionError) as error:
        raise not_found(data, where, error) from error
    return replace(data, revision=commit.resolved)


def not_found(data: DataConfig, where: str, error: Exception) -> InputError:
    return InputError(
        f"{where}: {data.path!r} is neither a local folder nor a dataset that the Hub shows ({str(error)[:200]})"
    )


def split_candidates(config: MergeToMixConfig) -> MergeToMixConfig:
    """`config` with every candidate that has `split_by` replaced by one candidate for each value of that column.

    Raises:
        InputError: no such column, values without names of their own, or new candidates that break another rule.
    """
    if all(candidate.split_by is None for candidate in config.parsed_candidates.values()):
        return config
    parts: dict[str, CandidateConfig] = {}
    for name, candidate in config.parsed_candidates.items():
        if candidate.split_by is None:
            parts[name] = candidate
            continue
        where = f"candidates.{name}.split_by"
        for value, title in column_values(candidate.data, candidate.split_by, where):
            part = re.sub(r"[^A-Za-z0-9_]+", "_", title).strip("_")
            part = check_name(f"{name}-{part}"[:64].rstrip("_"), "candidate")
            if part in parts or (part in config.parsed_candidates and part != name):
                raise InputError(
                    f"{where}: {title!r} and another value or candidate are both called {part}; rename one of them"
                )
            data = replace(candidate.data, where={**candidate.data.where, candidate.split_by: value})
            parts[part] = replace(candidate, data=data, split_by=None)
    # A new configuration, so that all checks of candidates apply to the parts.
    sources = {name: part.to_json() if part.data.rows is None else part.data.rows for name, part in parts.items()}
    split = replace(config, candidates=sources)
    split.parsed_targets = config.parsed_targets  # these are pinned
    return split


def column_values(data: DataConfig, column: str, where: str) -> list[tuple[Any, str]]:
    """(value, its name) of all different values of a column.

    Raises:
        InputError: no such column, or one of another kind, or with too many values.
    """
    rows = load_raw(data, where.removesuffix(".split_by"))
    if column not in rows.column_names:
        raise InputError(f"{where}: no column {column!r}; it has {', '.join(rows.column_names)}")
    kind = rows.features[column]
    if not isinstance(kind, (Value, ClassLabel)):
        raise InputError(f"{where}: expected a column of texts or numbers, got {rows[0][column]!r:.100}")
    values = sorted(set(rows[column]), key=str)
    if len(values) > MAX_PARTS:
        raise InputError(
            f"{where}: {column!r} has {len(values):,} values; expected at most {MAX_PARTS}, one candidate each"
        )
    return [(value, value_name(kind, value)) for value in values]


def value_name(kind: Value | ClassLabel, value: Any) -> str:
    """What a value is called: `none` for a missing one, the name of a class, else its text."""
    if value is None or (isinstance(kind, ClassLabel) and value == -1):
        return "none"
    return str(kind.int2str(value) if isinstance(kind, ClassLabel) else value)


def load_rows(config: DataConfig, where: str, seed: int) -> Dataset:
    """The rows that `config` names: loaded, columns renamed, `max_examples` drawn with `seed`, templates filled.

    Raises:
        InputError: nothing found, not readable, no such split or column, or empty.
    """
    rows = load_raw(config, where)
    for theirs, ours in config.columns.items():
        if theirs not in rows.column_names:
            raise InputError(f"{where}.columns: no column {theirs!r}; it has {', '.join(rows.column_names)}")
        if ours in rows.column_names:
            raise InputError(f"{where}.columns: there is a column {ours!r} already; {theirs!r} cannot take its name")
        rows = rows.rename_column(theirs, ours)
    if len(rows) == 0:
        raise InputError(f"{where}: has no rows; expected at least one")
    if config.max_examples is not None and len(rows) > config.max_examples:
        rows = rows.shuffle(seed=seed).select(range(config.max_examples))
    if config.template:
        templates = config.template.items()
        rows = Dataset.from_list(
            [dict(row) | {key: fill(text, row, f"{where}.template") for key, text in templates} for row in rows]
        )
    return rows


def load_raw(config: DataConfig, where: str) -> Dataset:
    """The rows as they are stored, those that `where:` selects."""
    check_json(config, where)
    check_folder(config, where)
    try:
        rows = open_dataset(config)
    except FileNotFoundError as error:
        raise InputError(f"{where}: nothing found ({error}); relative paths are relative to the YAML file") from error
    except (DatasetNotFoundError, ConnectionError) as error:
        raise not_found(config, where, error) from error
    except StopIteration:  # what datasets raises where no file holds a row
        raise InputError(f"{where}: has no rows; expected at least one") from None
    except DatasetGenerationError as error:
        raise InputError(f"{where}: cannot be read as {config.path} ({error.__cause__ or error})") from error
    except KeyError as error:
        raise InputError(f"{where}: no split {config.split!r} in {config.path} ({error})") from error
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(f"{where}: {error}") from error
    for column, value in config.where.items():
        if column not in rows.column_names:
            raise InputError(f"{where}.where: no column {column!r}; it has {', '.join(rows.column_names)}")
        selected = [number for number, content in enumerate(rows[column]) if content == value]
        if not selected:
            raise InputError(f"{where}.where: no row has {value!r} in {column!r}")
        rows = rows.select(selected)
    return rows


def open_dataset(config: DataConfig) -> Dataset:
    """Rows in memory, of a saved dataset, or whatever `load_dataset` loads."""
    if config.rows is not None:
        return config.rows
    if config.path and (Path(config.path) / "state.json").exists():
        return datasets.load_from_disk(config.path)
    if config.path and (Path(config.path) / "dataset_dict.json").exists():
        return datasets.load_from_disk(config.path)[config.split]
    return datasets.load_dataset(
        config.path,
        name=config.name,
        data_dir=config.data_dir,
        data_files=list(config.data_files) if config.data_files else None,
        split=config.split,
        revision=config.revision,
    )


def check_folder(config: DataConfig, where: str) -> None:
    """Refuses a folder with very many files, which `datasets` would search for minutes."""
    if config.path and config.data_files is None and Path(config.path).is_dir():
        files = chain.from_iterable(names for _, _, names in os.walk(config.path))
        if sum(1 for _ in islice(files, MAX_FILES + 1)) > MAX_FILES:
            raise InputError(f"{where}: {config.path} holds more than {MAX_FILES:,} files; say which with data_files")


def check_json(config: DataConfig, where: str) -> None:
    """Parses local JSON files once, to name the invalid line. Arrow says little about it, or even crashes.

    Raises:
        InputError: with file and line.
    """
    files = [Path(path) for name in config.data_files or () if config.path == "json" for path in sorted(glob(name))]
    for path in files:
        if path.suffix not in (".json", ".jsonl", ".ndjson") or not path.is_file():
            continue  # compressed, which Arrow opens
        version = str(path.absolute()), path.stat().st_mtime_ns, path.stat().st_size
        if version not in CHECKED:
            check_json_file(path, f"{where}: {path}")
            CHECKED.add(version)


def check_json_file(path: Path, where: str) -> None:
    """Refuses a file that is neither a list of objects, nor one object, nor an object per line."""
    with open(path, "rb") as file:
        first = file.read(1 << 16).lstrip()[:1]
        file.seek(0)
        if first == b"[":
            wrong = next((row for row in parse_json(file.read(), where) if not isinstance(row, dict)), None)
            if wrong is not None:
                raise InputError(f"{where}: expected a list of objects, got {wrong!r:.100} in it")
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line, f"{where}, line {number}")
            except InputError:
                if number == 1 and is_one_object(path):
                    return
                raise
            if not isinstance(row, dict):
                raise InputError(
                    f'{where}, line {number}: expected an object such as {{"prompt": ...}}, got {row!r:.100}'
                )


def is_one_object(path: Path) -> bool:
    """True if a file is one JSON object over several lines."""
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False


def parse_json(content: bytes, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        InputError: invalid JSON, or invalid Unicode.
    """
    try:
        value = json.loads(content)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error})") from error
    return value


def fill(template: str, row: Mapping[str, Any], where: str) -> str:
    """`template` with every `{column}` replaced by the row's value.

    Raises:
        InputError: no such column, or more in the braces than its name.
    """
    try:
        parts = list(Formatter().parse(template))
        for _, column, style, conversion in parts:
            if column is not None and (column not in row or style or conversion):
                raise KeyError(column + (f"!{conversion}" if conversion else "") + (f":{style}" if style else ""))
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{where}: {template!r} cannot be filled ({error!r}); columns are {', '.join(row)}. Write {{{{ and }}}} for braces"
        ) from error
    return "".join(text + ("" if column is None else str(row[column])) for text, column, _, _ in parts)
