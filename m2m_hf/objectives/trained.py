"""The trained objective: the truth that the surrogates stand in for."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Failure, Score
from m2m_hf.errors import InputError
from m2m_hf.merging.dense_stack import Stack, open_stack
from m2m_hf.merging.methods import AVERAGE
from m2m_hf.objectives.fine_tuned import Counts, FineTunedModels
from m2m_hf.objectives.scored import ScorerObjective
from m2m_hf.scoring.scorers import Scorer
from m2m_hf.storage.files import read_json_or_empty, write_json
from m2m_hf.storage.keys import Keys
from m2m_hf.training.fine_tune import TrainingFailedError, load_trained


class TrainedObjective(ScorerObjective):
    """The score of the model that was fine-tuned on a mixture: what the surrogates predict.

    Args:
        models: where they are, or are made.
        base: gives the base model to score on, free of any other stack.
        bare: gives it as a stack of the bank's adapters, to score the base model itself.
        scorer, keys, **common: see `ScorerObjective`.
        tokens_per_batch: budget of one forward pass.
    """

    name = "trained"

    def __init__(
        self,
        models: FineTunedModels,
        base: Callable[[], PreTrainedModel],
        bare: Callable[[], Stack],
        scorer: Scorer,
        keys: Keys,
        *,
        tokens_per_batch: int,
        **common: Any,
    ) -> None:
        super().__init__(scorer, keys, **common)
        self.models = models
        self._base = base
        self._bare = bare
        self._tokens_per_batch = tokens_per_batch

    def key(self, mixture: Mixture, rung: int | None = None) -> str:
        return self.keys.trained(self.models.counts(mixture))

    def __call__(self, mixtures: Sequence[Mixture], rows: Sequence[int] | None = None) -> list[Score | Failure]:
        return [self.score(self.models.counts(mixture)) for mixture in mixtures]

    def score(self, counts: Counts, scorer: Scorer | None = None) -> Score | Failure:
        """The score of the model fine-tuned on so many rows of each candidate, on the validation rows or by another scorer.

        Without rows it is that of the base model.
        """
        scorer = scorer or self._scorer
        if not counts:
            return scorer.score(self._bare(), [{}], self._tokens_per_batch)[0]
        try:
            folder = self.models.train(counts)
        except TrainingFailedError as error:
            return Failure(str(error))
        stack = open_stack(self._base(), {"trained": load_trained(folder)}, AVERAGE)
        try:
            return scorer.score(stack, [{"trained": 1.0}], self._tokens_per_batch)[0]
        finally:
            stack.detach()

    def sealed(self, counts: Counts, scorer: Scorer, write: bool, broadcast: Callable[[Any], Any]) -> Score:
        """The score on sealed test rows; a model looks at them once, what it scored is kept beside it.

        Args:
            scorer: of the test rows.
            write: whether this process writes.
            broadcast: gives every process what the main one has.

        Raises:
            InputError: there is no score.
        """
        path = self.models.folder(counts) / "test.json"
        known = broadcast(read_json_or_empty(path))
        if scorer.fingerprint not in known:
            score = self.score(counts, scorer)
            if isinstance(score, Failure):
                what = " + ".join(counts) or "the base model"
                raise InputError(f"{what} has no score on the test set of {self.target}: {score.reason}")
            known[scorer.fingerprint] = asdict(score)
            if write:
                write_json(path, known)
        one = known[scorer.fingerprint]
        return Score(one["value"], one["stderr"], tuple(one["values"]), tuple(one["logprobs"]))
