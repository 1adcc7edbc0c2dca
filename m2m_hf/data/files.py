"""Rows of JSON and CSV files as they stand there: `datasets` would make dates of texts, and numbers or nothing of cells.

Other files are read by `datasets`; those of parquet are looked at first, since it makes the first one's types of all.
"""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetBuilder,
    DatasetInfo,
    DownloadConfig,
    DownloadManager,
    Features,
    ReadInstruction,
    Value,
)
from datasets.utils.file_utils import xopen
from pyarrow import parquet

Row = dict[str, Any]
COMPRESSED: dict[bytes, Callable[[str], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
DAMAGED = (EOFError, OSError, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error)  # of compressed files
File = tuple[str, str, int, int]  # its name in messages, its path, and the time and size that tell versions apart


class Number(float):
    """A number of a JSON file that is no integer, with its text there."""

    text: str

    def __new__(cls, text: str) -> "Number":
        number = super().__new__(cls, text)
        number.text = text
        return number


def reads(builder: DatasetBuilder) -> bool:
    """True if the files of this builder are read here."""
    return builder.name in ("json", "csv")


def read_split(builder: DatasetBuilder, split: str, texts: frozenset[str], field: str | None) -> Dataset:
    """The rows of a split, such as train or train[:100]. Numbers in the columns `texts` are texts."""
    separator = None if builder.name == "json" else builder.config.sep
    names = list(map(str, builder.config.data_files))
    parts: dict[str, Dataset] = {}
    for name in (name for name in names if name in split):
        rows = read_files(tuple(local_files(builder, name)), separator, texts, field)
        declared = {  # by a dataset card
            column: kind
            for column, kind in (builder.info.features or {}).items()
            if column in rows.column_names and not (column in texts and isinstance(kind, Value))
        }
        parts[name] = rows.cast(Features({**rows.features, **declared}), keep_in_memory=True) if declared else rows
    sizes = dict.fromkeys(names, 0) | {name: len(rows) for name, rows in parts.items()}
    chosen = ReadInstruction.from_spec(split).to_absolute(sizes)
    return datasets.concatenate_datasets(
        [parts[part.splitname].select(range(part.from_ or 0, part.to)) for part in chosen]
    )


def local_files(builder: DatasetBuilder, split: str) -> Iterator[File]:
    """The files of a split, on this machine; those of an archive are opened where they are."""
    config = DownloadConfig(token=builder.token, storage_options=builder.storage_options, extract_on_the_fly=True)
    manager = DownloadManager(builder.dataset_name, download_config=config, data_dir=builder.config.data_dir)
    paths = builder.config.data_files[split]
    for shown, local in zip(paths, manager.download(list(paths)), strict=True):
        state = Path(local).stat()
        try:
            whole = decompressor(local) is not None and not tarfile.is_tarfile(local)
            for path in [local] if whole else manager.iter_files(manager.extract(local)):
                yield str(shown), path, state.st_mtime_ns, state.st_size
        except (ValueError, *DAMAGED) as error:
            raise ValueError(f"{shown}: {error}") from error


def decompressor(path: str) -> Callable[[str], Any] | None:
    """What opens a compressed file, as its first bytes tell; its name may be one that is no URL."""
    with xopen(path, "rb") as file:
        start = file.read(6)
    return next((opener for magic, opener in COMPRESSED.items() if start.startswith(magic)), None)


def open_file(path: str) -> IO[bytes]:
    """Opens a file, or one in an archive, decompressed."""
    opener = decompressor(path)
    file: IO[bytes] = opener(path) if opener else xopen(path, "rb")
    return file


def check_parquet(builder: DatasetBuilder) -> None:
    """Refuses parquet files that cannot be read, or whose columns would change when all have the types of the first."""
    declared, card = builder.info.features or {}, "the dataset card"
    columns = dict.fromkeys(declared, card)
    known = {name: (kind_of(kind.pa_type), card) for name, kind in declared.items() if isinstance(kind, Value)}
    for shown, path, _, _ in (file for split in builder.config.data_files for file in local_files(builder, split)):
        if "://" in path or decompressor(path):
            raise ValueError(f"{shown}: expected a parquet file as it is, not compressed again or in an archive")
        try:
            schema = parquet.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{shown}: {error}") from error
        columns = columns or dict.fromkeys(schema.names, shown)
        if more := [name for name in schema.names if name not in columns]:
            raise ValueError(f"{shown}: has the column {more[0]!r}, which {next(iter(columns.values()))} does not have")
        for column in schema:
            where, kind = f"{shown}, column {column.name!r}", kind_of(column.type)
            try:
                Features.from_arrow_schema(pa.schema([column]))
            except ValueError as error:
                raise ValueError(f"{where}: {error} Leave the column out of the file") from error
            first, place = known.setdefault(column.name, (kind, shown)) if kind else (None, "")
            if first and kind != first and (first, kind) not in (("text", "integer"), ("text", "boolean")):
                raise ValueError(f"{where}: holds {kind}, and in {place} {first}; expected one type in all files")


def check_metadata(builder: DatasetBuilder, split: str, rows: Dataset, columns: Iterable[str]) -> None:
    """Refuses values of these columns that stand otherwise in the metadata.csv or .jsonl from which `datasets` took them."""
    files = [
        file for name in map(str, builder.config.data_files) if name in split for file in local_files(builder, name)
    ]
    for separator, ending in ((",", ".csv"), (None, ".jsonl")):
        given = tuple(file for file in files if Path(file[0]).name == f"metadata{ending}")
        table = read_files(given, separator, frozenset(columns), None) if given else Dataset.from_dict({})
        for name in {*columns} & {*table.column_names} & {*rows.column_names}:
            if not isinstance(rows.features[name], Value):
                continue
            there = {as_text(value) or "" for value in table[name]}
            if changed := [value for value in rows[name] if (as_text(value) or "") not in there]:
                raise ValueError(
                    f"{given[0][0]}, column {name!r}: `datasets` reads {changed[0]!r} where another text stands; expected "
                    "words, which are neither numbers nor dates, or parquet files of images"
                )


def kind_of(kind: pa.DataType) -> str | None:
    """What a column holds, where a cast to another might change how its values are written."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    kinds = {
        "text": (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        "integer": (pa.types.is_integer,),
        "floating point": (pa.types.is_floating,),
        "decimal": (pa.types.is_decimal,),
        "boolean": (pa.types.is_boolean,),
        "time": (pa.types.is_temporal,),
    }
    return next((name for name, tests in kinds.items() if any(test(kind) for test in tests)), None)


@lru_cache(maxsize=2)  # every part of a split dataset asks again
def read_files(files: tuple[File, ...], separator: str | None, texts: frozenset[str], field: str | None) -> Dataset:
    """The rows of files of one kind, with all columns that any of them has."""
    rows: list[Row] = []
    for shown, path, _, _ in files:
        try:
            if separator is None:
                rows.extend(json_rows(path, field, texts))
            else:
                rows.extend(csv_rows(path, "\t" if ".tsv" in Path(shown.lower()).suffixes else separator))
        except DAMAGED as error:
            raise ValueError(f"{shown}: cannot be read to its end ({error})") from error
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{shown}{error}") from error
    columns = {
        name: column([row.get(name) for row in rows]) for name in dict.fromkeys(name for row in rows for name in row)
    }
    features = Features({name: kind for name, (kind, _) in columns.items()})
    table = pa.table([values for _, values in columns.values()], schema=features.arrow_schema)
    return Dataset(table, info=DatasetInfo(features=features))


def column(values: list[Any]) -> tuple[Any, pa.Array]:
    """A column's type and values. Objects, and values of several types, are kept as JSON, each as it is."""
    try:
        made = pa.array(values)
        if "struct" not in str(made.type):
            return Features.from_arrow_schema(pa.schema([("", made.type)]))[""], made
    except (pa.ArrowException, OverflowError):
        pass
    stored = [None if value is None else json.dumps(value) for value in values]
    try:
        for text in filter(None, stored):
            datasets.Json().decode_example(text)
    except ValueError:  # it takes no integer above 64 bits
        return Value("string"), pa.array([as_text(value) for value in values], pa.string())
    return datasets.Json(), pa.array(stored, pa.string()).cast(pa.json_())


def csv_rows(path: str, separator: str) -> Iterator[Row]:
    """The rows of a CSV file, every cell as it stands there."""
    limit = csv.field_size_limit(sys.maxsize)
    with open_file(path) as binary, TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            names = [name or f"Unnamed: {number}" for number, name in enumerate(next(filter(None, reader), []))]
            if len(set(names)) < len(names):
                raise ValueError(f"a column stands twice in the header: {', '.join(names)}")
            for cells in reader:
                if cells and len(cells) != len(names):
                    raise ValueError(f"expected {len(names)} cells, as in the header, got {len(cells)}: {cells!r:.100}")
                if cells:
                    yield dict(zip(names, cells, strict=True))
        except (ValueError, csv.Error) as error:
            raise ValueError(f", line {reader.line_num}: {error}") from error
        finally:
            csv.field_size_limit(limit)


def json_rows(path: str, field: str | None, texts: Iterable[str]) -> Iterator[Row]:
    """The objects of a file of JSON lines, of one list, or of one object: its list `field`, or itself as the only row."""
    with open_file(path) as file:
        is_list = file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    with open_file(path) as file:
        for number, text in enumerate([file.read()] if is_list or field is not None else file, start=1):
            line = "" if is_list or field is not None else f", line {number}"
            try:
                value = parse_json(text) if text.strip() else []
            except (ValueError, RecursionError) as error:
                whole = one_object(path) if number == 1 and not is_list else None
                if whole is None:
                    raise ValueError(f"{line} is not JSON ({error})") from error
                yield with_texts(whole, texts)
                return
            if field is not None:
                if not isinstance(value, dict) or not isinstance(value.get(field), list):
                    raise ValueError(f": expected an object with a list {field!r}, got {value!r:.100}")
                value = value[field]
            for row in value if isinstance(value, list) and (is_list or field is not None or not value) else [value]:
                if not isinstance(row, dict):
                    raise ValueError(f'{line}: expected an object such as {{"prompt": ...}}, got {row!r:.100}')
                yield with_texts(row, texts)


def one_object(path: str) -> Row | None:
    """The object in a file that holds one over several lines."""
    try:
        with open_file(path) as file:
            value = parse_json(file.read())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_json(text: bytes) -> Any:
    """The value of a JSON text; a ValueError where it is no JSON, has a key twice, or is no Unicode."""
    value = DECODER.decode(text.decode(json.detect_encoding(text)))
    if b"\\u" in text:  # half of a surrogate pair may be written as \\ud83d
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def as_object(pairs: list[tuple[str, Any]]) -> Row:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"{twice!r} stands twice in one object")
    return made


DECODER = json.JSONDecoder(parse_float=Number, parse_constant=refuse_constant, object_pairs_hook=as_object)


def with_texts(row: Row, texts: Iterable[str]) -> Row:
    """A row whose numbers in the columns `texts` are texts."""
    return row | {name: as_text(row[name]) for name in texts if isinstance(row.get(name), (int, float))}


def as_text(value: Any) -> str | None:
    """A value as a text: texts as they are, other values as JSON writes them; a ValueError for bytes, which are no text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Number):
        return value.text
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, bytes):
        raise ValueError(f"expected text, got {value!r:.100}")
    is_json = isinstance(value, (int, float, list, dict))
    return json.dumps(value, ensure_ascii=False, default=str) if is_json else str(value)
