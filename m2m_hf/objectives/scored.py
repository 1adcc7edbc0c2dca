"""The base of objectives that score with a target's scorer."""

from collections.abc import Mapping, Sequence

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.objective import Objective, TargetInfo
from m2m_hf.core.score import Failure, Score
from m2m_hf.modeling.devices import broadcast
from m2m_hf.scoring.scorers import Scorer
from m2m_hf.storage.keys import Keys


class ScorerObjective(Objective):
    """Scores with a target's scorer; with several processes, all get the main one's result.

    Args:
        scorer: of the target's validation rows.
        keys: of the target's trials.
        target: the target.
    """

    def __init__(self, scorer: Scorer, keys: Keys, target: TargetInfo) -> None:
        super().__init__(target)
        self.keys = keys
        self._scorer = scorer

    def __call__(
        self, mixtures: Sequence[Mixture], rung: int | None = None, before: Mapping[Mixture, Score] | None = None
    ) -> list[Score | Failure]:
        scores: list[Score | Failure] = broadcast(super().__call__(mixtures, rung, before))
        return scores

    def likelihood(self, score: Score) -> float:
        return self._scorer.likelihood(score)

    def _summarise(self, score: Score) -> Score:
        return self._scorer.whole(score)
