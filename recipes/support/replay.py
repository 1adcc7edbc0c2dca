"""Searches that cost nothing: on the recorded scores of an exhaustive run, or on a made-up landscape fitted to such a run.

How good a strategy is, and how far a race may be trusted, can only be told from many searches whose best answer is known.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from scipy.stats import t

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Failure, Score
from m2m_hf.search.model_based import ScoreModel
from m2m_hf.search.strategies import SearchProblem
from m2m_hf.storage.journal import Journal


class Replay:
    """An objective that answers from a table of scores with a value for every example.

    Args:
        table: mixture -> its score.
        seed: of the order in which a race sees the examples.
        likelihood: whether the score is the mean log-probability of the right answers instead of the one recorded.
    """

    name = target = "replay"
    weight = 1.0
    min_delta: float | None = None
    failed: Mapping[str, str] = {}
    differentiable = False

    def __init__(self, table: Mapping[Mixture, Score], seed: int = 0, likelihood: bool = False) -> None:
        self.table = {
            mixture: Score.of(score.logprobs, score.logprobs) if likelihood else score
            for mixture, score in table.items()
        }
        self.examples = len(next(iter(self.table.values())).values)
        self.spent = 0  # examples asked for
        self.order = tuple(Random(seed).sample(range(self.examples), self.examples))

    @classmethod
    def of_run(cls, trials: Path, target: str | None = None, **options: Any) -> "Replay":
        """The complete merged trials of one target (the first one found) in a run's journal."""
        table = {}
        for trial in Journal(trials).trials.values():
            target = target or trial.target
            if trial.target == target and trial.state == "complete" and trial.objective == "merged" and trial.score:
                table[trial.mixture] = trial.score
        return cls(table, **options)

    def at_once(self, rows: int) -> int:
        return 1

    def key(self, mixture: Mixture, rung: int | None = None) -> str:
        return f"{mixture.items} {rung}"

    def evaluations(self, mixture: Mixture, rows: int) -> int:
        return rows

    def __call__(self, mixtures: Sequence[Mixture], rows: Sequence[int] | None = None) -> list[Score | Failure]:
        self.spent += len(mixtures) * (self.examples if rows is None else len(rows))
        if rows is None:
            return [self.table[mixture] for mixture in mixtures]
        found: list[Score | Failure] = []
        for mixture in mixtures:
            values, logprobs = (np.asarray(one) for one in (self.table[mixture].values, self.table[mixture].logprobs))
            found.append(Score.of(values[list(rows)].tolist(), logprobs[list(rows)].tolist() if len(logprobs) else ()))
        return found

    def whole(self, score: Score) -> Score:
        return Score.of(score.values, score.logprobs)

    def likelihood(self, score: Score) -> float:
        return score.mean_logprob

    def gradient(self, mixture: Mixture) -> Score | Failure:
        raise TypeError("a table has no gradient")


class Landscape(Replay):
    """A made-up objective without examples: any number of candidates, any mixture.

    Args:
        value: mixture -> score.
    """

    def __init__(self, value: Callable[[Mixture], float]) -> None:
        self._value = value
        self.examples, self.order, self.spent = 1, (), 0

    def __call__(self, mixtures: Sequence[Mixture], rows: Sequence[int] | None = None) -> list[Score | Failure]:
        return [Score(self._value(mixture)) for mixture in mixtures]


def tells_apart(better: Score, worse: Score, risk: float = 0.05) -> bool:
    """Whether a one-sided paired t-test over all examples tells that the first is better than the second."""
    differences = np.array(better.values) - np.array(worse.values)
    spread = differences.std(ddof=1)
    if spread == 0:
        return bool(differences.mean() > 0)
    return bool(differences.mean() / spread * len(differences) ** 0.5 > t.ppf(1 - risk, len(differences) - 1))


def larger_landscape(
    table: Mapping[Mixture, Score], task: SearchProblem, count: int, seed: int
) -> Callable[[Mixture], float]:
    """A landscape over `count` candidates whose shape is that of recorded trials.

    `ScoreModel` without a screen is fitted to the recorded scores. A candidate's coefficients (on its weight, on being in the
    mixture) are those of a recorded candidate drawn at random, with a tenth of their spread as noise; a pair's are those of a
    recorded pair.

    Args:
        table: recorded scores of subsets.
        task: with the recorded candidates as its space.
        count: candidates of the landscape, called c000, c001, …
        seed: of the draws.
    """
    model = ScoreModel(SearchProblem(task.space))
    model.fit({mixture: score.value for mixture, score in table.items() if mixture.items})
    given = len(task.space.names)
    slopes = model.coefficients()
    on_weight, on_membership, on_size, on_pairs = np.split(slopes, [given, 2 * given, 2 * given + 1])
    draw = np.random.default_rng(seed)
    source = draw.integers(given, size=count)
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
        members_share = member_terms[members].sum() * given / count
        return float(weights @ weight_terms[members] + members_share + on_size[0] / len(members) + pairs)

    return value
