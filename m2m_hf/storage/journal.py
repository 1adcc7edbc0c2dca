"""The journal: append-only JSON lines of trials."""

import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from m2m_hf.core.arrays import LazyArray
from m2m_hf.core.trial import Trial
from m2m_hf.errors import InputError
from m2m_hf.storage.array_store import ArrayStore, append_bytes
from m2m_hf.storage.files import sync

INLINE = 500  # longer lists of values stand in `trials.values`
LISTS = ("values", "logprobs")
CHECK = b', "crc32": '  # precedes the checksum of the line up to it


class Journal:
    """Append-only JSON lines of trials. A line that was written stays true, and is never written again.

    Up to `INLINE` values by example stand in the line itself. Longer lists stand in `trials.values` beside it, as float64
    numbers; the line's `stored` then gives `place`, `count` and `crc32` of each list, and their mean log-probability. Trials in
    memory hold views of the disk, so that very many of them need no memory.

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
        self._write = write
        self.trials: dict[str, Trial] = {}
        self.store = ArrayStore(path.with_suffix(".values"))
        self._temporary: ArrayStore | None = None  # holds the values of a process that does not write
        self._lost: set[int] = set()  # numbers of the dropped lines
        available = self.store.count
        for number, line in numbered_lines(path):
            if not line.endswith(b"\n"):
                self._lost.add(number)
                break
            try:
                if is_altered(line):
                    raise InputError("it is not what was written")
                trial = self._parse(json.loads(line), available)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{path}, line {number} is damaged ({error}); delete that line and its trial will be measured again"
                ) from error
            if trial is None:
                self._lost.add(number)
            else:
                self.trials[trial.key] = trial

    def _parse(self, record: Any, available: int) -> Trial | None:
        """The trial of a line; None if its values are missing."""
        stored = record.get("stored") if isinstance(record, dict) else None
        if not stored:
            return Trial.from_json(record)
        try:
            places = {name: (int(stored[name]["place"]), int(stored[name]["count"])) for name in LISTS}
            mean = float(stored["mean_logprob"])
            valid = math.isfinite(mean) and all(isinstance(stored[name]["crc32"], int) for name in LISTS)
        except (KeyError, TypeError, OverflowError) as error:
            raise InputError(f"not a trial: stored is {stored!r:.80}") from error
        if not valid or any(place < 0 or count < 0 for place, count in places.values()):
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
        """The number of dropped lines."""
        return len(self._lost)

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

    def get(self, key: str) -> Trial | None:
        """The trial with this key. A failed one counts too: it would fail again."""
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
        pairs = [self._format(trial) for trial in trials]
        if self._write:
            append_bytes(self.path, b"".join(line for _, line in pairs))
        kept = [trial for trial, _ in pairs]
        self.trials |= {trial.key: trial for trial in kept}
        return kept

    def _format(self, trial: Trial) -> tuple[Trial, bytes]:
        """(the trial as the journal holds it, its line)."""
        record = trial.to_json() | {"stored": None}
        if (score := trial.score) is not None:
            if max(len(score.values), len(score.logprobs)) <= INLINE:
                lists = {name: LazyArray.of(getattr(score, name)) for name in LISTS}
            else:
                lists, record["stored"] = {}, {"mean_logprob": score.mean_logprob}
                for name in LISTS:
                    lists[name], record["stored"][name] = self._store(getattr(score, name))
                    record[name] = None
            kept = replace(score, values=lists["values"], logprobs=lists["logprobs"])
            vars(kept)["mean_logprob"] = score.mean_logprob
            trial = replace(trial, score=kept)
        seconds = record.pop("seconds")  # not checked: equal runs differ in it
        text = json.dumps(record)
        return trial, f'{text[:-1]}{CHECK.decode()}{zlib.crc32(text.encode())}, "seconds": {seconds}}}\n'.encode()

    def _store(self, values: Sequence[float]) -> tuple[LazyArray, dict[str, int]]:
        """Writes a long list; (its view, its entry in `stored`)."""
        if not self._write:
            self._temporary = self._temporary or ArrayStore.temporary()
        store = self.store if self._write or self._temporary is None else self._temporary
        place, checksum = store.append(values)
        return store.numbers(place, len(values)), {"place": place, "count": len(values), "crc32": checksum}


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of every line of a file that may be missing."""
    if path.exists():
        with open(path, "rb") as lines:
            yield from enumerate(lines, start=1)


def is_altered(line: bytes) -> bool:
    """True if a line of a journal differs from what was written, by its checksum."""
    text, found, rest = line.rpartition(CHECK)
    return bool(found) and str(zlib.crc32(text + b"}")).encode() != rest.split(b",")[0]


def damaged_values(path: Path) -> list[str]:
    """The keys of the trials whose values in `trials.values` are not what was written; reads all values."""
    store, damaged = ArrayStore(path.with_suffix(".values")), []
    available = store.count
    for _, line in numbered_lines(path):
        record = json.loads(line) if line.endswith(b"\n") else {}
        lists = [stored for stored in (record.get("stored") or {}).values() if isinstance(stored, dict)]
        if any(stored["place"] + stored["count"] > available for stored in lists):
            continue  # the journal has dropped this line
        arrays = [store.view(stored["place"], stored["count"]) for stored in lists]
        if any(zlib.crc32(array.tobytes()) != stored["crc32"] for array, stored in zip(arrays, lists, strict=True)):
            damaged.append(record["key"])
    return list(dict.fromkeys(damaged))
