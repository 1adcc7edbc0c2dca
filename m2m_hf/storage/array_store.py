"""An append-only file of numbers, for the values by example of very many trials."""

import os
import tempfile
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m2m_hf.core.arrays import TYPE, LazyArray


def append_bytes(path: Path, content: bytes, place: int | None = None) -> None:
    """Writes `content` at the end of a file, or at `place` and cuts off the rest; on failure the file ends there."""
    with open(path, "ab", buffering=0) as file:
        start = file.truncate(place)
        try:
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(start)
            raise


@dataclass(frozen=True)
class Place:
    """Where a list stands in the file: the number of its first value, how many there are, the checksum of their bytes."""

    place: int
    count: int
    crc32: int


class ArrayStore:
    """An append-only file of float64 numbers (little-endian), read through the system's page cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: Any = np.empty(0, TYPE)

    @classmethod
    def temporary(cls) -> "ArrayStore":
        """A store in a temporary file, which is deleted with it."""
        handle, name = tempfile.mkstemp(prefix="m2m-values-")
        os.close(handle)
        store = cls(Path(name))
        weakref.finalize(store, store.path.unlink, missing_ok=True)
        return store

    @property
    def count(self) -> int:
        """How many whole numbers the file holds; a crash may have left part of another."""
        return self.path.stat().st_size // TYPE.itemsize if self.path.exists() else 0

    def append(self, values: Sequence[float]) -> Place:
        content = np.asarray(values, dtype=TYPE).tobytes()
        place = self.count
        append_bytes(self.path, content, place * TYPE.itemsize)
        return Place(place, len(values), zlib.crc32(content))

    def numbers(self, where: Place) -> LazyArray:
        """A list, read when it is used; raises an EOFError if the file does not hold it."""
        if min(where.place, where.count) < 0:
            raise ValueError(f"expected no negative number, got {where}")
        if where.place + where.count > self.count:
            raise EOFError(f"{self.path} ends before {where}")
        return LazyArray(lambda: self._view(where), where.count)

    def is_intact(self, where: Place) -> bool:
        """True if a list is what was written."""
        return zlib.crc32(self._view(where).tobytes()) == where.crc32

    def _view(self, where: Place) -> Any:
        end = where.place + where.count
        if end > len(self._map):
            self._map = np.memmap(self.path, dtype=TYPE, mode="r", shape=(self.count,))
        return self._map[where.place : end]
