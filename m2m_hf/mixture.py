"""The values that the search speaks in: mixture, search space, score, trial. Plain Python, frozen, JSON in and out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import isclose, isfinite
from typing import Any

from .errors import InputError


@dataclass(frozen=True)
class Mixture:
    """Candidate names and their weights: sorted by name, every weight > 0, sum 1.

    A subset is a mixture of equal weights. The mixture without any candidate stands for the base model, which is scored
    like every other but can never be chosen.
    """

    items: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        names = self.names
        if list(names) != sorted(set(names)):
            raise ValueError(f"names must be sorted and unique, got {names}")
        if any(not isfinite(weight) or weight <= 0 for weight in self.weights.values()):
            raise ValueError(f"weights must be positive and finite, got {self.weights}")
        if names and not isclose(sum(self.weights.values()), 1.0, rel_tol=1e-9):
            raise ValueError(f"weights must sum to 1, got {sum(self.weights.values())}")

    @classmethod
    def subset(cls, names: Iterable[str]) -> "Mixture":
        """The equal-weight mixture of `names`; without names, the base model."""
        ordered = sorted(names)
        return cls(tuple((name, 1.0 / len(ordered)) for name in ordered))

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> "Mixture":
        """The mixture with these weights (> 0, sum 1)."""
        return cls(tuple(sorted(weights.items())))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.items)

    @property
    def weights(self) -> dict[str, float]:
        return dict(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __str__(self) -> str:
        """`base model`, `a + b`, or `0.7 a + 0.3 b` where the weights differ."""
        if not self.items:
            return "base model"
        if len(set(self.weights.values())) == 1:
            return " + ".join(self.names)
        return " + ".join(f"{weight:.3g} {name}" for name, weight in self.items)


BASE = Mixture(())


@dataclass(frozen=True)
class SearchSpace:
    """The mixtures that may be proposed: non-empty subsets of `names` that contain all of `required`."""

    names: tuple[str, ...]
    required: frozenset[str] = frozenset()

    def subsets(self) -> Iterator[Mixture]:
        """Every allowed subset, smaller ones first, then in the order of `names`."""
        for size in range(1, len(self.names) + 1):
            for names in combinations(self.names, size):
                if self.required.issubset(names):
                    yield Mixture.subset(names)

    def __contains__(self, mixture: Mixture) -> bool:
        return bool(mixture.items) and self.required <= set(mixture.names) <= set(self.names)


@dataclass(frozen=True)
class Score:
    """What an objective says of a mixture on one target. Higher is better, always.

    Args:
        value: the target's metric over all examples.
        stderr: its standard error over the examples, taken as a random sample (0 for a single example); None where the scorer
            gives no more than a number.
        values: one number per example in the order of the target's rows; their mean is `value`. Empty for metrics of a
            whole corpus.
        logprobs: per example, the log-probability of the right answer (natural logarithm, at most 0). Empty where the scorer
            has none.
    """

    value: float
    stderr: float | None = None
    values: tuple[float, ...] = ()
    logprobs: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Sequence[float], logprobs: Sequence[float] = ()) -> "Score":
        """The mean of the examples' values, with its standard error."""
        return cls(*mean_and_stderr(values), tuple(values), tuple(logprobs))

    @property
    def mean_logprob(self) -> float:
        """0 where there are none."""
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else 0.0


@dataclass(frozen=True)
class Failure:
    """Why a mixture has no score on a target."""

    reason: str


@dataclass(frozen=True)
class Trial:
    """One mixture scored by one objective on one target; a line of the journal.

    Args:
        key: fingerprint of everything the score depends on; equal keys mean the same measurement.
        mixture: what was scored.
        objective: `merged` (the adapters' exact parameter average).
        target: name of the target.
        rung: how many of the target's examples were seen.
        state: `complete`, or `failed` with a `reason`.
        score: absent for a failed trial.
        seconds: wall time of the measurement.
    """

    key: str
    mixture: Mixture
    objective: str
    target: str
    rung: int
    state: str
    score: Score | None
    seconds: float
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A flat record whose columns are the same for every trial, so that `load_dataset("json")` reads the journal."""
        score = self.score
        return {
            "key": self.key,
            "names": list(self.mixture.names),
            "weights": list(self.mixture.weights.values()),
            "objective": self.objective,
            "target": self.target,
            "rung": self.rung,
            "state": self.state,
            "score": score.value if score else None,
            "stderr": score.stderr if score else None,
            "seconds": round(self.seconds, 3),
            "reason": self.reason,
            "values": list(score.values) if score else None,
            "logprobs": list(score.logprobs) if score else None,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Trial":
        """The inverse of `to_json`.

        Raises:
            InputError: the record is not one that `to_json` wrote.
        """
        try:
            score = None
            if record["state"] == "complete":
                score = Score(record["score"], record["stderr"], tuple(record["values"]), tuple(record["logprobs"]))
            return cls(
                key=record["key"],
                mixture=Mixture(tuple(zip(record["names"], record["weights"], strict=True))),
                objective=record["objective"],
                target=record["target"],
                rung=record["rung"],
                state=record["state"],
                score=score,
                seconds=record["seconds"],
                reason=record["reason"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"not a trial: {error!r}") from error


@dataclass(frozen=True)
class Standing:
    """How one mixture stands on all targets together; what a strategy is sent and what is ranked.

    Args:
        trials: target -> its trial.
        weights: target -> its weight.
        short: the targets on which the mixture is worse than the base model by more than their `min_delta`.
    """

    mixture: Mixture
    trials: Mapping[str, Trial]
    weights: Mapping[str, float]
    short: tuple[str, ...] = ()

    @cached_property
    def score(self) -> Score | None:
        """The weighted mean of the targets' scores; None where one of them failed.

        The standard error takes the targets' examples as drawn independently. Of several targets only value and standard
        error are given: their examples are not the same ones.
        """
        scores = {target: trial.score for target, trial in self.trials.items() if trial.score}
        if len(scores) < len(self.trials):
            return None
        if len(scores) == 1:
            return next(iter(scores.values()))
        total = sum(self.weights.values())
        parts = {target: self.weights[target] / total for target in scores}
        value = sum(parts[target] * score.value for target, score in scores.items())
        errors = [None if score.stderr is None else parts[target] * score.stderr for target, score in scores.items()]
        stderr = None if None in errors else sum(error**2 for error in errors if error is not None) ** 0.5
        return Score(value, stderr)

    @property
    def mean_logprob(self) -> float:
        """Of the right answers, over all targets that have them, by their weights; breaks ties."""
        return sum(
            self.weights[target] * trial.score.mean_logprob for target, trial in self.trials.items() if trial.score
        )

    @property
    def may_be_chosen(self) -> bool:
        return self.score is not None and not self.short


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error s/√n with the n−1 estimate of s (0 where n is 1)."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, 0.0
    return mean, (sum((value - mean) ** 2 for value in values) / (n - 1) / n) ** 0.5
