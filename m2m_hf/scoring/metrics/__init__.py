"""Metrics through `evaluate`: the shipped ones work offline; one of the user's runs code, and only when that is allowed."""

import random
import statistics
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import evaluate

from m2m_hf.errors import InputError

SHIPPED = ("accuracy", "exact_match", "macro_f1", "numeric_match", "token_f1")
RESAMPLES = 200  # of the bootstrap: its error on a standard error is then about 5 %


class Metric:
    """One metric: predictions and references in, a value with its standard error and the values of the examples out.

    Args:
        name: a shipped metric, or the path or Hub id of an `evaluate` module.
        key: which of the module's results is the score; by default the one that is called like the module, or the only number.
        allow_code: whether a module that is not shipped may be loaded, which runs it.
        where: for messages.

    Raises:
        InputError: not allowed, or not there.
    """

    def __init__(self, name: str, key: str | None, allow_code: bool, where: str) -> None:
        if name not in SHIPPED and not allow_code:
            raise InputError(
                f"{where}.metric: {name!r} is not one of {', '.join(SHIPPED)}. A metric of your own or of the Hub runs code when "
                "it is loaded; say allow_metric_code: true if you trust it"
            )
        source = str(Path(__file__).parent / name) if name in SHIPPED else name
        try:
            self._module = evaluate.load(source, keep_in_memory=True)
        except (OSError, ValueError, ImportError, ConnectionError) as error:
            raise InputError(f"{where}.metric: {name!r} cannot be loaded ({error})") from error
        self.name = name
        self._key = key
        self._where = where

    @property
    def takes_text(self) -> bool:
        """Whether the module compares texts, and not indices."""
        features = self._module.features
        first = features[0] if isinstance(features, list) else features
        return getattr(first["predictions"], "dtype", "string") == "string"

    @cached_property
    def by_example(self) -> bool:
        """Whether the module gives a value for every example, seen on one that is right."""
        sample: list[Any] = ["a"] if self.takes_text else [0]
        return "per_example" in self._module.compute(predictions=sample, references=sample)

    def __call__(
        self, predictions: Sequence[Any], references: Sequence[Any]
    ) -> tuple[float, float | None, tuple[float, ...]]:
        """(value, standard error, value of every example; none where the metric is one of the whole corpus).

        The standard error of a corpus metric is that of 200 bootstrap resamples of the examples, drawn from a fixed seed.

        Raises:
            InputError: the module gives no number, or several of which none was chosen.
        """
        result = self._module.compute(predictions=list(predictions), references=list(references))
        each = result.get("per_example")
        value = self._number(result)
        if each is not None:
            return value, None, tuple(map(float, each))

        def again(chosen: list[int]) -> float:
            # `_compute` is what every module defines; `compute` around it writes and reads a file.
            drawn = {"predictions": [predictions[i] for i in chosen], "references": [references[i] for i in chosen]}
            return self._number(self._module._compute(**drawn))

        return value, bootstrap(len(predictions), again), ()

    def _number(self, result: dict[str, Any]) -> float:
        numbers = {key: float(value) for key, value in result.items() if isinstance(value, (int, float))}
        key = self._key or next((key for key in (self._module.name, Path(self.name).stem) if key in numbers), None)
        if key is None and len(numbers) == 1:
            key = next(iter(numbers))
        if key not in numbers:
            raise InputError(
                f"{self._where}.metric: {self.name!r} gives {', '.join(result)}; say which of them is the score with metric_key"
            )
        return numbers[key]


def bootstrap(n: int, statistic: Callable[[list[int]], float]) -> float:
    """Standard error of a statistic of n examples: its standard deviation over resamples with replacement (Efron, 1979).

    Args:
        statistic: its value on the examples with these indices; the resamples come from a fixed seed.
    """
    draw = random.Random(0)
    return statistics.stdev(statistic([draw.randrange(n) for _ in range(n)]) for _ in range(RESAMPLES))


def module_file(name: str) -> Path | None:
    """The file of a shipped metric or of a local module of the user's; None for one of the Hub, or what is no module."""
    path = Path(__file__).parent / name if name in SHIPPED else Path(name)
    file = path / f"{path.name}.py" if path.is_dir() else path
    return file if file.is_file() else None
