"""Objectives: mixtures in, scores out. The search asks nothing else of a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from m2m_hf.core.mixture import Failure, Mixture, Score
from m2m_hf.errors import InputError
from m2m_hf.merging.methods import AVERAGE, MergeMethod, Stack
from m2m_hf.scoring.scorers import LogprobScorer, Scorer
from m2m_hf.search.race import order
from m2m_hf.storage.journal import Keys


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


class ScorerObjective:
    """What objectives share that score with a target's scorer: see `Objective`.

    Args:
        scorer: of the target's validation rows.
        keys: of the target's trials.
        target: name of the target.
        weight: the target's, in a search with several.
        min_delta: by how much at most a mixture may be worse on this target than the base.
        failed: candidate -> why it has no adapter.
    """

    name: str
    order: tuple[int, ...] = ()

    def __init__(
        self,
        scorer: Scorer,
        keys: Keys,
        *,
        target: str,
        weight: float = 1.0,
        min_delta: float | None = None,
        failed: Mapping[str, str] | None = None,
    ) -> None:
        self._scorer = scorer
        self.keys = keys
        self.target = target
        self.examples = scorer.examples
        self.weight = weight
        self.min_delta = min_delta
        self.failed = failed or {}

    def at_once(self, rows: int) -> int:
        return 1

    def whole(self, score: Score) -> Score:
        """A score of all rows from their values, in the order of the rows, with the scorer's own standard error."""
        return self._scorer.whole(score)

    def evaluations(self, mixture: Mixture, rows: int) -> int:
        """Examples that are scored to know `rows` of them."""
        return rows

    @property
    def differentiable(self) -> bool:
        return False

    def likelihood(self, score: Score) -> float:
        """That of the right answers, in the unit in which `gradient` is its derivative."""
        return self._scorer.likelihood(score)

    def gradient(self, mixture: Mixture) -> Score | Failure:
        """The score with the derivative by the weights of the mixture.

        Raises:
            TypeError: it has none.
        """
        raise TypeError(f"scores of the objective {self.name} have no derivative by the weights of a mixture")


class MergedObjective(ScorerObjective):
    """The paper's surrogate: the score of the model whose weights are the base's plus the mixture's average of deltas.

    The stack is asked for only when something has to be measured; a search that the journal answers loads no model.

    Args:
        open_stack: gives the gated stack.
        scorer, keys, **common: see `ScorerObjective`.
        tokens_per_batch: budget of one forward pass.
        method: how experts are merged; the average is the paper's.
        gated: whether they are LoRA adapters, whose weights a score can be derived by.

    Raises:
        InputError: a scorer that needs the mixture as an adapter, and a method that makes none.
    """

    def __init__(
        self,
        open_stack: Callable[[], Stack],
        scorer: Scorer,
        keys: Keys,
        *,
        tokens_per_batch: int,
        method: MergeMethod = AVERAGE,
        gated: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(scorer, keys, **common)
        if scorer.needs_adapter and gated and not method.gated:
            raise InputError(f"merge_method: {method.name} gives no adapter to hand to a command; expected average")
        self.name = method.label
        self._method = method
        self._gated = gated
        self._open_stack = open_stack
        self._tokens_per_batch = tokens_per_batch
        if scorer.by_row:
            self.order = order(scorer.fingerprint, scorer.examples)

    def at_once(self, rows: int) -> int:
        return self._scorer.at_once(self._open_stack(), self._tokens_per_batch, rows)

    def key(self, mixture: Mixture, rung: int | None = None) -> str:
        return self.keys.merged(mixture, rung, self.name)

    def model(self, mixture: Mixture) -> tuple[Stack, dict[str, float], int]:
        """What a scorer needs to score one mixture: the stack, the weights, the budget of a forward pass."""
        return self._open_stack(), self._method.gates(mixture.weights), self._tokens_per_batch

    def __call__(self, mixtures: Sequence[Mixture], rows: Sequence[int] | None = None) -> list[Score | Failure]:
        weights = [self._method.gates(mixture.weights) for mixture in mixtures]
        return self._scorer.score(self._open_stack(), weights, self._tokens_per_batch, rows)

    @property
    def differentiable(self) -> bool:
        return isinstance(self._scorer, LogprobScorer) and self._method.name == "average" and self._gated

    def gradient(self, mixture: Mixture) -> Score | Failure:
        """The score with the derivative by the weights of the mixture, in one backward pass."""
        assert isinstance(self._scorer, LogprobScorer)
        score, slope = self._scorer.gradient(*self.model(mixture))
        return (
            replace(score, gradient=tuple(slope[name] for name in mixture.names)) if isinstance(score, Score) else score
        )
