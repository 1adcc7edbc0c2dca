"""Statistics of a study, from standings alone."""

import pytest

from m2m_hf.analysis.study_report import Figures, has_logprobs
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Score
from m2m_hf.core.trial import Standing, Trial


@pytest.mark.parametrize(
    ("values", "logprobs", "more"),
    [
        ((-1.0, -3.0), (-2.0, -6.0), False),  # a loss is the log-probability, per token
        ((0.0, 1.0), (-2.0, -6.0), True),
        ((0.0, 0.0), (-2.0, -6.0), True),
        ((-1.0, -3.0), (-2.0, -1.0), True),
        ((0.0, 1.0), (), False),
    ],
)
def test_log_probabilities_are_told_apart_only_where_the_score_is_something_else(values, logprobs, more):
    mixture = Mixture.subset(["a"])
    score = Score.of(values, logprobs)
    trial = Trial("key", mixture, "trained", "quiz", 2, "complete", score, 0.1)
    standing = Standing(mixture, {"quiz": trial}, {"quiz": 1.0})
    assert has_logprobs([standing]) is more
    assert (Figures.of(standing).logprob is not None) is more
