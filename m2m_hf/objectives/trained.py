"""The trained objective: the truth that the surrogates predict."""

from collections.abc import Callable, Sequence
from dataclasses import asdict

from accelerate import PartialState
from transformers import PreTrainedModel

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.objective import TargetInfo
from m2m_hf.core.score import Failure, Score
from m2m_hf.errors import InputError
from m2m_hf.merging.dense_stack import Stack, open_stack
from m2m_hf.merging.methods import AVERAGE
from m2m_hf.modeling.devices import broadcast
from m2m_hf.objectives.fine_tuned import Counts, FineTunedModels
from m2m_hf.objectives.scored import ScorerObjective
from m2m_hf.scoring.scorers import Scorer
from m2m_hf.storage.files import read_json_or_empty, write_json
from m2m_hf.storage.keys import Keys
from m2m_hf.training.fine_tune import TrainingFailedError, load_trained


class TrainedObjective(ScorerObjective):
    """The score of the model that is fine-tuned on a mixture.

    Args:
        models: trains the models, or finds them.
        base: returns the base model, without any stack on it.
        bare: returns the base model with the experts' stack, to score the base model itself.
        scorer, keys, target: see `ScorerObjective`.
        tokens_per_batch: limit of one forward pass.
    """

    name = "trained"

    def __init__(
        self,
        models: FineTunedModels,
        base: Callable[[], PreTrainedModel],
        bare: Callable[[], Stack],
        scorer: Scorer,
        keys: Keys,
        target: TargetInfo,
        *,
        tokens_per_batch: int,
    ) -> None:
        super().__init__(scorer, keys, target)
        self.models = models
        self._base = base
        self._bare = bare
        self._tokens_per_batch = tokens_per_batch

    def key(self, mixture: Mixture, rung: int | None = None) -> str:
        return self.keys.trained(self.models.counts(mixture))

    def _score(self, mixtures: Sequence[Mixture], rows: Sequence[int] | None) -> list[Score | Failure]:
        return [self.score(self.models.counts(mixture)) for mixture in mixtures]

    def score(self, counts: Counts, scorer: Scorer | None = None) -> Score | Failure:
        """The score of the model fine-tuned on so many rows of each candidate; without rows, of the base model.

        Args:
            scorer: by default that of the validation rows.
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

    def sealed(self, counts: Counts, scorer: Scorer) -> Score:
        """The score on sealed test rows. Every model sees them once; its score is kept beside it.

        Args:
            counts: see `score`.
            scorer: of the test rows.

        Raises:
            InputError: there is no score.
        """
        path = self.models.folder(counts) / "test.json"
        scores = broadcast(read_json_or_empty(path))
        if scorer.fingerprint not in scores:
            score = broadcast(self.score(counts, scorer))
            if isinstance(score, Failure):
                model = " + ".join(counts) or "the base model"
                raise InputError(f"{model} has no score on the test set of {self.target.name}: {score.reason}")
            scores[scorer.fingerprint] = asdict(score)
            if PartialState().is_main_process:
                write_json(path, scores)
        known = scores[scorer.fingerprint]
        return Score(known["value"], known["stderr"], tuple(known["values"]), tuple(known["logprobs"]))
