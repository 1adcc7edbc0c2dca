"""`Objective`: a mixture in, a score out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

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


class Objective(Protocol):
    """What the search needs of one target: a name, a key for every measurement, and the measurement.

    `key` covers everything that the score depends on, so that a journal line with this key can stand in for measuring.
    `at_once` is how many mixtures are best measured together on so many rows; it is asked only when something is to be measured.
    `weight` and `min_delta` are the target's in the choice: see `TargetConfig`.
    `failed` tells of candidates without an adapter why they have none: no mixture with one of them is measured.
    `order` is that in which a race sees the examples, empty where they cannot be scored one by one. `rung` then means the first
    so many of them; None means all, whose values stand in the examples' own order, which `whole` gives them.
    """

    name: str
    target: str
    examples: int
    weight: float
    min_delta: float | None
    failed: Mapping[str, str]
    order: tuple[int, ...]

    def at_once(self, rows: int) -> int: ...

    def key(self, mixture: Mixture, rung: int | None = None) -> str: ...

    def __call__(self, mixtures: Sequence[Mixture], rows: Sequence[int] | None = None) -> list[Score | Failure]: ...

    def whole(self, score: Score) -> Score: ...

    def evaluations(self, mixture: Mixture, rows: int) -> int: ...

    @property
    def differentiable(self) -> bool: ...

    def gradient(self, mixture: Mixture) -> Score | Failure: ...

    def likelihood(self, score: Score) -> float: ...


def race_order(scorer: str, examples: int) -> tuple[int, ...]:
    """The random order in which races see a target's rows. It follows from the target alone, so runs can share trials.

    Args:
        scorer: the scorer's fingerprint.
        examples: how many rows the target has.
    """
    return tuple(Random(scorer).sample(range(examples), examples))
