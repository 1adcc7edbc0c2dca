"""A mixture that was scored: a trial on one target, a standing on all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np

from m2m_hf.core.arrays import LazyArray
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.objective import TargetInfo
from m2m_hf.core.score import Score, mean_over_targets
from m2m_hf.errors import InputError


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


def numbers(given: Any) -> LazyArray:
    """A list of finite numbers.

    Raises:
        ValueError: it is none.
    """
    if isinstance(given, LazyArray):
        return given
    array = np.array(given)
    right = isinstance(given, list) and array.ndim == 1 and (array.dtype.kind in "fiu" or not given)
    if not right or not np.isfinite(array).all():
        raise ValueError(f"expected a list of finite numbers, got {given!r:.80}")
    return LazyArray.of(array)


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


@dataclass(frozen=True)
class Reference:
    """What every mixture is compared with; turns the trials of a mixture into its standing.

    Args:
        targets: of the search.
        base: target -> the base model's trial.
        control: target -> the trial of a mixture that was scored on all rows. It tells how hard the first rows of a race are.
    """

    targets: Sequence[TargetInfo]
    base: Mapping[str, Trial] = field(default_factory=dict)
    control: Mapping[str, Trial] = field(default_factory=dict)
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


def scores_of(standing: Standing) -> dict[str, Score]:
    """Target -> score; of those that have one."""
    return {target: trial.score for target, trial in standing.trials.items() if trial.score}
