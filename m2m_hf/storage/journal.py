"""The journal: append-only JSON lines of trials."""

import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from m2m_hf.core.jsonable import from_json, to_json
from m2m_hf.core.trial import Trial
from m2m_hf.errors import InputError
from m2m_hf.storage.array_store import ArrayStore, Place, append_bytes
from m2m_hf.storage.files import sync

INLINE = 500  # longer lists of values stand in `trials.values`
CHECK = b', "crc32": '  # precedes the checksum of the line up to it


@dataclass(frozen=True)
class Stored:
    """Where the lists of a line stand in `trials.values`, and the mean log-probability, for which ranking would read all."""

    mean_logprob: float
    values: Place
    logprobs: Place


class Journal:
    """Append-only JSON lines of trials. A line that was written stays true, and is never written again.

    Up to `INLINE` values by example stand in the line itself. Longer lists stand in `trials.values` beside it, as float64
    numbers; the line's `stored` then says where. Trials in memory hold views of the disk, so that very many of them need no
    memory.

    Args:
        path: of the journal.
        write: this process writes; others only read and remember.
    """

    def __init__(self, path: Path, write: bool = True) -> None:
        """Reads the journal; drops a torn last line and lines without their values, whose trials are measured again.

        Raises:
            InputError: a damaged line, named by its number.
        """
        self.path = path
        self.trials: dict[str, Trial] = {}
        self._write = write
        self._stored: dict[str, Stored] = {}
        self._lost: set[int] = set()  # numbers of the dropped lines
        self._store = ArrayStore(path.with_suffix(".values"))
        for number, line in numbered_lines(path):
            try:
                self._add(read_line(line))
            except EOFError:
                self._lost.add(number)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{path}, line {number} is damaged ({error}); delete that line and its trial will be measured again"
                ) from error
        if not write:  # what this process appends goes elsewhere
            self._store = ArrayStore.temporary()

    def _add(self, record: Any) -> Trial:
        """Remembers the trial of a line; raises an EOFError if its values were cut short."""
        if not isinstance(record, dict) or not record.get("stored"):
            trial = Trial.from_json(record)
            self._stored.pop(trial.key, None)
        else:
            stored = from_json(Stored, record["stored"])
            if not math.isfinite(stored.mean_logprob):
                raise ValueError("mean_logprob: expected a finite number")
            lists = {name: self._store.numbers(getattr(stored, name)) for name in ("values", "logprobs")}
            trial = Trial.from_json(record | lists)
            if trial.score is not None:
                vars(trial.score)["mean_logprob"] = stored.mean_logprob
            self._stored[trial.key] = stored
        self.trials[trial.key] = trial
        return trial

    @property
    def lost(self) -> int:
        """The number of dropped lines."""
        return len(self._lost)

    def damaged_values(self) -> list[str]:
        """The keys of the trials whose values in `trials.values` are not what was written; reads all values."""
        return [
            key
            for key, stored in self._stored.items()
            if not (self._store.is_intact(stored.values) and self._store.is_intact(stored.logprobs))
        ]

    def get(self, key: str) -> Trial | None:
        """The trial with this key; a failed one too, for it would fail again."""
        return self.trials.get(key)

    def append(self, trial: Trial) -> Trial:
        """`extend` with one trial."""
        return self.extend([trial])[0]

    def extend(self, trials: Sequence[Trial]) -> list[Trial]:
        """Adds trials and, if this process writes, puts their lines on the disk before returning: all or none.

        Trials that were measured together are written together; otherwise a crash could have some measured in other company.

        Returns:
            The trials as the journal holds them; long lists of values no longer take memory.
        """
        if self._write and self._lost:
            self._repair()
        records = [self._record(trial) for trial in trials]
        if self._write:
            append_bytes(self.path, b"".join(map(write_line, records)))
        return [self._add(record) for record in records]

    def _record(self, trial: Trial) -> dict[str, Any]:
        """A line; writes long lists of values first."""
        score = trial.score
        if score is None or max(len(score.values), len(score.logprobs)) <= INLINE:
            return trial.to_json() | {"stored": None}
        stored = Stored(score.mean_logprob, self._store.append(score.values), self._store.append(score.logprobs))
        record = replace(trial, score=replace(score, values=(), logprobs=())).to_json()
        return record | {"values": None, "logprobs": None, "stored": to_json(stored)}

    def _repair(self) -> None:
        """Deletes the dropped lines, before anything is written in their place."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        with open(partial, "wb") as file:
            file.writelines(line for number, line in numbered_lines(self.path) if number not in self._lost)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)
        sync(self.path.parent, files=False)
        self._lost.clear()


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of every line of a file that may be missing."""
    if path.exists():
        with open(path, "rb") as lines:
            yield from enumerate(lines, start=1)


def read_line(line: bytes) -> Any:
    """The record of a line; raises an EOFError if it was cut short, a ValueError if it is not what was written."""
    if not line.endswith(b"\n"):
        raise EOFError("a torn line")
    text, found, rest = line.rpartition(CHECK)
    if found and str(zlib.crc32(text + b"}")).encode() != rest.split(b",")[0]:
        raise ValueError("it is not what was written")
    return json.loads(line)


def write_line(record: dict[str, Any]) -> bytes:
    checked = json.dumps(
        {name: value for name, value in record.items() if name != "seconds"}
    )  # in which equal runs differ
    return f'{checked[:-1]}{CHECK.decode()}{zlib.crc32(checked.encode())}, "seconds": {record["seconds"]}}}\n'.encode()
