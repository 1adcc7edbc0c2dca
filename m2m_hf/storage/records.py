"""`training.json`: which files a folder must hold, and which of them are missing or modified."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from m2m_hf.storage.files import digest_of, read_json

COMPLETE = "checkpoint_complete.json"  # written into a checkpoint once everything else in it is on the disk


def last_common(of: str, found: Mapping[str, Mapping[int, Collection[str]]]) -> int:
    """The step from which an interrupted training goes on: the last whose checkpoint all mates have; 0 for none.

    `found`: training -> step -> mates, of all trainings that are not done.
    """
    steps = found[of].items()
    return max((step for step, mates in steps if all(step in found.get(mate, (step,)) for mate in mates)), default=0)


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> size and digest, for every file in `folder` and below."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256_16": digest_of(path)}
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


def files_of(record: Any) -> dict[str, dict[str, Any]]:
    """The `files` of a `training.json` that lie inside its folder; empty if it has none."""
    files = record.get("files") if isinstance(record, dict) else None
    return {
        name: facts
        for name, facts in (files.items() if isinstance(files, dict) else ())
        if is_inside(name) and isinstance(facts, dict) and isinstance(facts.get("bytes"), int)
    }


def is_inside(name: str) -> bool:
    """True for the plain relative path of a file in a folder or below it."""
    path = PurePosixPath(name)
    plain = str(path) == name and not path.is_absolute() and ".." not in path.parts
    return plain and name != "." and not {"\\", ":", "\0"} & set(name)


def experts_noun(record: Any, count: int = 2) -> str:
    """What a `training.json` or a configuration calls so many experts: `adapters`, or `experts` of all parameters."""
    settings = record.get("uniform", record) if isinstance(record, dict) else {}
    noun = "expert" if isinstance(settings, dict) and settings.get("expert") == "full" else "adapter"
    return noun if count == 1 else f"{noun}s"


def weights_of(record: Any) -> Any:
    """Identifies the weights that a `training.json` describes, copies included; None if it describes none."""
    files = files_of(record)
    copied = record.get("delta") if isinstance(record, dict) else None
    return copied or files.get("delta.safetensors") or files.get("adapter_model.safetensors")


def find_incomplete(folder: Path, record: str = "training.json") -> str | None:
    """What a crash or a full disk left incomplete in a folder, by the files' sizes; None if nothing is."""
    try:
        known = json.loads((folder / record).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{record} is missing or incomplete"
    for name, facts in files_of(known).items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size < facts["bytes"]:
            return f"{name} has {size:,} of {facts['bytes']:,} bytes"
    return None


def find_modified(folder: Path, record: str = "training.json", digest: Callable[[Path], str] = digest_of) -> str | None:
    """The first file that is missing or has other content than `record` says; `Digests.of` is a faster `digest`."""
    for name, facts in files_of(read_json(folder / record)).items():
        if not (folder / name).is_file() or digest(folder / name) != facts.get("sha256_16"):
            return name
    return None
