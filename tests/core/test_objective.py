"""An objective joins the rungs of a race into the score of all rows."""

import pytest

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.objective import Objective, TargetInfo, race_order
from m2m_hf.core.score import Failure, Score

A, B = Mixture.subset("a"), Mixture.subset("b")
VALUES = (5.0, 1.0, 4.0, 2.0, 3.0)
ORDER = (3, 0, 4, 1, 2)


class Rows(Objective):
    """Scores rows by a table; the second mixture fails on later rows."""

    name = "rows"

    def __init__(self) -> None:
        super().__init__(TargetInfo("t", 5, order=ORDER))
        self.asked = []

    def key(self, mixture, rung=None):
        return f"{mixture} {rung}"

    def _score(self, mixtures, rows):
        self.asked.append(rows)
        rows = range(5) if rows is None else rows
        values = [VALUES[row] for row in rows]
        score = Score.of(values, [-value for value in values])
        return [Failure("no") if mixture == B and 2 in rows else score for mixture in mixtures]

    def _summarise(self, score):
        return Score(score.value, 0.125, score.values, score.logprobs)


def test_rungs_are_joined_and_all_rows_stand_in_their_own_order():
    objective = Rows()
    first, _ = objective([A, B], 2)
    assert (first.values, first.logprobs) == ((2.0, 5.0), (-2.0, -5.0))
    assert first.value == 3.5
    (second,) = objective([A], 3, {A: first})
    assert second.values == (2.0, 5.0, 3.0)
    last, failed = objective([A, B], None, {A: second, B: second})
    assert (last.values, last.logprobs) == (VALUES, tuple(-value for value in VALUES))
    assert (last.value, last.stderr) == (3.0, 0.125)  # by `_summarise`
    assert failed == Failure("no")
    assert objective.asked == [ORDER[:2], ORDER[2:3], ORDER[3:]]
    assert objective([A])[0].values == VALUES
    assert objective.asked[-1] is None


@pytest.mark.parametrize("examples", [1, 7, 200])
def test_the_order_of_a_race_is_a_permutation_that_follows_from_the_target(examples):
    order = race_order("scorer", examples)
    assert sorted(order) == list(range(examples))
    assert order == race_order("scorer", examples)
    assert examples == 1 or order != race_order("another scorer", examples)
