"""Objectives: mixtures in, scores out. The search asks nothing else of a model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from .journal import fingerprint
from .merging import GatedStack
from .mixture import Failure, Mixture, Score
from .scoring import Scorer


class Objective(Protocol):
    """What the search needs of one target: a name, a key for every measurement, and the measurement.

    `key` covers everything that the score depends on, so that a journal line with this key can stand in for measuring.
    `at_once` is how many mixtures are best measured together; it is asked only when something has to be measured.
    `weight` and `min_delta` are the target's in the choice: see `TargetConfig`.
    """

    name: str
    target: str
    examples: int
    weight: float
    min_delta: float | None

    @property
    def at_once(self) -> int: ...

    def key(self, mixture: Mixture) -> str: ...

    def __call__(self, mixtures: Sequence[Mixture]) -> list[Score | Failure]: ...


class MergedObjective:
    """The paper's surrogate: the score of the model whose weights are the base's plus the mixture's average of deltas.

    The stack is asked for only when something has to be measured; a search that the journal answers loads no model.

    Args:
        open_stack: gives the gated stack.
        scorer: of the target's validation rows.
        adapters: name -> fingerprint of its adapter; a key covers those of its own mixture only, so that another
            candidate makes no old trial worthless.
        target: name of the target.
        base_fingerprint: base weights, tokenizer and the like, for the mixture without adapters.
        tokens_per_batch: budget of one forward pass.
        weight: the target's, in a search with several.
        min_delta: by how much at most a mixture may be worse on this target than the base.
    """

    name = "merged"

    def __init__(
        self,
        open_stack: Callable[[], GatedStack],
        scorer: Scorer,
        adapters: Mapping[str, str],
        *,
        target: str,
        base_fingerprint: str,
        tokens_per_batch: int,
        weight: float = 1.0,
        min_delta: float | None = None,
    ) -> None:
        self._open_stack = open_stack
        self._scorer = scorer
        self._adapters = dict(adapters)
        self._base_fingerprint = base_fingerprint
        self._tokens_per_batch = tokens_per_batch
        self.target = target
        self.examples = scorer.examples
        self.weight = weight
        self.min_delta = min_delta

    @property
    def at_once(self) -> int:
        return self._scorer.at_once(self._open_stack(), self._tokens_per_batch)

    def key(self, mixture: Mixture) -> str:
        parts = [[name, weight, self._adapters[name]] for name, weight in mixture.items]
        return fingerprint([self.name, self._base_fingerprint, self._scorer.fingerprint, self.examples, parts])

    def __call__(self, mixtures: Sequence[Mixture]) -> list[Score | Failure]:
        weights = [mixture.weights for mixture in mixtures]
        return self._scorer.score(self._open_stack(), weights, self._tokens_per_batch)
