"""The merged objective: the score of the averaged parameters. And the base of all objectives that a target's scorer scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.objective import Objective, TargetInfo
from m2m_hf.core.score import Failure, Score
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.merging.methods import AVERAGE, MergeMethod
from m2m_hf.modeling.devices import broadcast
from m2m_hf.scoring.scorers import LogprobScorer, Scorer
from m2m_hf.storage.keys import Keys


class ScorerObjective(Objective):
    """Scores with the scorer of the target's validation rows; with several processes, all get the main one's result."""

    def __init__(self, scorer: Scorer, keys: Keys, target: TargetInfo) -> None:
        super().__init__(target)
        self.keys = keys
        self.scorer = scorer

    def __call__(
        self, mixtures: Sequence[Mixture], rung: int | None = None, before: Mapping[Mixture, Score] | None = None
    ) -> list[Score | Failure]:
        return broadcast(super().__call__(mixtures, rung, before))

    def key(self, mixture: Mixture, rung: int | None = None) -> str:
        return self.keys.of(self.name, mixture, rung)

    def likelihood(self, score: Score) -> float:
        return self.scorer.likelihood(score)

    def _summarise(self, score: Score) -> Score:
        return self.scorer.whole(score)


class MergedObjective(ScorerObjective):
    """The paper's surrogate: the score of the base model plus the mixture's average of the experts' deltas.

    Args:
        open_stack: returns the experts' stack; called only to measure, so a search that the journal answers loads no model.
        tokens_per_batch: returns the limit of one forward pass, for which a model may have to be loaded.
        method: how to merge; the paper takes the average.
    """

    def __init__(
        self,
        open_stack: Callable[[], Stack],
        scorer: Scorer,
        keys: Keys,
        target: TargetInfo,
        *,
        tokens_per_batch: Callable[[], int],
        method: MergeMethod = AVERAGE,
    ) -> None:
        super().__init__(scorer, keys, target)
        self.name = method.label
        self._method, self._open_stack, self._tokens_per_batch = method, open_stack, tokens_per_batch

    def batch_size(self, rows: int) -> int:
        return self.scorer.at_once(self._open_stack(), self._tokens_per_batch(), rows)

    def model(self, mixture: Mixture) -> tuple[Stack, dict[str, float], int]:
        """What a scorer needs to score one mixture: the stack, the weights, and the limit of a forward pass."""
        return self._open_stack(), self._method.gates(mixture.weights), self._tokens_per_batch()

    def _score(self, mixtures: Sequence[Mixture], rows: Sequence[int] | None) -> list[Score | Failure]:
        weights = [self._method.gates(mixture.weights) for mixture in mixtures]
        return self.scorer.score(self._open_stack(), weights, self._tokens_per_batch(), rows)


class GatedObjective(MergedObjective):
    """The average of LoRA adapters, scored by log-probabilities: a `Differentiable` objective."""

    scorer: LogprobScorer

    def gradient(self, mixture: Mixture) -> Score | Failure:
        """The score with its derivative by each weight, in one backward pass."""
        score, slopes = self.scorer.gradient(*self.model(mixture))
        if isinstance(score, Score):
            score = replace(score, gradient=tuple(slopes[name] for name in mixture.names))
        return broadcast(score)
