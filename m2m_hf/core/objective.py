"""`Objective`: a mixture in, a score out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol, runtime_checkable

import numpy as np

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Failure, Score


@dataclass(frozen=True)
class TargetInfo:
    """A target as the search sees it.

    Args:
        name: of the target.
        examples: how many rows it has.
        weight: its weight in the mean over the targets.
        min_delta: a mixture that scores worse than the base model by more than this cannot be chosen.
        order: the order in which a race sees the rows; empty if rows cannot be scored one by one.
    """

    name: str
    examples: int
    weight: float = 1.0
    min_delta: float | None = None
    order: tuple[int, ...] = ()


class Objective(ABC):
    """Scores mixtures on one target. The search knows a model only through this class.

    A subclass says how to score (`_score`) and names every measurement (`key`).

    Args:
        target: the target.

    Attributes:
        name: what trials and tables call the objective.
    """

    name: str

    def __init__(self, target: TargetInfo) -> None:
        self.target = target

    @abstractmethod
    def key(self, mixture: Mixture, rung: int | None = None) -> str:
        """Fingerprint of everything the score depends on. A journal line with this key replaces a measurement."""

    @abstractmethod
    def _score(self, mixtures: Sequence[Mixture], rows: Sequence[int] | None) -> list[Score | Failure]:
        """Scores mixtures on some rows, or on all of them (None). The values stand in the order of `rows`."""

    def __call__(
        self, mixtures: Sequence[Mixture], rung: int | None = None, before: Mapping[Mixture, Score] | None = None
    ) -> list[Score | Failure]:
        """Scores mixtures on the first `rung` rows of the race's order, or on all rows (None).

        Args:
            before: the mixtures' scores on the rung before, whose rows are not scored again.

        Returns:
            Scores over all these rows: on a rung in the race's order, otherwise in the order of the rows.
        """
        if rung is None and not before:
            return self._score(mixtures, None)
        before = before or {}
        seen = max((len(score.values) for score in before.values()), default=0)
        scores = self._score(mixtures, self.target.order[seen:rung])
        return [
            self._join(before.get(mixture), score, complete=rung is None) if isinstance(score, Score) else score
            for mixture, score in zip(mixtures, scores, strict=True)
        ]

    def _join(self, before: Score | None, new: Score, complete: bool) -> Score:
        before = before or Score(0.0)
        values, logprobs = (*before.values, *new.values), (*before.logprobs, *new.logprobs)
        if not complete:
            return Score.of(values, logprobs)
        places = np.argsort(self.target.order)
        in_row_order = [np.asarray(numbers)[places].tolist() if numbers else () for numbers in (values, logprobs)]
        return self._summarise(Score.of(*in_row_order))

    def _summarise(self, score: Score) -> Score:
        """The score of all rows from their values, with the standard error that suits the metric."""
        return Score.of(score.values, score.logprobs)

    def likelihood(self, score: Score) -> float:
        """The log-likelihood of the right answers, in the unit of the target's scores."""
        return score.mean_logprob

    def batch_size(self, rows: int) -> int:
        """How many mixtures are best scored together on so many rows; asked only before something is measured."""
        return 1

    def evaluations(self, mixture: Mixture, rows: int) -> int:
        """How many examples are scored to know `rows` of them; counts against the budget."""
        return rows


@runtime_checkable
class Differentiable(Protocol):
    """An objective whose likelihood of the right answers has derivatives by the weights of a mixture."""

    def gradient(self, mixture: Mixture) -> Score | Failure:
        """The score on all rows, with the derivative of its `likelihood` by each weight."""


@runtime_checkable
class Prepared(Protocol):
    """An objective that does something at once for all mixtures that it is going to be asked for next."""

    def prepare(self, mixtures: Sequence[Mixture]) -> None:
        """Does it; the time that it takes is not part of the measurements."""


def race_order(scorer: str, examples: int) -> tuple[int, ...]:
    """The random order in which races see a target's rows. It follows from the scorer's fingerprint, so runs share trials."""
    return tuple(Random(scorer).sample(range(examples), examples))
