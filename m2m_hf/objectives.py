"""Objectives: a mixture in, a score out. The search asks nothing else of a model."""

from collections.abc import Callable, Mapping
from typing import Protocol

from transformers import PreTrainedModel

from .journal import fingerprint
from .merging import GatedStack
from .mixture import Mixture, Score
from .scoring import Scorer


class Objective(Protocol):
    """What the search needs: a name, a key for every measurement, and the measurement.

    `key` covers everything that the score depends on, so that a journal line with this key can stand in for measuring.
    """

    name: str
    target: str
    examples: int

    def key(self, mixture: Mixture) -> str: ...

    def __call__(self, mixture: Mixture) -> Score: ...


class MergedObjective:
    """The paper's surrogate: the score of the model whose weights are the base's plus the mixture's average of deltas.

    The stack is asked for only when something has to be measured; a search that the journal answers loads no model.

    Args:
        open_stack: gives the gated stack and the scorer.
        adapters: name -> fingerprint of its adapter; a key covers those of its own mixture only, so that another
            candidate makes no old trial worthless.
        target: name of the target.
        target_fingerprint: rows, scorer and metric.
        base_fingerprint: base weights, tokenizer and the like, for the mixture without adapters.
        examples: number of rows of the target.
        tokens_per_batch: budget of one forward pass.
    """

    name = "merged"

    def __init__(
        self,
        open_stack: Callable[[], tuple[GatedStack, Scorer]],
        adapters: Mapping[str, str],
        *,
        target: str,
        target_fingerprint: str,
        base_fingerprint: str,
        examples: int,
        tokens_per_batch: int,
    ) -> None:
        self._open_stack = open_stack
        self._adapters = dict(adapters)
        self.target = target
        self._target_fingerprint = target_fingerprint
        self._base_fingerprint = base_fingerprint
        self.examples = examples
        self._tokens_per_batch = tokens_per_batch

    def key(self, mixture: Mixture) -> str:
        parts = [[name, weight, self._adapters[name]] for name, weight in mixture.items]
        return fingerprint([self.name, self._base_fingerprint, self._target_fingerprint, self.examples, parts])

    def __call__(self, mixture: Mixture) -> Score:
        stack, scorer = self._open_stack()
        return score_mixture(stack, scorer, mixture, self._tokens_per_batch)


def score_mixture(stack: GatedStack, scorer: Scorer, mixture: Mixture, tokens_per_batch: int) -> Score:
    """The score of the exact parameter average that `mixture` describes."""
    stack.set(mixture.weights)
    model: PreTrainedModel = stack.model
    return scorer.score(model, tokens_per_batch)
