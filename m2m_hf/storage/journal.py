"""The run folder: where everything lives, how it is written so that nothing is lost, and how things are recognised again."""

import errno
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import yaml
from filelock import FileLock, Timeout

from m2m_hf.core.arrays import Numbers, Store, append_bytes
from m2m_hf.core.mixture import Mixture, Trial
from m2m_hf.errors import InputError

MARK = "whole.json"  # written into a checkpoint when all else in it is on the disk
END = "...\n"  # of a whole YAML document
INLINE = 500  # values of a trial that its line holds itself
LISTS = ("values", "logprobs")
CHECK = b', "crc32": '  # before the checksum of all that comes before it in a line


def fingerprint(value: Any) -> str:
    """16 hex digits of the SHA-256 of `value` as canonical JSON (keys sorted): the same content, the same digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_fingerprint(paths: Iterable[Path]) -> str:
    """16 hex digits of the SHA-256 over the bytes of `paths`, in their given order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def write_atomic(path: Path, text: str) -> None:
    """Writes `text` so that a reader, or a crash, finds either the old file or the whole new one; the same text not again."""
    if path.exists() and path.read_bytes() == text.encode():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent, files=False)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in `path`.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); delete it to have it made again") from error


def read_made(path: Path) -> dict[str, Any]:
    """The JSON object in a file that can be made again; empty where the file is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def hidden(folder: Path) -> Path:
    """Where what will be `folder` is made, so that what is there is always whole."""
    return folder.with_name(f".{folder.name}.partial")


def checkpoints(folder: Path) -> Path:
    """Where a training into `folder` keeps its checkpoints."""
    return folder.with_name(f"{folder.name}.checkpoints")


def sync(folder: Path, files: bool = True) -> None:
    """Has the disk really hold what was written to `folder` and its files, so that a power cut loses none of it."""
    for path in (*(folder.rglob("*") if files else ()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """name -> size and digest of every file in `folder` and below, by which `cut_short` and `altered` recognise them."""
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


def experts_word(record: Any) -> str:
    """What experts with such a `training.json`, or of this configuration, are called: `adapters`, or with full ones `experts`."""
    given = record.get("uniform", record) if isinstance(record, dict) else {}
    return "experts" if isinstance(given, dict) and given.get("expert") == "full" else "adapters"


def weights_of(record: Any) -> Any:
    """What recognises the weights that a `training.json` describes, also where they were copied; None where it describes none."""
    files = files_of(record)
    copied = record.get("delta") if isinstance(record, dict) else None
    return copied or files.get("delta.safetensors") or files.get("adapter_model.safetensors")


def cut_short(folder: Path, record: str = "training.json") -> str | None:
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


def altered(folder: Path, record: str = "training.json") -> str | None:
    """The file of a folder whose content is not what `record` says; None where all are as they were written."""
    for name, one in files_of(read_json(folder / record)).items():
        if file_fingerprint([folder / name]) != one.get("sha256_16"):
            return name
    return None


def read_config(path: Path) -> dict[str, Any]:
    """`OUT/config.yaml`.

    Raises:
        InputError: it is not whole.
    """
    try:
        text = path.read_text(encoding="utf-8")
        given = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}); m2m select --config writes it again") from error
    if not text.endswith(END) or not isinstance(given, dict):
        raise InputError(f"{path} was cut short; m2m select --config writes it again")
    return given


class RunFolder:
    """The paths of one run; the layout is a contract that tools and people read (ARCHITECTURE.md).

    `held` is the one that this process has claimed last.
    """

    held: ClassVar["RunFolder | None"] = None

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self.config = self.root / "config.yaml"
        self.adapters = self.root / "adapters"
        self.head = self.root / "head.safetensors"
        self.targets = self.root / "targets.json"
        self.trials = self.root / "trials.jsonl"
        self.mixture = self.root / "mixture"
        self.recipe = self.root / "recipe.yaml"
        self.final = self.root / "final"
        self.trained = self.root / "trained"
        self.fidelity = self.root / "fidelity.json"
        self.summary = self.root / "summary.json"
        self.report = self.root / "report.html"
        self.pictures = self.root / "pictures"
        self.log = self.root / "log.txt"
        self._lock = FileLock(self.root / ".lock", is_singleton=True)  # one for all users in this process

    @property
    def rows(self) -> Path:
        """The rows of the chosen mixture: `train.jsonl`, or `train.parquet` of images."""
        images = self.mixture / "train.parquet"
        return images if images.exists() else self.mixture / "train.jsonl"

    def refuse_links(self) -> None:
        """Refuses links that lead out of the folder: one of somebody else's could have us write or read anywhere.

        Raises:
            InputError: naming one.
        """
        root = self.root.resolve()
        for place, folders, files in os.walk(root):
            for path in (Path(place) / name for name in (*folders, *files)):
                if path.is_symlink() and not path.resolve().is_relative_to(root):
                    raise InputError(
                        f"{path} is a link to {path.resolve()}; a run folder holds its own files. Move what it points to there, "
                        "or link the whole folder"
                    )

    def lock(self) -> None:
        """Claims the folder for this process until it ends, however it ends.

        Raises:
            InputError: another process is at work in it.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            RunFolder.held = self
        except Timeout:
            raise InputError(
                f"another process is at work in {self.root}; wait for it to end, or choose another --output_dir"
            ) from None
        except OSError as error:
            raise InputError(f"output_dir: {self.root} cannot be written to ({error})") from error


def disk_is_full(error: BaseException | None, folder: Path | None = None) -> bool:
    """Whether that is what an error comes from, whichever library it has passed through.

    Args:
        folder: what was written to beside the run folder.
    """
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error) or "quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    folders = [folder, RunFolder.held and RunFolder.held.root]
    try:
        return any(shutil.disk_usage(path).free < 1 << 16 for path in folders if path)
    except OSError:
        return False


@dataclass(frozen=True)
class Keys:
    """Makes the keys of one target's trials: fingerprints of everything that a score depends on.

    They need nothing but what is written in the run folder, so that whoever reads the journal can tell which of its lines
    belong to the run as it is now.

    Args:
        base: fingerprint of base weights, tokenizer and the like.
        scorer: fingerprint of the target's rows, scorer and metric.
        examples: rows of the target.
        adapters: name -> fingerprint of its adapter, which covers data, training arguments and library versions. A key covers
            those of its own mixture only, so that another candidate makes no old trial worthless.
    """

    base: str
    scorer: str
    examples: int
    adapters: Mapping[str, str]

    def merged(self, mixture: Mixture, rung: int | None = None, method: str = "merged") -> str:
        """Of the merged objective, seen on `rung` rows (None: all)."""
        parts = [[name, weight, self.adapters[name]] for name, weight in mixture.items]
        return fingerprint([method, self.base, self.scorer, self.examples if rung is None else rung, parts])

    def ensemble(self, mixture: Mixture) -> str:
        return fingerprint(["ensemble", self.merged(mixture)])

    def trained(self, counts: Mapping[str, int]) -> str:
        """Of a model fine-tuned on so many rows of each candidate."""
        return fingerprint(["trained", self.base, self.scorer, self.examples, self.model(counts)])

    def model(self, counts: Mapping[str, int]) -> str:
        """Fingerprint of that model itself, whatever it is scored on; without rows, of the base model."""
        if not counts:
            return fingerprint(["model", self.base])
        return fingerprint(["model", [[name, count, self.adapters[name]] for name, count in sorted(counts.items())]])


class Journal:
    """Append-only JSON lines of trials. A line that was written is true for ever and is never written again.

    Values by example stand in the line where there are up to `INLINE` of them. Longer lists stand in `trials.values` beside it,
    as float64 numbers one after another; the line's `stored` then says where (`place`, `count`, `crc32` of each) and what their
    mean log-probability is. In memory a trial's values are views of the disk, so that very many of them need none.
    """

    def __init__(self, path: Path) -> None:
        """Reads what is there; a torn last line (power cut while writing) is dropped and will be measured again.

        So is a line whose values are missing from `trials.values`.

        Raises:
            InputError: a line that is not a trial, named by its number.
        """
        self.path = path
        self.trials: dict[str, Trial] = {}
        self.store = Store(path.with_suffix(".values"))
        self._aside: Store | None = None  # what a process keeps that does not write
        self._lost: set[int] = set()  # numbers of the lines that are of no use any more
        available = self.store.count
        if not path.exists():
            return
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    self._lost.add(number)
                    break
                try:
                    if is_altered(line):
                        raise InputError("it is not what was written")
                    trial = self._read(json.loads(line), available)
                except (ValueError, RecursionError) as error:
                    raise InputError(
                        f"{path}, line {number} is damaged ({error}); delete that line and its trial will be measured again"
                    ) from error
                if trial is None:
                    self._lost.add(number)
                else:
                    self.trials[trial.key] = trial

    def _read(self, record: Any, available: int) -> Trial | None:
        """The trial of a line; None where its values are not there."""
        stored = record.get("stored") if isinstance(record, dict) else None
        if not stored:
            return Trial.from_json(record)
        try:
            places = {name: (int(stored[name]["place"]), int(stored[name]["count"])) for name in LISTS}
            mean = float(stored["mean_logprob"])
            right = math.isfinite(mean) and all(isinstance(stored[name]["crc32"], int) for name in LISTS)
        except (KeyError, TypeError) as error:
            raise InputError(f"not a trial: stored is {stored!r:.80}") from error
        if not right or any(place < 0 or count < 0 for place, count in places.values()):
            raise InputError(f"not a trial: stored is {stored!r:.80}")
        if any(place + count > available for place, count in places.values()):
            return None
        lists = {name: self.store.numbers(place, count) for name, (place, count) in places.items()}
        trial = Trial.from_json(record | lists)
        if trial.score is not None:
            vars(trial.score)["mean_logprob"] = mean  # or ranking would read all lists
        return trial

    @property
    def lost(self) -> int:
        """How many lines are of no use any more: cut short, or without their values."""
        return len(self._lost)

    def _repair(self) -> None:
        """Takes the lost lines out, before anything is written where they or their values were."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        with open(self.path, "rb") as lines, open(partial, "wb") as file:
            file.writelines(line for number, line in enumerate(lines, start=1) if number not in self._lost)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)
        sync(self.path.parent, files=False)
        self._lost.clear()

    def get(self, key: str) -> Trial | None:
        """The trial with this key. A failed one counts too: what failed once for its numbers fails again."""
        return self.trials.get(key)

    def append(self, trial: Trial, write: bool = True) -> Trial:
        """`extend` by one trial."""
        return self.extend([trial], write)[0]

    def extend(self, trials: Sequence[Trial], write: bool = True) -> list[Trial]:
        """Remembers trials and, where `write`, puts their lines on the disk, all or none, before returning.

        Those that were measured together are written together, or what is left of them would be measured in other company.

        Returns:
            The trials as they are remembered, their values no longer in memory where there are many.
        """
        if write and self._lost:
            self._repair()
        made = [self._line(trial, write) for trial in trials]
        if write:
            append_bytes(self.path, b"".join(line for _, line in made))
        for trial, _ in made:
            self.trials[trial.key] = trial
        return [trial for trial, _ in made]

    def _line(self, trial: Trial, write: bool) -> tuple[Trial, bytes]:
        """(a trial as it is remembered, its line)."""
        score = trial.score
        record = trial.to_json()
        record["stored"] = None
        if score is not None:
            if max(len(score.values), len(score.logprobs)) <= INLINE:
                lists = {name: Numbers.of(getattr(score, name)) for name in LISTS}
            else:
                if not write:
                    self._aside = self._aside or Store.temporary()
                store = self.store if write or self._aside is None else self._aside
                lists, stored = {}, {}
                for name in LISTS:
                    values = getattr(score, name)
                    place, checksum = store.append(values)
                    lists[name] = store.numbers(place, len(values))
                    stored[name] = {"place": place, "count": len(values), "crc32": checksum}
                    record[name] = None
                record["stored"] = stored | {"mean_logprob": score.mean_logprob}
            kept = replace(score, values=lists["values"], logprobs=lists["logprobs"])
            vars(kept)["mean_logprob"] = score.mean_logprob
            trial = replace(trial, score=kept)
        seconds = record.pop("seconds")  # the one thing in which two runs of the same differ
        text = json.dumps(record)
        return trial, f'{text[:-1]}{CHECK.decode()}{zlib.crc32(text.encode())}, "seconds": {seconds}}}\n'.encode()


def is_altered(line: bytes) -> bool:
    """Whether a line of a journal is not the one that was written, as its checksum tells."""
    text, found, rest = line.rpartition(CHECK)
    return bool(found) and str(zlib.crc32(text + b"}")).encode() != rest.split(b",")[0]


def damaged_values(path: Path) -> list[str]:
    """The keys of a journal's trials whose values beside it are not what was written; reads all of them."""
    store, damaged = Store(path.with_suffix(".values")), []
    if not path.exists():
        return []
    available = store.count
    with open(path, "rb") as lines:
        for line in lines:
            record = json.loads(line) if line.endswith(b"\n") else {}
            places = [one for one in (record.get("stored") or {}).values() if isinstance(one, dict)]
            if any(one["place"] + one["count"] > available for one in places):
                continue  # known to be lost
            arrays = [store.view(one["place"], one["count"]) for one in places]
            if any(zlib.crc32(array.tobytes()) != one["crc32"] for array, one in zip(arrays, places, strict=True)):
                damaged.append(record["key"])
    return list(dict.fromkeys(damaged))
