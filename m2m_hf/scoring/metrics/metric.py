"""Metrics through `evaluate`. The shipped ones work offline; a metric of the user's runs code, so it must be allowed."""

import random
import statistics
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from m2m_hf.config.targets import SCORERS, TargetConfig
from m2m_hf.errors import InputError
from m2m_hf.storage.files import digest_of

FOLDER = Path(__file__).parent
SHIPPED = dict.fromkeys(("accuracy", "exact_match", "macro_f1", "numeric_match", "token_f1"), FOLDER / "shipped.py")
SHIPPED |= {"instructions": FOLDER / "instructions.py"}
RESAMPLES = 200  # of the bootstrap: its error on a standard error is then about 5 %


class Metric:
    """Predictions and references in; a value, its standard error and the values of the examples out.

    Args:
        name: a shipped metric, or the path or Hub id of an `evaluate` module.
        key: which of the module's results is the score; by default the one named like the module, or the only number.
        allow_code: whether a module that is not shipped may be loaded, which runs it.
        where: the target, for messages.
    """

    def __init__(self, name: str, key: str | None, allow_code: bool, where: str) -> None:
        import evaluate

        if name not in SHIPPED and not allow_code:
            raise InputError(
                f"{where}.metric: {name!r} is not one of {', '.join(SHIPPED)}. A metric of your own or of the Hub runs code when "
                "it is loaded; say allow_metric_code: true if you trust it"
            )
        source, part = (str(SHIPPED[name]), name) if name in SHIPPED else (name, None)
        try:
            self._module = evaluate.load(source, config_name=part, keep_in_memory=True)
        except (OSError, ValueError, ImportError, ConnectionError) as error:
            raise InputError(f"{where}.metric: {name!r} cannot be loaded ({error})") from error
        self.name, self._key, self._where = name, key, where

    @property
    def takes_text(self) -> bool:
        """True if the module compares texts, and not indices."""
        features = self._module.features
        first = features[0] if isinstance(features, list) else features
        return getattr(first["predictions"], "dtype", "string") == "string"

    @cached_property
    def by_example(self) -> bool:
        """True if the module gives a value for every example; one of the user's is tried on one that is right."""
        if self.name in SHIPPED:
            return self.name != "macro_f1"
        sample: list[Any] = ["a"] if self.takes_text else [0]
        return "per_example" in self._module.compute(predictions=sample, references=sample)

    def check(self, references: Sequence[str]) -> None:
        """Refuses references that a module of ours cannot read."""
        readable = self.name in SHIPPED and hasattr(self._module, "check")
        for number, reference in enumerate(references if readable else (), start=1):
            try:
                self._module.check(reference)
            except ValueError as error:
                raise InputError(f"{self._where}, row {number}.completion: {error}") from error

    def __call__(
        self, predictions: Sequence[Any], references: Sequence[Any]
    ) -> tuple[float, float | None, tuple[float, ...]]:
        """(value, standard error, value of every example).

        A metric of the whole corpus has no values of examples; its standard error is that of a bootstrap.
        """
        # `compute` writes and reads a file, and converts what a module of ours is given as it should be.
        compute = self._module._compute if self.name in SHIPPED else self._module.compute
        result = compute(predictions=list(predictions), references=list(references))
        value = self._number(result)
        if "per_example" in result:
            return value, None, tuple(map(float, result["per_example"]))

        def resampled(chosen: list[int]) -> float:
            sample = {"predictions": [predictions[i] for i in chosen], "references": [references[i] for i in chosen]}
            return self._number(self._module._compute(**sample))

        return value, bootstrap(len(predictions), resampled), ()

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


def load_metric(config: TargetConfig, allow_code: bool, where: str) -> Metric | None:
    """The metric of a target; None for `logprob`, which is none."""
    if config.metric == "logprob":
        return None
    metric = Metric(config.metric, config.metric_key, allow_code, where)
    if metric.takes_text != (SCORERS[config.kind].column == "completion"):
        compared, given = ("texts", "indices") if metric.takes_text else ("indices", "texts")
        raise InputError(
            f"{where}.metric: {config.metric!r} compares {compared}, and scorer {config.kind} gives {given}"
        )
    return metric


def metric_fingerprint(config: TargetConfig) -> list[str | None]:
    """Identifies a target's metric: the bytes of its module, and its name where that module is shipped or not local."""
    path = SHIPPED.get(config.metric, Path(config.metric))
    module = path / f"{path.name}.py" if path.is_dir() else path
    digest = digest_of(module) if module.is_file() else None
    name = config.metric if config.metric in SHIPPED or digest is None else None
    return [name, digest, config.metric_key]


def bootstrap(n: int, statistic: Callable[[list[int]], float]) -> float:
    """Standard error of a statistic of examples: its standard deviation over resamples with replacement (Efron, 1979)."""
    draw = random.Random(0)
    return statistics.stdev(statistic([draw.randrange(n) for _ in range(n)]) for _ in range(RESAMPLES))
