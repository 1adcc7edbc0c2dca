"""A scored mixture: a trial on one target, a standing on all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from m2m_hf.core.arrays import LazyArray
from m2m_hf.core.jsonable import Measurement, expect, is_number
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.objective import TargetInfo
from m2m_hf.core.score import Failure, Score, mean_over_targets, paired
from m2m_hf.errors import InputError


@dataclass(frozen=True)
class Trial:
    """One mixture scored by one objective on one target; a line of the journal.

    Args:
        key: fingerprint of everything the score depends on; equal keys mean the same measurement.
        mixture: what was scored.
        objective: `merged` (the exact average of the adapters' parameters) or another merge method with its parameters, such as
            `ties(scaling=1, density=0.2)`; `gradient` (the average with the derivatives by the weights); `ensemble` (the average
            of the adapters' probabilities); `trained` (the model fine-tuned on the mixture).
        target: name of the target.
        rung: how many of the target's rows were scored.
        state: `complete`; `pruned` for a rung of a race, which scored some of the rows (if the mixture went further, a later
            trial holds the values); or `failed` with a `reason`.
        score: None for a failed trial.
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

    @classmethod
    def of(
        cls,
        result: Score | Failure,
        mixture: Mixture,
        objective: str,
        target: TargetInfo,
        key: str,
        rung: int | None = None,
        seconds: float = 0.0,
    ) -> "Trial":
        """The trial of a measurement on the first `rung` rows (None: all)."""
        rung = target.examples if rung is None else rung
        seconds = round(seconds, 3)  # as the journal stores it
        if isinstance(result, Failure):
            reason = result.reason.encode("utf-8", "backslashreplace").decode()
            return cls(key, mixture, objective, target.name, rung, "failed", None, seconds, reason)
        state = "complete" if rung == target.examples else "pruned"
        return cls(key, mixture, objective, target.name, rung, state, result, seconds)

    def to_json(self) -> dict[str, Any]:
        """A flat record. All trials have the same columns, so that `load_dataset("json")` reads the journal."""
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
            InputError: `to_json` did not write this record.
        """
        try:
            check_record(record)
            mixture = Mixture(tuple(zip(record["names"], record["weights"], strict=True)))
            plain = {name: record[name] for name in PLAIN}
            if record["state"] == "failed":
                return cls(mixture=mixture, score=None, **plain)
            values, logprobs, gradient = (parse_numbers(record[name]) for name in ("values", "logprobs", "gradient"))
            score = Score(record["score"], record["stderr"], values, logprobs, tuple(gradient))
            return cls(mixture=mixture, score=score, **plain)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"not a trial: {error if isinstance(error, ValueError) else repr(error)}") from error


PLAIN = ("key", "objective", "target", "rung", "state", "seconds", "reason")  # fields that are stored as they are
STATES = ("complete", "pruned", "failed")


def check_record(record: Any) -> None:
    """Refuses a journal line that has not the keys and types of `Trial.to_json`."""
    expect(isinstance(record, dict), "an object", record)
    for key in ("key", "objective", "target", "state"):
        expect(isinstance(record[key], str), f"a string as {key}", record[key])
    expect(record["state"] in STATES, f"{', '.join(STATES)} as state", record["state"])
    names, rung = record["names"], record["rung"]
    strings = isinstance(names, list) and all(isinstance(name, str) for name in names)
    expect(strings, "a list of strings as names", names)
    expect(isinstance(rung, int) and rung >= 0, "a number of rows as rung", rung)
    expect(is_number(record["seconds"]), "a number as seconds", record["seconds"])
    if record["state"] == "failed":
        expect(isinstance(record["reason"], str), "the reason of a failed trial", record["reason"])
        return
    expect(is_number(record["score"]), "a finite number as score", record["score"])
    expect(record["stderr"] is None or is_number(record["stderr"]), "a finite number as stderr", record["stderr"])


def parse_numbers(value: Any) -> LazyArray:
    if isinstance(value, LazyArray):
        return value
    array = np.array(value)
    numeric = isinstance(value, list) and array.ndim == 1 and (array.dtype.kind in "fiu" or not value)
    expect(numeric and bool(np.isfinite(array).all()), "a list of finite numbers", value)
    return LazyArray.of(array)


@dataclass(frozen=True)
class Standing:
    """How a mixture does on all targets together: what strategies are sent and what is ranked.

    Args:
        mixture: the mixture.
        trials: target -> its trial; in a race, the last rung that the mixture reached.
        weights: target -> its weight.
        short: the targets on which the mixture is worse than the base model by more than their `min_delta`.
        offset: add this to the score of a pruned mixture to estimate its score on all rows. It corrects for how hard the rows
            of the rung are.
    """

    mixture: Mixture
    trials: Mapping[str, Trial]
    weights: Mapping[str, float]
    short: tuple[str, ...] = ()
    offset: float = 0.0

    @property
    def scores(self) -> dict[str, Score]:
        """Target -> score, of the targets that have one."""
        return {target: trial.score for target, trial in self.trials.items() if trial.score}

    @cached_property
    def score(self) -> Score | None:
        """The weighted mean of the targets' scores; None if one of them failed.

        With several targets it has a value and a standard error only, since their rows are not the same. The rows count as
        drawn independently.
        """
        scores = self.scores
        if len(scores) < len(self.trials):
            return None
        return next(iter(scores.values())) if len(scores) == 1 else Score(*mean_over_targets(scores, self.weights))

    @property
    def mean_logprob(self) -> float:
        """The weighted sum over the targets of the right answers' log-probability; breaks ties."""
        return sum(self.weights[target] * score.mean_logprob for target, score in self.scores.items())

    @property
    def pruned(self) -> bool:
        """True if a race dropped the mixture before all rows were scored."""
        return any(trial.state == "pruned" for trial in self.trials.values())

    @property
    def estimate(self) -> float | None:
        """The score on all rows, estimated if the mixture was pruned; None if a target failed."""
        return None if self.score is None else self.score.value + self.offset

    @property
    def complete(self) -> bool:
        """True if every target has a score over all its rows."""
        return self.score is not None and not self.pruned

    @property
    def may_be_chosen(self) -> bool:
        return self.complete and not self.short

    def over(self, other: "Standing") -> Measurement:
        """How much better it is than another mixture, on the same rows."""
        return Measurement(*paired(self.scores, other.scores, self.weights))


@dataclass(frozen=True)
class Reference:
    """What every mixture is compared with, by target; turns the trials of a mixture into its standing."""

    targets: Sequence[TargetInfo]
    base: Mapping[str, Trial] = field(default_factory=dict)
    control: Mapping[str, Trial] = field(
        default_factory=dict
    )  # of a mixture scored in full: how hard a race's first rows are
    _gains: dict[tuple[str, int], float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def standing(self, mixture: Mixture, trials: Mapping[str, Trial]) -> Standing:
        """How a mixture with these trials, one for every target, stands."""
        weights = {target.name: target.weight for target in self.targets}
        total = sum(weights.values())
        short = tuple(target.name for target in self.targets if self._falls_short(target, trials[target.name]))
        gains = (target.weight / total * self._gain(target, trials[target.name]) for target in self.targets)
        return Standing(mixture, trials, weights, short, sum(gains))

    def _falls_short(self, target: TargetInfo, trial: Trial) -> bool:
        """True if a mixture is worse than the base model by more than the target's `min_delta`."""
        base = self.base.get(target.name)
        if target.min_delta is None or trial.state != "complete" or not trial.score or not base or not base.score:
            return False
        return trial.score.value < base.score.value - target.min_delta

    def _gain(self, target: TargetInfo, trial: Trial) -> float:
        """What a pruned trial's score would gain on all rows, if it gained as much as the control mixture does."""
        control = self.control.get(target.name)
        if trial.state != "pruned" or control is None or control.score is None or not control.score.values:
            return 0.0
        key = target.name, trial.rung
        if key not in self._gains:
            seen = np.asarray(control.score.values)[list(target.order[: trial.rung])]
            self._gains[key] = control.score.value - float(seen.mean())
        return self._gains[key]
