"""Lists of numbers that need not fit into memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np

TYPE = np.dtype("<f8")


class LazyArray(Sequence[float]):
    """A list of numbers as compact as an array, read from the disk where it lies there; behaves as a tuple of floats does.

    Args:
        take: gives the array, of shape (count,).
        count: how many.
    """

    __slots__ = ("_count", "_take")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, take: Callable[[], Any], count: int) -> None:
        self._take, self._count = take, count

    @classmethod
    def of(cls, values: Any) -> "LazyArray":
        """In memory."""
        array = np.array(values, dtype=TYPE)
        return cls(lambda: array, len(array))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> float: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[float, ...]: ...

    def __getitem__(self, index: int | slice) -> float | tuple[float, ...]:
        found = self._take()[index]
        return tuple(found.tolist()) if isinstance(index, slice) else float(found)

    def __iter__(self) -> Iterator[float]:
        return iter(self._take().tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(other) == len(self) and bool(np.array_equal(self._take(), np.asarray(other, dtype=TYPE)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self._take(), dtype=dtype or TYPE)

    def __reduce__(self) -> Any:
        return LazyArray.of, (tuple(self),)

    def __repr__(self) -> str:
        return repr(tuple(self))
