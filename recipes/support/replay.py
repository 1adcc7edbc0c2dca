"""Searches that cost nothing: on the recorded scores of an exhaustive run, or on a made-up landscape fitted to such a run.

Only many searches whose best answer is known can tell how good a strategy is, and how far to trust a race.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from scipy.stats import t

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.objective import Objective, TargetInfo
from m2m_hf.core.score import Failure, Score
from m2m_hf.core.space import SearchSpace
from m2m_hf.search.model_based import ScoreModel
from m2m_hf.search.strategies import SearchProblem
from m2m_hf.storage.journal import Journal


class Replay(Objective):
    """An objective that answers from a table of scores with a value for every row.

    Args:
        table: mixture -> its score.
        seed: of the order in which a race sees the rows.
        likelihood: score by the mean log-probability of the right answers instead of the recorded score.
        target: name of the target.
    """

    name = "replay"

    def __init__(
        self, table: Mapping[Mixture, Score], seed: int = 0, likelihood: bool = False, target: str = "replay"
    ) -> None:
        self.table = {
            mixture: Score.of(score.logprobs, score.logprobs) if likelihood else score
            for mixture, score in table.items()
        }
        rows = len(next(iter(self.table.values())).values)
        super().__init__(TargetInfo(target, rows, order=tuple(Random(seed).sample(range(rows), rows))))
        self.spent = 0  # rows asked for

    @classmethod
    def of_run(cls, trials: Path, target: str | None = None, **options: Any) -> "Replay":
        """The complete merged trials of one target (by default the first) in a run's journal."""
        table = {}
        for trial in Journal(trials).trials.values():
            target = target or trial.target
            if trial.target == target and trial.state == "complete" and trial.objective == "merged" and trial.score:
                table[trial.mixture] = trial.score
        return cls(table, **options)

    def key(self, mixture: Mixture, rung: int | None = None) -> str:
        return f"{self.target.name} {mixture.items} {rung}"

    def _score(self, mixtures: Sequence[Mixture], rows: Sequence[int] | None) -> list[Score | Failure]:
        self.spent += len(mixtures) * (self.target.examples if rows is None else len(rows))
        if rows is None:
            return [self.table[mixture] for mixture in mixtures]
        scores: list[Score | Failure] = []
        for mixture in mixtures:
            values, logprobs = (np.asarray(one) for one in (self.table[mixture].values, self.table[mixture].logprobs))
            scores.append(Score.of(values[list(rows)].tolist(), logprobs[list(rows)].tolist() if len(logprobs) else ()))
        return scores


class Landscape(Objective):
    """A made-up objective with a single row: any number of candidates, any mixture.

    Args:
        value: mixture -> score.
    """

    name = "landscape"

    def __init__(self, value: Callable[[Mixture], float]) -> None:
        super().__init__(TargetInfo("landscape", 1))
        self._value = value

    def key(self, mixture: Mixture, rung: int | None = None) -> str:
        return str(mixture.items)

    def _score(self, mixtures: Sequence[Mixture], rows: Sequence[int] | None) -> list[Score | Failure]:
        return [Score(self._value(mixture)) for mixture in mixtures]


def tells_apart(better: Score, worse: Score, risk: float = 0.05) -> bool:
    """True if a one-sided paired t-test over all rows tells that the first is better than the second."""
    differences = np.array(better.values) - np.array(worse.values)
    spread = differences.std(ddof=1)
    if spread == 0:
        return bool(differences.mean() > 0)
    return bool(differences.mean() / spread * len(differences) ** 0.5 > t.ppf(1 - risk, len(differences) - 1))


def larger_landscape(
    table: Mapping[Mixture, Score], space: SearchSpace, count: int, seed: int
) -> Callable[[Mixture], float]:
    """A landscape over `count` candidates with the shape of recorded trials.

    Fits `ScoreModel` without a screen to the recorded scores. A candidate takes the coefficients (on its weight, on being in
    the mixture) of a recorded candidate drawn at random, plus a tenth of their spread as noise; a pair those of a recorded pair.

    Args:
        table: recorded scores of subsets.
        space: of the recorded candidates.
        count: candidates of the landscape, called c000, c001, …
        seed: of the draws.
    """
    model = ScoreModel(SearchProblem(space))
    model.fit({mixture: score.value for mixture, score in table.items() if mixture.items})
    recorded = len(space.names)
    slopes = model.coefficients()
    on_weight, on_membership, on_size, on_pairs = np.split(slopes, [recorded, 2 * recorded, 2 * recorded + 1])
    draw = np.random.default_rng(seed)
    source = draw.integers(recorded, size=count)
    noise = [0.1 * values.std() * draw.standard_normal(count) for values in (on_weight, on_membership)]
    weight_terms, member_terms = on_weight[source] + noise[0], on_membership[source] + noise[1]
    pair_terms = np.triu(on_pairs[draw.integers(len(on_pairs), size=(count, count))], 1)
    place = {f"c{number:03}": number for number in range(count)}

    def value(mixture: Mixture) -> float:
        members = np.array([place[name] for name in mixture.names], dtype=int)
        if not len(members):
            return 0.0
        weights = np.array(list(mixture.weights.values()))
        pairs = weights @ pair_terms[np.ix_(members, members)] @ weights
        # Membership counts in proportion to the recorded number of candidates, or large mixtures would run away.
        members_share = member_terms[members].sum() * recorded / count
        return float(weights @ weight_terms[members] + members_share + on_size[0] / len(members) + pairs)

    return value
