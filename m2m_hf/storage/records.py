"""`training.json`: what a folder must hold, and what of it is missing or modified."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from m2m_hf.storage.files import file_fingerprint, read_json

COMPLETE = "checkpoint_complete.json"  # written into a checkpoint when all else in it is on the disk


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """name -> size and digest of every file in `folder` and below, by which `find_incomplete` and `altered` recognise them."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256_16": file_fingerprint([path])}
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


def files_of(record: Any) -> dict[str, dict[str, Any]]:
    """`files` of a `training.json`, none of which is outside its folder; empty where it has none."""
    found = record.get("files") if isinstance(record, dict) else None
    files = found if isinstance(found, dict) else {}
    return {
        name: one
        for name, one in files.items()
        if is_inside(name) and isinstance(one, dict) and isinstance(one.get("bytes"), int)
    }


def is_inside(name: str) -> bool:
    """Whether a path is one to a file in a folder or below, written plainly."""
    path = PurePosixPath(name)
    plain = str(path) == name and not path.is_absolute() and ".." not in path.parts
    return plain and name != "." and not {"\\", ":", "\0"} & set(name)


def experts_noun(record: Any) -> str:
    """What experts with such a `training.json`, or of this configuration, are called: `adapters`, or with full ones `experts`."""
    given = record.get("uniform", record) if isinstance(record, dict) else {}
    return "experts" if isinstance(given, dict) and given.get("expert") == "full" else "adapters"


def weights_of(record: Any) -> Any:
    """What recognises the weights that a `training.json` describes, also where they were copied; None where it describes none."""
    files = files_of(record)
    copied = record.get("delta") if isinstance(record, dict) else None
    return copied or files.get("delta.safetensors") or files.get("adapter_model.safetensors")


def find_incomplete(folder: Path, record: str = "training.json") -> str | None:
    """What is missing of a folder that a crash or a full disk may have cut short; None where nothing is.

    Looks at sizes only: see `altered` for the contents.
    """
    try:
        known = json.loads((folder / record).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{record} is not whole"
    for name, one in files_of(known).items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size < one["bytes"]:
            return f"{name} has {size:,} of {one['bytes']:,} bytes"
    return None


def find_modified(folder: Path, record: str = "training.json") -> str | None:
    """The file of a folder whose content is not what `record` says; None where all are as they were written."""
    for name, one in files_of(read_json(folder / record)).items():
        if file_fingerprint([folder / name]) != one.get("sha256_16"):
            return name
    return None
