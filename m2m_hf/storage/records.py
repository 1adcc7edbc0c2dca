"""`training.json`: which files a folder must hold, which of them are missing or modified, and of which rows it is."""

import json
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from m2m_hf.storage.files import digest_of, read_json, read_json_or_empty, write_atomic

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


def is_trained(folder: Path, of: str) -> bool:
    """True if a folder is complete, and holds what `of` identifies."""
    return find_incomplete(folder) is None and read_json_or_empty(folder / "training.json").get("fingerprint") == of


def find_modified(folder: Path, record: str = "training.json", digest: Callable[[Path], str] = digest_of) -> str | None:
    """The first file that is missing or has other content than `record` says; `Digests.of` is a faster `digest`."""
    for name, facts in files_of(read_json(folder / record)).items():
        if not (folder / name).is_file() or digest(folder / name) != facts.get("sha256_16"):
            return name
    return None


@dataclass(frozen=True)
class Drift:
    """What became of a candidate's rows since its expert was trained; `stale` in the expert's `training.json`.

    `data`, `rows` and `data_tokens` are those of an expert of the rows as they are now, and `fingerprint` is what identifies it.
    Rows are counted as often as they occur; None where the digests of the earlier rows are not there.
    """

    data: str
    rows: int
    data_tokens: int
    fingerprint: str
    before: int
    new: int | None = None
    gone: int | None = None
    same: int | None = None

    def __str__(self) -> str:
        if self.new is None:
            return f"{self.before:,} rows then, {self.rows:,} now; which of them are new is not known"
        if not self.new and not self.gone:
            return f"the same {self.same:,} rows in another order"
        return f"rows: {self.new:,} new, {self.gone:,} gone, {self.same:,} the same"


def compare_rows(before: bytes, now: bytes) -> tuple[int, int, int]:
    """How many rows are new, gone and the same, by their digests of 8 bytes each."""
    then, rows = Counter(array("Q", before)), Counter(array("Q", now))
    return (rows - then).total(), (then - rows).total(), (rows & then).total()


def write_digests(path: Path, digests: bytes) -> None:
    """Writes the digests of rows, with the CRC-32 of them behind."""
    write_atomic(path, digests + zlib.crc32(digests).to_bytes(4, "big"))


def read_digests(path: Path, rows: int) -> bytes | None:
    """What `write_digests` has written for so many rows; None where it is missing or damaged."""
    with suppress(OSError):
        content = path.read_bytes()
        digests, check = content[:-4], content[-4:]
        if len(digests) == 8 * rows and zlib.crc32(digests).to_bytes(4, "big") == check:
            return digests
    return None
