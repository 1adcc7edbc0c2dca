"""The merged objective: the score of the averaged weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.objective import race_order
from m2m_hf.core.score import Failure, Score
from m2m_hf.errors import InputError
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.merging.methods import AVERAGE, MergeMethod
from m2m_hf.objectives.scored import ScorerObjective
from m2m_hf.scoring.scorers import LogprobScorer, Scorer
from m2m_hf.storage.keys import Keys


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
            self.order = race_order(scorer.fingerprint, scorer.examples)

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
