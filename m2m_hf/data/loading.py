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


MAX_PARTS = 256  # that one dataset is split into


CHECKED: set[tuple[str, int, int]] = set()  # JSON files that were read well: every part of a split dataset asks again


def pin_data(config: MergeToMixConfig) -> None:
    """Puts the commit of every Hub dataset into `config`, so that manifest and recipe name what was really read.

    Raises:
        InputError: no such dataset or revision.
    """

    def pinned(data: DataConfig | None, where: str) -> Any:
        if data is None or data.path is None or data.path in BUILDERS or Path(data.path).exists():
            return data
        try:
            found = HfApi().resolve_revision(data.path, repo_type="dataset", revision=data.revision)
        except (OSError, ValueError, RevisionResolutionError) as error:
            raise InputError(
                f"{where}: {data.path!r} is neither a local folder nor a dataset that the Hub shows ({str(error)[:200]})"
            ) from error
        return replace(data, revision=found.resolved)

    for name, one in config.parsed_candidates.items():
        config.parsed_candidates[name] = replace(one, data=pinned(one.data, f"candidates.{name}"))
    for name, target in config.parsed_targets.items():
        parts = {part: pinned(getattr(target, part), f"targets.{name}.{part}") for part in ("data", "test_data")}
        config.parsed_targets[name] = replace(target, **parts)


def split_candidates(config: MergeToMixConfig) -> MergeToMixConfig:
    """`config` with a candidate for every value of a `split_by` column in place of the one that it splits.

    Raises:
        InputError: no such column, or values of which no different names can be made; and whatever the new candidates break.
    """
    if all(one.split_by is None for one in config.parsed_candidates.values()):
        return config
    made: dict[str, CandidateConfig] = {}
    for name, one in config.parsed_candidates.items():
        if one.split_by is None:
            made[name] = one
            continue
        where = f"candidates.{name}"
        rows = load_raw(one.data, where)
        if one.split_by not in rows.column_names:
            raise InputError(f"{where}.split_by: no column {one.split_by!r}; it has {', '.join(rows.column_names)}")
        kind = rows.features[one.split_by]
        if not isinstance(kind, (Value, ClassLabel)):
            found = rows[0][one.split_by]
            raise InputError(f"{where}.split_by: expected a column of texts or numbers, got {found!r:.100}")
        values = sorted(set(rows[one.split_by]), key=str)
        if len(values) > MAX_PARTS:
            raise InputError(
                f"{where}.split_by: {one.split_by!r} has {len(values):,} values, and each would be a candidate with an adapter "
                f"of its own; expected at most {MAX_PARTS}"
            )
        for value in values:
            labelled = isinstance(kind, ClassLabel) and value is not None
            called = (
                "none" if value is None or (labelled and value == -1) else kind.int2str(value) if labelled else value
            )
            part = re.sub(r"[^A-Za-z0-9_]+", "_", str(called)).strip("_")
            part = check_name(f"{name}-{part}"[:64].rstrip("_"), "candidate")
            if part in made or (part in config.parsed_candidates and part != name):
                raise InputError(
                    f"{where}.split_by: {called!r} and another value or candidate are both called {part}; rename one of them"
                )
            data = replace(one.data, where={**one.data.where, one.split_by: value})
            made[part] = replace(one, data=data, split_by=None)
    # A configuration made anew, so that whatever is checked of candidates is checked of these.
    given = {name: one.to_json() if one.data.rows is None else one.data.rows for name, one in made.items()}
    whole = replace(config, candidates=given)
    whole.parsed_targets = config.parsed_targets  # which are pinned
    return whole


def load_rows(config: DataConfig, where: str, seed: int) -> Dataset:
    """The rows that `config` names: loaded, columns renamed, `max_examples` of them drawn with `seed`.

    Raises:
        InputError: nothing there, not readable, no such split or column, or empty.
    """
    loaded = load_raw(config, where)
    for theirs, ours in config.columns.items():
        if theirs not in loaded.column_names:
            raise InputError(f"{where}.columns: no column {theirs!r}; it has {', '.join(loaded.column_names)}")
        if ours in loaded.column_names:
            raise InputError(f"{where}.columns: a column {ours!r} is there already; {theirs!r} cannot take its name")
        loaded = loaded.rename_column(theirs, ours)
    if len(loaded) == 0:
        raise InputError(f"{where}: has no rows; expected at least one")
    if config.max_examples is not None and len(loaded) > config.max_examples:
        loaded = loaded.shuffle(seed=seed).select(range(config.max_examples))
    if config.template:
        loaded = Dataset.from_list(
            [
                dict(row) | {key: fill(text, row, f"{where}.template") for key, text in config.template.items()}
                for row in loaded
            ]
        )
    return loaded


def load_raw(config: DataConfig, where: str) -> Dataset:
    """The rows as they are, of those that `where:` asks for."""
    check_json(config, where)
    if config.path and config.data_files is None and Path(config.path).is_dir():
        found = chain.from_iterable(files for _, _, files in os.walk(config.path))
        if sum(1 for _ in islice(found, MAX_FILES + 1)) > MAX_FILES:
            raise InputError(f"{where}: {config.path} holds more than {MAX_FILES:,} files; say which with data_files")
    try:
        if config.rows is not None:
            loaded = config.rows
        elif config.path and (Path(config.path) / "state.json").exists():
            loaded = datasets.load_from_disk(config.path)
        elif config.path and (Path(config.path) / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(config.path)[config.split]
        else:
            loaded = datasets.load_dataset(
                config.path,
                name=config.name,
                data_dir=config.data_dir,
                data_files=list(config.data_files) if config.data_files else None,
                split=config.split,
                revision=config.revision,
            )
    except FileNotFoundError as error:
        raise InputError(f"{where}: nothing found ({error}); relative paths are relative to the YAML file") from error
    except (DatasetNotFoundError, ConnectionError) as error:
        raise InputError(
            f"{where}: {config.path!r} is neither a local folder nor a dataset that the Hub shows ({error})"
        ) from error
    except StopIteration:  # what datasets raises where no file holds a row
        raise InputError(f"{where}: has no rows; expected at least one") from None
    except DatasetGenerationError as error:
        raise InputError(f"{where}: cannot be read as {config.path} ({error.__cause__ or error})") from error
    except KeyError as error:
        raise InputError(f"{where}: no split {config.split!r} in {config.path} ({error})") from error
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(f"{where}: {error}") from error
    for column, value in config.where.items():
        if column not in loaded.column_names:
            raise InputError(f"{where}.where: no column {column!r}; it has {', '.join(loaded.column_names)}")
        chosen = [number for number, found in enumerate(loaded[column]) if found == value]
        if not chosen:
            raise InputError(f"{where}.where: no row has {value!r} in {column!r}")
        loaded = loaded.select(chosen)
    return loaded


def check_json(config: DataConfig, where: str) -> None:
    """Reads local JSON files once to name the line that is none, of which Arrow says little, or over which it even crashes.

    Raises:
        InputError: with file and line.
    """
    files = [Path(found) for name in config.data_files or () if config.path == "json" for found in sorted(glob(name))]
    for path in files:
        if path.suffix not in (".json", ".jsonl", ".ndjson") or not path.is_file():
            continue  # compressed, which Arrow opens
        version = str(path.absolute()), path.stat().st_mtime_ns, path.stat().st_size
        if version in CHECKED:
            continue
        with open(path, "rb") as lines:
            first = lines.read(1 << 16).lstrip()[:1]
            lines.seek(0)
            if first == b"[":
                whole = read_line(lines.read(), f"{where}: {path}")
                wrong = next((row for row in whole if not isinstance(row, dict)), None)
                if wrong is not None:
                    raise InputError(f"{where}: {path}: expected a list of objects, got {wrong!r:.100} in it")
                CHECKED.add(version)
                continue
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    place = f"{where}: {path}, line {number}"
                    try:
                        row = read_line(line, place)
                    except InputError:
                        if number > 1 or not is_one_object(path):
                            raise
                        break
                    if not isinstance(row, dict):
                        raise InputError(f'{place}: expected an object such as {{"prompt": ...}}, got {row!r:.100}')
        CHECKED.add(version)


def is_one_object(path: Path) -> bool:
    """Whether a file is one JSON object over several lines."""
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False


def read_line(content: bytes, place: str) -> Any:
    """A line of JSON.

    Raises:
        InputError: it is none, or holds text that is no Unicode.
    """
    try:
        found = json.loads(content)
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON ({error})") from error
    return found


def fill(template: str, row: Mapping[str, Any], where: str) -> str:
    """`template` with every `{column}` replaced by what the row has in it, and by nothing else.

    Raises:
        InputError: a column that is not there, or what is more than a column's name.
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
