"""What objectives share that score with a target's scorer."""

from collections.abc import Mapping

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Failure, Score
from m2m_hf.scoring.scorers import Scorer
from m2m_hf.storage.keys import Keys


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
