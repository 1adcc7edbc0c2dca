"""Rows as they are in files, on the Hub, or in memory."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from glob import escape, glob, has_magic
from itertools import chain, islice, repeat
from pathlib import Path
from string import Formatter
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, LargeList, List, Value
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionResolutionError

from m2m_hf.config.candidates import CandidateConfig, DataConfig
from m2m_hf.config.checks import BUILDERS, COMPRESSED, SUFFIXES, check_name, exists
from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.data.files import as_text, check_metadata, check_parquet, read_split, reads
from m2m_hf.errors import InputError

MAX_FILES = 10_000  # in a folder that is given as a dataset
MAX_PARTS = 256  # of one dataset with `split_by`
TEXTS = ("prompt", "completion")
PLACE = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])+)")  # in a template: a column, and keys of what it holds
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
    rows = load_raw(data, where, text_columns(data, where))
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
    named = (legible(value, rows.features[column]) for value in values)
    return [None if value is None else str(value) for value in named]


def load_rows(config: DataConfig, where: str, seed: int, texts: Sequence[str] = TEXTS) -> Dataset:
    """The rows that `config` names: loaded, columns renamed, `max_examples` drawn with `seed`, templates filled.

    The columns `texts`, and what templates name, are read as texts.
    """
    rows = load_raw(config, where, text_columns(config, where, texts))
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
    made: dict[str, list[Any]] = {}
    for name in texts:
        null = config.null if name == "prompt" else None
        kind = rows.features.get(name)
        is_text = isinstance(kind, Value) and kind.dtype == "string" and null is None
        if isinstance(kind, Value | ClassLabel) and name not in config.template and not is_text:
            made[name] = [null if value is None else value for value in texts_in(rows, name, where)]
    for name, text in config.template.items():
        null = config.null if name == "prompt" else None
        numbered = enumerate(map(legible, rows, repeat(rows.features)), start=1)
        made[name] = [filled(text, row, f"{where}, row {number}.template", null) for number, row in numbered]
    return replaced(rows, made)


def text_columns(config: DataConfig, where: str, texts: Sequence[str] = TEXTS) -> frozenset[str]:
    """What a file calls the columns `texts`, and those that templates name."""
    names = {ours: theirs for theirs, ours in config.columns.items()}
    return frozenset(names.get(name, name) for name in {*texts, *columns_in(config.template, where)})


def columns_in(template: Mapping[str, Any], where: str) -> set[str]:
    """The columns that templates name."""
    choices = template.get("choices", ())
    texts = [text for name, text in template.items() if name != "choices"]
    texts += choices.values() if isinstance(choices, Mapping) else choices
    named = {column for text in texts for _, column, *_ in parse_template(text, f"{where}.template") if column}
    return named | {place[1] for column in named if (place := PLACE.fullmatch(column))}


def texts_in(rows: Dataset, name: str, where: str) -> list[str | None]:
    """The values of a column as texts."""
    try:
        return [as_text(legible(value, rows.features[name])) for value in rows[name]]
    except ValueError as error:
        raise InputError(f"{where}.{name}: {error}") from error


def replaced(rows: Dataset, columns: Mapping[str, list[Any]]) -> Dataset:
    """Rows with these columns of texts, of lists of texts, or of choices with labels."""
    if not columns:
        return rows
    texts = List(Value("string"))
    kinds: dict[type, Any] = {list: texts, dict: {"text": texts, "label": texts}}
    features = Features({name: kinds.get(type(values[0]), Value("string")) for name, values in columns.items()})
    made = Dataset.from_dict(columns, features=features)
    rest = [name for name in rows.column_names if name not in columns]
    return datasets.concatenate_datasets([rows.select_columns(rest), made], axis=1) if rest else made


def legible(value: Any, kind: Any) -> Any:
    """A value with classes as their names and short floats as they are written, also within lists and mappings."""
    if isinstance(kind, ClassLabel):
        return None if value in (None, -1) else kind.int2str(value)
    if isinstance(value, float) and isinstance(kind, Value) and kind.dtype in ("float16", "float32"):
        return float(str(np.dtype(kind.dtype).type(value)))  # 0.1, where a double has 0.10000000149011612
    if isinstance(kind, Mapping) and isinstance(value, Mapping):
        return {key: legible(inner, kind[key]) for key, inner in value.items()}
    if isinstance(kind, List | LargeList) and isinstance(value, list):
        return [legible(inner, kind.feature) for inner in value]
    return value


def require_columns(rows: Dataset, needed: Sequence[str], where: str, alternative: str = "") -> None:
    """Refuses rows without the columns that a task needs, and shows how to rename another."""
    if missing := [name for name in needed if name not in rows.column_names]:
        other = next((name for name in rows.column_names if name not in needed), "theirs")
        raise InputError(
            f"{where}: column{'s' * (len(missing) > 1)} {' and '.join(map(repr, missing))} missing; "
            f"it has {', '.join(rows.column_names)}. Expected {' and '.join(needed)}{alternative}. "
            f"To rename, add to it, for instance, columns: {{{other}: {missing[0]}}}"
        )


def load_raw(config: DataConfig, where: str, texts: frozenset[str]) -> Dataset:
    """The rows as they are stored, those that `where:` selects."""
    check_files(config, where)
    try:
        rows = open_dataset(config, texts)
    except FileNotFoundError as error:
        raise InputError(f"{where}: nothing found ({error}); relative paths are relative to the YAML file") from error
    except (DatasetNotFoundError, ConnectionError) as error:
        raise not_found(config, where, error) from error
    except StopIteration:  # what datasets raises where no file holds a row
        raise InputError(f"{where}: has no rows; expected at least one") from None
    except KeyError as error:
        raise InputError(f"{where}: no split {config.split!r} in {config.path} ({error})") from error
    except DatasetGenerationError as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{where}: cannot be read as {config.path} ({cause})") from error
    except (ValueError, RuntimeError, OSError) as error:
        hint = "; expected .gz, .bz2 or .xz, or pip install zstandard" if "type zstd" in str(error) else ""
        raise InputError(f"{where}: {error}{hint}") from error
    for name in rows.column_names:
        try:
            rows.data.column(name).validate(full=True)
        except pa.ArrowInvalid as error:
            raise InputError(f"{where}, column {name!r}: {error}") from error
    for column, value in config.where.items():
        if column not in rows.column_names:
            raise InputError(f"{where}.where: no column {column!r}; it has {', '.join(rows.column_names)}")
        if isinstance(value, Mapping):
            unwanted = value["without"] if isinstance(value["without"], list | tuple) else [value["without"]]
            cells = [held(one, rows.features[column]) for one in rows[column]]
            kept = [n for n, cell in enumerate(cells) if not any(one in cell for one in unwanted)]
        else:
            kept = selected(rows, column, value, f"{where}.where")
        rows = rows.select(kept)
    return rows


def held(value: Any, kind: Any) -> list[Any]:
    """What a cell holds: the elements of a list, or the value itself and its text."""
    value = legible(value, kind)
    return value if isinstance(value, list) else [value, as_text(value)]


def selected(rows: Dataset, column: str, value: Any, where: str) -> list[int]:
    """The numbers of the rows that have this value there, or else its text: a cell of a CSV file is text, a class has a name."""
    contents, kind = rows[column][:], rows.features[column]
    is_bool, text = isinstance(value, bool), as_text(value) or ""
    same = [n for n, one in enumerate(contents) if one == value and isinstance(one, bool) == is_bool]
    named = [n for n, name in enumerate(names_in(rows, column, contents)) if name == text]
    if isinstance(kind, ClassLabel) and same and named and same != named:
        raise InputError(
            f"{where}: {value!r} is the number of class {kind.int2str(value)!r} and the name of another; quote the name"
        )
    spellings = sorted({one for one in contents if isinstance(one, str) and is_spelling(one, value)})
    if not same and len(spellings) > 1:
        raise InputError(
            f"{where}: {value!r} is written {' and '.join(spellings)} in {column!r}; quote the one that is meant"
        )
    if not same and not named and isinstance(kind, Value):  # such as true, which str writes otherwise
        named = [n for n, one in enumerate(contents) if one is not None and as_text(one) == text]
    if not same and not named:
        classes = f"; its classes are {', '.join(kind.names)}" if isinstance(kind, ClassLabel) else ""
        quote = "" if isinstance(value, str) else "; YAML reads yes, no, on, off, null and digits so: quote it"
        raise InputError(f"{where}: no row has {value!r} in {column!r}{classes:.200}{quote}")
    return same or named


def is_spelling(text: str, value: Any) -> bool:
    """True if a text is this number with a fraction, of which YAML does not tell how it was written."""
    try:
        return isinstance(value, float) and float(text) == value
    except ValueError:
        return False


def open_dataset(config: DataConfig, texts: frozenset[str]) -> Dataset:
    """Rows in memory, of a saved dataset, of JSON or CSV files as they stand there, or whatever `load_dataset` loads."""
    if config.rows is not None:
        return config.rows
    if config.path and any((Path(config.path) / name).exists() for name in SAVED):
        saved = datasets.load_from_disk(config.path)
        return saved if isinstance(saved, Dataset) else saved[config.split]
    builder = datasets.load_dataset_builder(
        config.path,
        name=config.name,
        data_dir=config.data_dir,
        data_files=[escaped(name, config.path or "") for name in config.data_files or ()] or None,
        revision=config.revision,
    )
    if reads(builder):
        return read_split(builder, config.split, texts, config.field)
    if builder.name == "parquet":
        check_parquet(builder)
    builder.download_and_prepare()
    rows = builder.as_dataset(config.split)
    if builder.name.endswith("folder"):
        names = {ours: theirs for theirs, ours in config.columns.items()}
        check_metadata(builder, config.split, rows, texts | {names.get("label", "label")})
    return rows


def escaped(name: str, folder: str) -> str:
    """A pattern for `name`, whose file or folder is there although its name looks like a pattern."""
    there = next((part for part in (Path(name), *Path(name).parents) if exists(folder / part)), Path())
    return escape(str(there)) + name[len(str(there)) :] if there.name else name


def check_files(config: DataConfig, where: str) -> None:
    """Refuses names without a file, and folders whose name is a pattern to `datasets` or that it would search for minutes."""
    root = config.path if config.path and exists(Path(config.path)) else None
    for name in config.data_files or ():  # of several patterns, datasets ignores those without a file
        local = "://" not in name and (root or config.path in BUILDERS)
        if local and has_magic(name) and not glob(escaped(name, root or ""), root_dir=root, recursive=True):
            raise InputError(f"{where}.data_files: there is no file {name}")
    for folder in (config.path, config.data_dir):
        is_saved = any(exists(Path(folder or "") / name) for name in SAVED)
        if folder and exists(Path(folder)) and Path(folder).is_file():
            raise InputError(
                f"{where}: {folder} is a file; expected a builder, and the file for it, such as path: json, data_files: {folder}"
            )
        if folder and has_magic(folder) and Path(folder).is_dir() and not is_saved:
            raise InputError(
                f"{where}: {folder}: a folder with [, * or ? in its path cannot be searched; rename it, or name its files, "
                "such as path: json, data_files: folder/train.jsonl"
            )
    if config.path and config.data_files is None and Path(config.path).is_dir():
        walked = chain.from_iterable(names for _, _, names in os.walk(Path(config.path) / (config.data_dir or "")))
        files = list(islice(walked, MAX_FILES + 1))
        if len(files) > MAX_FILES:
            raise InputError(f"{where}: {config.path} holds more than {MAX_FILES:,} files; say which with data_files")
        # A description of the dataset may say what belongs to what.
        described = "README.md" in files or any(name in files for name in SAVED)
        kinds = {builder: name for name in sorted(files) if (builder := builder_of(name)) not in (None, "text")}
        if len(kinds) > 1 and not described:
            raise InputError(
                f"{where}: {config.path} holds {' and '.join(kinds.values())}, and load_dataset reads files of one kind; say "
                "which with path: and data_files:"
            )


def builder_of(name: str) -> str | None:
    """What reads a file of rows, by its name; None of another file."""
    ends = [end for end in Path(name).suffixes if end not in COMPRESSED]
    return SUFFIXES.get(ends[-1].lower()) if ends and not name.startswith(("dataset_info", ".")) else None


def parse_template(template: str, where: str) -> list[tuple[str, str | None, str | None, str | None]]:
    """The pieces of a template: a text, and the name of the column behind it."""
    try:
        return list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"{where}: {template!r} cannot be filled ({error}). Write {{{{ and }}}} for braces") from error


def filled(template: Any, row: Mapping[str, Any], where: str, null: str | None) -> Any:
    """A template filled; of choices a list, or texts and labels as `{text: [...], label: [...]}`."""
    if isinstance(template, str):
        return fill(template, row, where, null)
    texts = [fill(text, row, where) for text in (template.values() if isinstance(template, Mapping) else template)]
    return {"text": texts, "label": [*template]} if isinstance(template, Mapping) else texts


def value_at(row: Mapping[str, Any], column: str) -> Any:
    """A row's value, or what a list or mapping in it holds: `choices[text][0]`; a LookupError where there is none."""
    place = None if column in row else PLACE.fullmatch(column)
    value = row[place[1] if place else column]
    for key in place[2][1:-1].split("][") if place else ():
        if not isinstance(value, Mapping | list):
            raise LookupError(key)
        value = value[key] if isinstance(value, Mapping) else value[int(key) if key.isdecimal() else len(value)]
    return value


def fill(template: str, row: Mapping[str, Any], where: str, null: str | None = None) -> str:
    """`template` with every `{column}` or `{column[key]}` replaced by the row's value, and nulls by `null`.

    It refuses anything in braces but the name of a column, and without `null` rows that have none there.
    """
    pieces = []
    for text, column, style, conversion in parse_template(template, where):
        pieces.append(text)
        if column is None:
            continue
        fault = f"more than a name at {column!r}" if style or conversion else ""
        try:
            value = as_text(value_at(row, column))
        except ValueError as error:
            raise InputError(f"{where}: {column}: {error}") from error
        except LookupError:
            fault = f"{column!r} is no column" + ", or holds nothing there" * ("[" in column)
        if fault:
            raise InputError(
                f"{where}: {template!r} cannot be filled ({fault}); columns are {', '.join(row)}. Write {{{{ and }}}} for braces"
            )
        value = null if value is None else value
        if value is None:
            raise InputError(
                f"{where}: {column!r} is null; expected text. Remove the row, or, in a prompt, say what stands for it: "
                'template: {prompt: ..., null: ""}'
            )
        pieces.append(value)
    return "".join(pieces)
