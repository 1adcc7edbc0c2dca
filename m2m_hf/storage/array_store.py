"""An append-only file of numbers, for the values by example of very many trials."""

import os
import tempfile
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2m_hf.core.arrays import TYPE, LazyArray


def append_bytes(path: Path, content: bytes, place: int | None = None, durable: bool = True) -> None:
    """Writes `content` at the end of a file, or at `place` and cuts off the rest; on failure the file ends there.

    Args:
        durable: wait until it is on the disk.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        start = os.lseek(file, 0, os.SEEK_END) if place is None else os.lseek(file, place, os.SEEK_SET)
        os.ftruncate(file, start)
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(file, left) :]
            if durable:
                os.fsync(file)
        except BaseException:
            os.ftruncate(file, start)
            raise
    finally:
        os.close(file)


class ArrayStore:
    """An append-only file of float64 numbers (little-endian), read through the system's page cache."""

    def __init__(self, path: Path, durable: bool = True) -> None:
        self.path, self._durable = path, durable
        self._map: Any = np.empty(0, TYPE)

    @classmethod
    def temporary(cls) -> "ArrayStore":
        """A store in a temporary file, which is deleted with it."""
        handle, name = tempfile.mkstemp(prefix="m2m-values-")
        os.close(handle)
        store = cls(Path(name), durable=False)
        weakref.finalize(store, Path(name).unlink, missing_ok=True)
        return store

    @property
    def count(self) -> int:
        """How many whole numbers the file holds; a crash may have left part of another."""
        return self.path.stat().st_size // TYPE.itemsize if self.path.exists() else 0

    def append(self, values: Sequence[float]) -> tuple[int, int]:
        """Writes `values`, and returns their (place, checksum)."""
        content = np.asarray(values, dtype=TYPE).tobytes()
        place = self.count
        append_bytes(self.path, content, place * TYPE.itemsize, self._durable)
        return place, zlib.crc32(content)

    def numbers(self, place: int, count: int) -> LazyArray:
        """`count` numbers from `place` on, read when they are used."""
        return LazyArray(lambda: self.view(place, count), count)

    def view(self, place: int, count: int) -> Any:
        """`count` numbers from `place` on, as an array."""
        if not count:
            return self._map[:0]
        if place + count > len(self._map):
            self._map = np.memmap(self.path, dtype=TYPE, mode="r", shape=(self.count,))
        return self._map[place : place + count]
