"""The values that the search speaks in: mixture, search space, score, trial. Frozen, JSON in and out."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from math import comb, inf, isclose, isfinite
from random import Random
from typing import Any

import numpy as np

from m2m_hf.core.arrays import Numbers
from m2m_hf.errors import InputError


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


def walk(mixtures: Iterable[Mixture]) -> list[Mixture]:
    """Mixtures in the order of the binary reflected Gray code (Gray, 1953) of who is in them.

    Of all subsets each then differs from the one before by a single candidate; of some of them, by few.
    """
    several = list(mixtures)
    place = {name: number for number, name in enumerate(sorted({name for one in several for name in one.names}))}

    def rank(mixture: Mixture) -> int:
        code = sum(1 << place[name] for name in mixture.names)
        number = code
        while code := code >> 1:
            number ^= code
        return number

    return sorted(several, key=lambda mixture: (rank(mixture), mixture.items))


def row_counts(mixture: Mixture, rows: Mapping[str, int]) -> dict[str, int]:
    """How many rows of each candidate make the mixture: all of them where the weights are equal, else in proportion to these.

    Args:
        rows: name -> rows that the candidate has.
    """
    if len(set(mixture.weights.values())) <= 1:
        return {name: rows[name] for name in mixture.names}
    total = min(rows[name] / weight for name, weight in mixture.items)
    return {name: max(1, min(rows[name], round(weight * total))) for name, weight in mixture.items}


@dataclass(frozen=True)
class SearchSpace:
    """The mixtures that may be proposed.

    Args:
        names: the candidates that may be in a mixture.
        required: every mixture contains these.
        min_datasets: fewest candidates in a mixture.
        max_datasets: most candidates in a mixture (None: all).
        costs: what each candidate costs, in any unit; absent ones nothing.
        max_cost: most that the candidates of a mixture may cost together.
        continuous: whether mixtures of unequal weights may be proposed too.

    Raises:
        InputError: no mixture meets all of it.
    """

    names: tuple[str, ...]
    required: frozenset[str] = frozenset()
    min_datasets: int = 1
    max_datasets: int | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    max_cost: float = inf
    continuous: bool = False

    def __post_init__(self) -> None:
        absent = sorted(self.required - set(self.names))
        if absent:
            raise InputError(f"required: {', '.join(absent)} cannot be in a mixture, being excluded")
        if self.fewest > self.most:
            raise InputError(
                f"no mixture is possible: at least {self.fewest} candidates are asked for (min_datasets, or those required) "
                f"and at most {self.most} allowed (max_datasets, or those not excluded)"
            )
        cheapest = sorted(set(self.names) - self.required, key=self.cost_of)[: self.fewest - len(self.required)]
        least = sum(map(self.cost_of, [*self.required, *cheapest]))
        if not self.allows_cost(least):
            raise InputError(f"max_cost: the cheapest mixture allowed costs {least:g}, more than {self.max_cost:g}")

    @property
    def fewest(self) -> int:
        return max(1, self.min_datasets, len(self.required))

    @property
    def most(self) -> int:
        return min(len(self.names), self.max_datasets or len(self.names))

    def cost_of(self, name: str) -> float:
        return self.costs.get(name, 0.0)

    def allows(self, names: Collection[str]) -> bool:
        """Whether these candidates may be a mixture."""
        return (
            self.fewest <= len(names) <= self.most
            and self.required <= set(names) <= set(self.names)
            and self.allows_cost(sum(map(self.cost_of, names)))
        )

    def allows_cost(self, cost: float) -> bool:
        return cost <= self.max_cost * (1 + 1e-9)

    def __contains__(self, mixture: Mixture) -> bool:
        return self.allows(mixture.names) and (self.continuous or len(set(mixture.weights.values())) == 1)

    def subsets(self) -> Iterator[Mixture]:
        """Every allowed subset, smaller ones first, then in the order of `names`."""
        for size in range(self.fewest, self.most + 1):
            for names in combinations(self.names, size):
                if self.allows(names):
                    yield Mixture.subset(names)

    def at_most(self, count: int) -> bool:
        """Whether there are no more than `count` subsets, costs and required candidates aside."""
        return sum(comb(len(self.names), size) for size in range(self.fewest, self.most + 1)) <= count

    def added(self, mixture: Mixture) -> list[Mixture]:
        """The allowed subsets with one candidate more."""
        return self._allowed([*mixture.names, name] for name in self.names if name not in mixture.names)

    def dropped(self, mixture: Mixture) -> list[Mixture]:
        """The allowed subsets with one candidate less."""
        return self._allowed([other for other in mixture.names if other != name] for name in mixture.names)

    def swapped(self, mixture: Mixture) -> list[Mixture]:
        """The allowed subsets in which one candidate has taken another's place."""
        outside = [name for name in self.names if name not in mixture.names]
        return self._allowed(
            [*(other for other in mixture.names if other != old), new] for old in mixture.names for new in outside
        )

    def _allowed(self, several: Iterable[list[str]]) -> list[Mixture]:
        return [Mixture.subset(names) for names in several if self.allows(names)]

    def step(self, mixture: Mixture, rng: Random, tries: int = 100) -> Mixture | None:
        """A random allowed subset that one candidate more, one less or another one makes; None where many tries find none."""
        inside, outside = list(mixture.names), [name for name in self.names if name not in mixture.names]
        for _ in range(tries):
            kind = rng.choice(("add", "drop", "swap"))
            names = set(inside)
            if kind != "add":
                names.discard(rng.choice(inside))
            if kind != "drop" and outside:
                names.add(rng.choice(outside))
            if names != set(inside) and self.allows(names):
                return Mixture.subset(names)
        return None

    def nearest(self, order: Sequence[str], size: int) -> tuple[str, ...]:
        """The allowed candidates that come first in `order`: what is required, and others up to `size` as far as `max_cost` goes.

        Args:
            order: all names, the most wanted first.
        """
        size = min(max(size, self.fewest), self.most)
        taken = sorted(self.required)
        left = [name for name in order if name not in self.required]
        for name in list(left):
            if len(taken) == size:
                break
            others = sorted(self.cost_of(other) for other in left if other != name and other not in taken)
            rest = others[: max(0, self.fewest - len(taken) - 1)]  # what it takes to be as many as there must be
            if self.allows_cost(sum(map(self.cost_of, [*taken, name])) + sum(rest)):
                taken.append(name)
        return tuple(sorted(taken))

    def draw(self, rng: Random) -> Mixture:
        """A random mixture: all sizes alike, then all candidates alike; with `continuous`, its weights uniform on the simplex."""
        names = self.nearest(rng.sample(self.names, len(self.names)), rng.randint(self.fewest, self.most))
        return (
            self.weighted({name: rng.expovariate(1.0) for name in names}) if self.continuous else Mixture.subset(names)
        )

    @staticmethod
    def weighted(values: Mapping[str, float], drop: bool = False) -> Mixture:
        """The mixture whose weights are in proportion to `values` (≥ 0, not all 0).

        Args:
            drop: leave out shares below a hundredth, unless all are; otherwise they are raised to it, or to half an equal share.
        """
        total = sum(values.values())
        shares = {name: value / total for name, value in values.items()}
        if drop and max(shares.values()) >= 0.01:
            shares = {name: share for name, share in shares.items() if share >= 0.01}
        least = min(0.01, 0.5 / len(shares))
        shares = {name: max(share, least) for name, share in shares.items()}
        return Mixture.of({name: share / sum(shares.values()) for name, share in shares.items()})


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
        gradient: the derivative of the mean log-probability by the weight of every candidate of the mixture, in the order of
            its names. Empty where it was not asked for.
    """

    value: float
    stderr: float | None = None
    values: Sequence[float] = ()
    logprobs: Sequence[float] = ()
    gradient: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Sequence[float], logprobs: Sequence[float] = ()) -> "Score":
        """The mean of the examples' values, with its standard error."""
        return cls(*mean_and_stderr(values), tuple(values), tuple(logprobs))

    @property
    def finite(self) -> bool:
        """Whether all its numbers are."""
        return all(np.isfinite(one).all() for one in (self.value, self.stderr or 0.0, self.values, self.logprobs))

    @cached_property
    def mean_logprob(self) -> float:
        """0 where there are none."""
        return float(np.mean(self.logprobs)) if self.logprobs else 0.0


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
        objective: `merged` (the adapters' exact parameter average) or another merge method with its parameters, such as
            `ties(scaling=1, density=0.2)`; `gradient` (the average with the derivatives by the weights); `ensemble` (the average
            of the adapters' probabilities); `trained` (the model fine-tuned on the mixture).
        target: name of the target.
        rung: how many of the target's examples were seen.
        state: `complete`; `pruned` for a rung of a race, where only some examples were seen (the values of a mixture that went
            further stand in a later trial); or `failed` with a `reason`.
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
            "gradient": list(score.gradient) if score else None,
        }

    @classmethod
    def from_json(cls, record: Any) -> "Trial":
        """The inverse of `to_json`.

        Raises:
            InputError: the record is not one that `to_json` wrote.
        """
        try:
            reason = wrong(record)
            if reason:
                raise InputError(f"not a trial: {reason}")
            score = None
            if record["state"] != "failed":
                values, logprobs = (numbers(record[key]) for key in ("values", "logprobs"))
                score = Score(record["score"], record["stderr"], values, logprobs, tuple(numbers(record["gradient"])))
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
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(str(error) if isinstance(error, InputError) else f"not a trial: {error!r}") from error


STATES = ("complete", "pruned", "failed")


def wrong(record: Any) -> str | None:
    """What a journal line has in it that no trial has; None where it is one."""
    if not isinstance(record, dict):
        return f"expected an object, got {record!r:.80}"

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)

    for key in ("key", "objective", "target", "state"):
        if not isinstance(record[key], str):
            return f"{key} is {record[key]!r:.80}"
    if record["state"] not in STATES:
        return f"state is {record['state']!r:.80}; expected {', '.join(STATES)}"
    if not isinstance(record["names"], list) or not all(isinstance(name, str) for name in record["names"]):
        return "names are no list of texts"
    if not isinstance(record["rung"], int) or record["rung"] < 0 or not number(record["seconds"]):
        return "rung or seconds are no numbers"
    if record["state"] == "failed":
        return None if isinstance(record["reason"], str) else "it failed without a reason"
    if not number(record["score"]) or not (record["stderr"] is None or number(record["stderr"])):
        return "score or stderr are no finite numbers"
    return None


def numbers(given: Any) -> Numbers:
    """A list of finite numbers.

    Raises:
        ValueError: it is none.
    """
    if isinstance(given, Numbers):
        return given
    array = np.array(given)
    right = isinstance(given, list) and array.ndim == 1 and (array.dtype.kind in "fiu" or not given)
    if not right or not np.isfinite(array).all():
        raise ValueError(f"expected a list of finite numbers, got {given!r:.80}")
    return Numbers.of(array)


@dataclass(frozen=True)
class Standing:
    """How one mixture stands on all targets together; what a strategy is sent and what is ranked.

    Args:
        trials: target -> its trial; in a race the last rung that the mixture reached.
        weights: target -> its weight.
        short: the targets on which the mixture is worse than the base model by more than their `min_delta`.
        offset: what to add to the score of a mixture that was pruned, for an estimate of what it would have been on all
            examples: by how much a mixture that was scored on all of them did better on those than on the ones seen here.
    """

    mixture: Mixture
    trials: Mapping[str, Trial]
    weights: Mapping[str, float]
    short: tuple[str, ...] = ()
    offset: float = 0.0

    @cached_property
    def score(self) -> Score | None:
        """The weighted mean of the targets' scores; None where one of them failed.

        The standard error takes the targets' examples as drawn independently. Of several targets only value and standard
        error are given: their examples are not the same ones.
        """
        scores = {target: trial.score for target, trial in self.trials.items() if trial.score}
        if len(scores) < len(self.trials):
            return None
        return next(iter(scores.values())) if len(scores) == 1 else Score(*mean_over_targets(scores, self.weights))

    @property
    def mean_logprob(self) -> float:
        """Of the right answers, over all targets that have them, by their weights; breaks ties."""
        return sum(
            self.weights[target] * trial.score.mean_logprob for target, trial in self.trials.items() if trial.score
        )

    @property
    def pruned(self) -> bool:
        """Whether a race ended before the mixture had seen all examples."""
        return any(trial.state == "pruned" for trial in self.trials.values())

    @property
    def estimate(self) -> float | None:
        """The score on all examples, as far as it is known; None where a target failed."""
        return None if self.score is None else self.score.value + self.offset

    @property
    def complete(self) -> bool:
        """Whether every target has a score over all its examples."""
        return self.score is not None and not self.pruned

    @property
    def may_be_chosen(self) -> bool:
        return self.complete and not self.short


def mean_over_targets(scores: Mapping[str, Score], weights: Mapping[str, float]) -> tuple[float, float | None]:
    """The weighted mean of targets' scores with its standard error, their examples taken as drawn independently.

    Args:
        scores: target -> score.
        weights: of the targets, not necessarily of sum 1.
    """
    total = sum(weights[target] for target in scores)
    parts = {target: weights[target] / total for target in scores}
    value = sum(parts[target] * score.value for target, score in scores.items())
    errors = [None if score.stderr is None else parts[target] * score.stderr for target, score in scores.items()]
    return value, None if None in errors else sum(error**2 for error in errors if error is not None) ** 0.5


def mean_and_stderr(values: Any) -> tuple[float, float]:
    """Mean and its standard error s/√n with the n−1 estimate of s (0 where n is 1)."""
    array = np.asarray(values, dtype=float)
    n = len(array)
    with np.errstate(invalid="ignore"):  # what is not finite is found and named elsewhere
        return float(array.mean()), float(array.std(ddof=1) / n**0.5) if n > 1 else 0.0
