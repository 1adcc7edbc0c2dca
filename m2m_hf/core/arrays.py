"""Lists of numbers that need not fit into memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np

TYPE = np.dtype("<f8")


class LazyArray(Sequence[float]):
    """Numbers that behave like a tuple of floats, as compact as an array; `load` reads the array when they are used."""

    def __init__(self, load: Callable[[], Any], count: int) -> None:
        self._load, self._count = load, count

    @classmethod
    def of(cls, values: Any) -> "LazyArray":
        """Holds `values` in memory."""
        array = np.array(values, dtype=TYPE)
        return cls(lambda: array, len(array))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> float: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[float, ...]: ...

    def __getitem__(self, index: int | slice) -> float | tuple[float, ...]:
        item = self._load()[index]
        return tuple(item.tolist()) if isinstance(index, slice) else float(item)

    def __iter__(self) -> Iterator[float]:
        return iter(self._load().tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and bool(np.array_equal(self._load(), np.asarray(other, dtype=TYPE)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self._load(), dtype=dtype or TYPE)
