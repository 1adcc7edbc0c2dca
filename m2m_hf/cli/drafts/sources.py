"""Datasets as `m2m init` is given them: files, folders and Hub ids."""

import csv
import gzip
import json
import os
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from m2m_hf.config.checks import COMPRESSED, SUFFIXES, exists, resolve_existing
from m2m_hf.errors import InputError

SEEN = 100_000  # rows of a file, of which some may lack columns

Source = dict[str, Any]  # what load_dataset takes


def parse_source(text: str) -> tuple[str, Source]:
    """(name, what load_dataset takes) of `name=place` or `place`: a file, a folder, or a Hub id."""
    name, _, place = text.rpartition("=")
    file = uncompressed(place)
    builder = SUFFIXES.get(file.suffix.lower())
    if not name:
        stem = file.stem if builder else place.rsplit("/", 1)[-1]
        name = re.sub(r"[^A-Za-z0-9_-]", "_", stem).strip("_-") or "data"
    return name[:64], {"path": builder, "data_files": place} if builder else {"path": place}


def uncompressed(place: str) -> Path:
    """The name of a file without the end that says how it is compressed."""
    path = Path(place)
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def parse_sources(texts: Iterable[str]) -> dict[str, Source]:
    """Candidates by name."""
    candidates: dict[str, Source] = {}
    for text in texts:
        name, source = parse_source(text)
        if name in candidates:
            raise InputError(
                f"--data: two candidates would be called {name!r}; name them: {name}_2={text.rpartition('=')[2]}"
            )
        candidates[name] = source
    return candidates


def read_columns(source: Source) -> set[str]:
    """The columns of local data as datasets reads them; none if they cannot be read."""
    files = source.get("data_files") or source["path"]
    path = Path(files[0] if isinstance(files, list) else files)
    if not exists(path):
        return set()
    kind = uncompressed(str(path)).suffix.lower()
    try:
        if path.suffix == ".gz" or source["path"] == "csv" or kind == ".jsonl":
            opened = gzip.open if path.suffix == ".gz" else open
            with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
                if source["path"] == "csv":
                    return set(next(csv.reader(file, delimiter="\t" if kind == ".tsv" else ",")))
                if kind == ".jsonl":
                    return set().union(*map(json.loads, islice(filter(str.strip, file), SEEN)))
        import datasets

        if (path / "state.json").exists():
            return set(datasets.load_from_disk(str(path)).column_names)
        keys = {key: source[key] for key in ("path", "name", "data_dir", "data_files", "revision") if source.get(key)}
        rows = datasets.load_dataset(**keys, split=source.get("split") or "train", streaming=True)
        return set(next(iter(rows)))
    except Exception:  # datasets may raise anything over a file; the search will name the reason
        return set()


def relocate(source: Source, origin: Path, folder: Path) -> Source:
    """`source` with local paths as seen from `folder`; now they are relative to `origin` or the working directory."""

    def moved(place: Any) -> Any:
        if isinstance(place, list):
            return [moved(path) for path in place]
        resolved = resolve_existing(str(place), origin)
        if os.path.isabs(str(place)) or not os.path.isabs(resolved):
            return str(place)
        return os.path.relpath(resolved, folder.absolute())

    return source | {key: moved(source[key]) for key in ("path", "data_dir", "data_files") if source.get(key)}
