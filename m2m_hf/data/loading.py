"""Rows as they are in files, on the Hub, or in memory."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
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
SAVED = ("state.json", "dataset_dict.json")  # of `save_to_disk`, in the folder of a dataset or of several splits


def pin_data(config: MergeToMixConfig) -> None:
    """Puts the commit of every Hub dataset into `config`, so that manifest and recipe name what was really read."""
    for name, candidate in config.parsed_candidates.items():
        config.parsed_candidates[name] = replace(candidate, data=pinned(candidate.data, f"candidates.{name}"))
    for name, target in config.parsed_targets.items():
        parts: dict[str, Any] = {part: pinned(data, f"targets.{name}.{part}") for part, data in target.parts.items()}
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
    """`config` with every candidate that has `split_by` replaced by one candidate for each value of that column."""
    given = config.parsed_candidates
    if all(candidate.split_by is None for candidate in given.values()):
        return config
    parts: dict[str, CandidateConfig] = {}
    for name, candidate in given.items():
        if candidate.split_by is None:
            parts[name] = candidate
            continue
        for value, title in column_values(candidate.data, candidate.split_by, f"candidates.{name}"):
            part = re.sub(r"[^A-Za-z0-9_]+", "_", title).strip("_")
            part = check_name(f"{name}-{part}"[:64].rstrip("_"), "candidate")
            if part in parts or (part in given and part != name):
                raise InputError(
                    f"candidates.{name}.split_by: {title!r} and another value or candidate are both called {part}; rename one "
                    "of them"
                )
            data = replace(candidate.data, where={**candidate.data.where, candidate.split_by: value})
            parts[part] = replace(candidate, data=data, split_by=None)
    # A new configuration, so that all checks of candidates apply to the parts.
    sources = {name: part.to_json() if part.data.rows is None else part.data.rows for name, part in parts.items()}
    split = replace(config, candidates=sources)
    split.parsed_targets = config.parsed_targets  # these are pinned
    return split


def column_values(data: DataConfig, column: str, where: str) -> list[tuple[Any, str]]:
    """(value, its name) of all different values of a column."""
    rows = load_raw(data, where)
    where = f"{where}.split_by"
    if column not in rows.column_names:
        raise InputError(f"{where}: no column {column!r}; it has {', '.join(rows.column_names)}")
    if not isinstance(rows.features[column], (Value, ClassLabel)):
        raise InputError(f"{where}: expected a column of texts or numbers, got {rows[0][column]!r:.100}")
    values = sorted(rows.unique(column), key=str)
    if len(values) > MAX_PARTS:
        raise InputError(
            f"{where}: {column!r} has {len(values):,} values; expected at most {MAX_PARTS}, one candidate each"
        )
    names = names_in(rows, column, values)
    return [(value, "none" if name is None else name) for value, name in zip(values, names, strict=True)]


def names_in(rows: Dataset, column: str, values: Iterable[Any]) -> list[str | None]:
    """What values of a column are called: by the name of their class, or by their text; None where there is none."""
    kind = rows.features[column]
    if isinstance(kind, ClassLabel):
        return [None if value in (None, -1) else kind.int2str(value) for value in values]
    return [None if value is None else str(value) for value in values]


def load_rows(config: DataConfig, where: str, seed: int) -> Dataset:
    """The rows that `config` names: loaded, columns renamed, `max_examples` drawn with `seed`, templates filled."""
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


def require_columns(rows: Dataset, needed: Sequence[str], where: str, alternative: str = "") -> None:
    """Refuses rows without the columns that a task needs, and shows how to rename another."""
    if missing := [name for name in needed if name not in rows.column_names]:
        other = next((name for name in rows.column_names if name not in needed), "theirs")
        raise InputError(
            f"{where}: column{'s' * (len(missing) > 1)} {' and '.join(map(repr, missing))} missing; "
            f"it has {', '.join(rows.column_names)}. Expected {' and '.join(needed)}{alternative}. "
            f"To rename, add to it, for instance, columns: {{{other}: {missing[0]}}}"
        )


def load_raw(config: DataConfig, where: str) -> Dataset:
    """The rows as they are stored, those that `where:` selects."""
    check_files(config, where)
    try:
        rows = open_dataset(config)
    except FileNotFoundError as error:
        raise InputError(f"{where}: nothing found ({error}); relative paths are relative to the YAML file") from error
    except (DatasetNotFoundError, ConnectionError) as error:
        raise not_found(config, where, error) from error
    except StopIteration:  # what datasets raises where no file holds a row
        raise InputError(f"{where}: has no rows; expected at least one") from None
    except KeyError as error:
        raise InputError(f"{where}: no split {config.split!r} in {config.path} ({error})") from error
    except DatasetGenerationError as error:
        raise InputError(f"{where}: cannot be read as {config.path} ({error.__cause__ or error})") from error
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
    if config.path and any((Path(config.path) / name).exists() for name in SAVED):
        saved = datasets.load_from_disk(config.path)
        return saved if isinstance(saved, Dataset) else saved[config.split]
    return datasets.load_dataset(
        config.path,
        name=config.name,
        data_dir=config.data_dir,
        data_files=list(config.data_files) if config.data_files else None,
        split=config.split,
        revision=config.revision,
    )


def check_files(config: DataConfig, where: str) -> None:
    """Refuses a folder with very many files, which `datasets` would search for minutes, and files that are not JSON."""
    if config.path and config.data_files is None and Path(config.path).is_dir():
        files = chain.from_iterable(names for _, _, names in os.walk(config.path))
        if sum(1 for _ in islice(files, MAX_FILES + 1)) > MAX_FILES:
            raise InputError(f"{where}: {config.path} holds more than {MAX_FILES:,} files; say which with data_files")
    for path in (Path(path) for name in config.data_files or () for path in sorted(glob(name))):
        plain = path.suffix in (".json", ".jsonl", ".ndjson") and path.is_file()  # Arrow opens compressed ones
        if config.path == "json" and plain:
            state = path.stat()
            if fault := json_fault(path.absolute(), state.st_mtime_ns, state.st_size):
                raise InputError(f"{where}: {path}{fault}")


@cache
def json_fault(path: Path, modified: int, size: int) -> str | None:
    """What is wrong with a JSON file of objects, and in which line; None if nothing is.

    Arrow says little about it, and crashes on `null` and on deep nesting. Every part of a split dataset asks again; the time and
    the size of a file tell its versions apart.
    """
    with path.open("rb") as file:
        is_list = file.read(1 << 16).lstrip().startswith(b"[")
        file.seek(0)
        for number, text in enumerate([file.read()] if is_list else file, start=1):
            line = "" if is_list else f", line {number}"
            try:
                value = parse_json(text) if text.strip() else {}
            except (ValueError, RecursionError) as error:
                return None if number == 1 and is_one_object(path) else f"{line} is not JSON ({error})"
            for row in value if is_list else [value]:
                if not isinstance(row, dict):
                    return f'{line}: expected an object such as {{"prompt": ...}}, got {row!r:.100}'
    return None


def is_one_object(path: Path) -> bool:
    """True if a file is one JSON object over several lines, which Arrow reads as one row."""
    try:
        return isinstance(parse_json(path.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False


def parse_json(text: bytes) -> Any:
    """The value of a JSON text; a ValueError where it is no JSON, or no Unicode."""
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def fill(template: str, row: Mapping[str, Any], where: str) -> str:
    """`template` with every `{column}` replaced by the row's value; refuses anything in braces but the name of a column."""
    pieces = []
    try:
        for text, column, style, conversion in Formatter().parse(template):
            if column is not None and (column not in row or style or conversion):
                raise ValueError(f"{column!r} is no column" if column not in row else f"more than a name at {column!r}")
            pieces.append(text + ("" if column is None else str(row[column])))
    except ValueError as error:
        raise InputError(
            f"{where}: {template!r} cannot be filled ({error}); columns are {', '.join(row)}. Write {{{{ and }}}} for braces"
        ) from error
    return "".join(pieces)
