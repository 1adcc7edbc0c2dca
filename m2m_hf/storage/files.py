"""Files that are written completely or not at all, their fingerprints and remembered digests."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from m2m_hf.errors import InputError

DIGESTS = ".digests.json"


def fingerprint(value: Any) -> str:
    """16 hex digits of the SHA-256 of `value` as canonical JSON (sorted keys)."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def digest_of(*files: Path) -> str:
    """16 hex digits of the SHA-256 of the bytes of files, in this order."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replaces `path` in one step, so that readers and crashes see the old file or the new one; skips equal content."""
    content = content if isinstance(content, bytes) else content.encode()
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent, files=False)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in a file that must be there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); delete it and it will be recreated") from error


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """The JSON object in a file that can be made again; empty if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def staging_path(folder: Path) -> Path:
    """The staging path of `folder`; renamed into place when complete."""
    return folder.with_name(f".{folder.name}.partial")


def checkpoints(folder: Path) -> Path:
    """Where a training into `folder` keeps its checkpoints."""
    return folder.with_name(f"{folder.name}.checkpoints")


def sync(folder: Path, files: bool = True) -> None:
    """Flushes `folder` and its files to the disk, so that a power cut loses none of it."""
    for path in (*(folder.rglob("*") if files else ()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def readable(path: Path) -> bool:
    """True if a safetensors file is there and complete: its header states its length."""
    try:
        with safe_open(path, "pt") as file:
            return bool(file.keys())
    except (OSError, SafetensorError):
        return False


def stamp(path: str | Path) -> list[int]:
    """Size, modification time and change time: all the same, the content is too. Links are followed."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


class Digests:
    """Digests of the files of a run folder, computed only for files that have changed since `save`; with `full` for all."""

    def __init__(self, root: Path, full: bool = False) -> None:
        self.root = root
        self._known = {} if full else read_json_or_empty(root / DIGESTS)
        self._seen: dict[str, list[int | str]] = {}

    def of(self, path: Path) -> str:
        """The digest of a file, see `digest_of`."""
        name = Path(os.path.relpath(path, self.root)).as_posix()
        known, now = self._known.get(name), stamp(path)
        if not (isinstance(known, list) and len(known) == 4 and known[:3] == now and isinstance(known[3], str)):
            known = [*now, digest_of(path)]
        self._seen[name] = known
        return str(known[3])

    def save(self) -> None:
        """Remembers every digest that was asked for; a folder that cannot be written to stays as it is."""
        with suppress(OSError):
            write_json(self.root / DIGESTS, self._seen)
