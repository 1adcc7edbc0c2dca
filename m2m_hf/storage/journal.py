"""The journal: append-only JSON lines of trials."""

import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from m2m_hf.core.arrays import LazyArray
from m2m_hf.core.trial import Trial
from m2m_hf.errors import InputError
from m2m_hf.storage.array_store import ArrayStore, append_bytes
from m2m_hf.storage.files import sync

INLINE = 500  # values of a trial that its line holds itself


LISTS = ("values", "logprobs")


CHECK = b', "crc32": '  # before the checksum of all that comes before it in a line


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
        self.store = ArrayStore(path.with_suffix(".values"))
        self._aside: ArrayStore | None = None  # what a process keeps that does not write
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
                lists = {name: LazyArray.of(getattr(score, name)) for name in LISTS}
            else:
                if not write:
                    self._aside = self._aside or ArrayStore.temporary()
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
    store, damaged = ArrayStore(path.with_suffix(".values")), []
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
