"""What a judge was asked and what it said, kept in the run folder: nothing is asked twice, and every request is counted."""

import json
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2m_hf.errors import InputError
from m2m_hf.storage.array_store import append_bytes
from m2m_hf.storage.journal import numbered_lines

FIRST, SECOND, TIE, NONE = "first", "second", "tie", "none"  # the answer that a judge prefers, or why none
KINDS = {"request": 1, "unsent": -1, "verdict": 0}  # of a line -> by how much it changes the number of requests


@dataclass(frozen=True)
class Judged:
    """What a judge has cost and said: requests, and verdicts by the place of the preferred answer; `none` count as ties."""

    requests: int
    first: int
    second: int
    tie: int
    none: int

    @classmethod
    def read(cls, path: Path) -> "Judged":
        """Of the log at this place; all 0 where there is none."""
        log = Judgements(path)
        said = Counter(log.verdicts.values())
        return cls(log.requests, *(said[one] for one in (FIRST, SECOND, TIE, NONE)))

    @property
    def verdicts(self) -> int:
        return self.first + self.second + self.tie + self.none


class Judgements:
    """Append-only JSON lines, written by several threads: a `request` before it is sent, its `verdict` once it is known.

    `unsent` takes a request back that met no server. A torn last line is dropped.

    Raises:
        InputError: a damaged line, named by its number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests = 0
        self.verdicts: dict[str, str] = {}
        self._lock = threading.Lock()
        self._end: int | None = None  # where a torn last line begins
        whole = 0
        for number, line in numbered_lines(path):
            if not line.endswith(b"\n"):
                self._end = whole
                break
            whole += len(line)
            try:
                self._add(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise InputError(
                    f"{path}, line {number} is damaged ({error}); delete that line, and what it says is asked again"
                ) from error

    def _add(self, record: dict[str, Any]) -> None:
        (kind,) = KINDS.keys() & record.keys()
        self.requests += KINDS[kind]
        if kind == "verdict":
            if record["says"] not in (FIRST, SECOND, TIE, NONE):
                raise ValueError(f"no verdict: {record['says']!r}")
            self.verdicts[str(record["verdict"])] = record["says"]

    def _append(self, record: dict[str, Any]) -> None:
        """Puts a line on the disk; needs the lock."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_bytes(self.path, (json.dumps(record) + "\n").encode(), self._end)
        self._end = None
        self._add(record)

    def request(self, key: str, limit: int) -> bool:
        """Counts a request that is about to be sent; False where the limit is reached."""
        with self._lock:
            if self.requests >= limit:
                return False
            self._append({"request": key})
            return True

    def unsent(self, key: str) -> None:
        """Takes a request back that met no server."""
        with self._lock:
            self._append({"unsent": key})

    def verdict(self, key: str, says: str, reply: str) -> None:
        """Keeps a verdict, with what the judge wrote."""
        with self._lock:
            self._append({"verdict": key, "says": says, "reply": reply})
