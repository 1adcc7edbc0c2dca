"""The statistics of the correlation study: against SciPy, against simulations of which the truth is known."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from m2m_hf.analysis import fidelity
from m2m_hf.analysis.fidelity import Agreement, Estimate, Rows, agreement, jackknife, sample, verdict
from m2m_hf.analysis.study_report import Figures, has_logprobs
from m2m_hf.core.jsonable import to_json
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Score
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Standing, Trial


def subsets(count: int) -> list[Mixture]:
    names = [f"d{number}" for number in range(count)]
    return [Mixture.subset(some) for size in range(1, count + 1) for some in combinations(names, size)]


@pytest.mark.parametrize("seed", range(5))
def test_weighted_correlations_are_those_of_repeated_points(seed):
    draw = np.random.default_rng(seed)
    x, y = draw.integers(0, 6, size=(2, 12)).astype(float)  # with ties
    counts = draw.integers(1, 4, size=12)
    long_x, long_y = np.repeat(x, counts), np.repeat(y, counts)
    for weighted, statistic in (
        (fidelity.weighted_pearson, stats.pearsonr),
        (fidelity.weighted_spearman, stats.spearmanr),
        (fidelity.weighted_kendall, stats.kendalltau),
    ):
        (found,) = weighted(x[None], y[None], counts[None].astype(float))
        assert found == pytest.approx(statistic(long_x, long_y).statistic)


def test_a_perfect_surrogate_and_its_opposite():
    mixtures = subsets(4)
    draw = np.random.default_rng(0)
    true = draw.normal(size=(15, 1)) + 0.01 * draw.normal(size=(15, 200))
    best = agreement(mixtures, [Rows(2 * true + 1, true)])
    for one in (best.pearson, best.spearman, best.kendall):
        assert one.value == pytest.approx(1)
        assert one.row_ci[0] > 0.9
    assert best.regret.value == 0
    assert best.rank_of_best == 1
    assert best.tied
    assert {k: one.value for k, one in best.recall.items()} == {1: 1, 3: 1, 5: 1}
    worst = agreement(mixtures, [Rows(-true, true)])
    assert worst.spearman.value == pytest.approx(-1)
    assert worst.rank_of_best == 15
    assert worst.regret.value == pytest.approx(np.ptp(true.mean(1)))
    assert not worst.tied
    assert worst.random_regret == pytest.approx(true.mean(1).max() - true.mean())


def test_targets_are_weighed():
    mixtures = subsets(3)
    draw = np.random.default_rng(1)
    a, b = draw.normal(size=(2, 7, 30))
    noise = draw.normal(size=(7, 30))
    both = agreement(mixtures, [Rows(a, b, 0.75), Rows(noise, a, 0.25)])
    expected = stats.pearsonr(0.75 * a.mean(1) + 0.25 * noise.mean(1), 0.75 * b.mean(1) + 0.25 * a.mean(1)).statistic
    assert both.pearson.value == pytest.approx(expected)


def test_what_does_not_vary_has_no_correlation_and_no_warning():
    constant, rising = np.full((15, 20), 0.5), np.repeat(np.arange(15.0)[:, None], 20, axis=1)
    one = agreement(subsets(4), [Rows(constant, rising)])
    assert np.isnan(one.pearson.value)
    assert to_json(one.pearson) == {"value": None, "row_ci": None, "candidate_ci": None}
    assert verdict(one, one).verdict == "distrust"


def test_without_values_by_row_there_is_no_interval_over_rows():
    draw = np.random.default_rng(2)
    one = agreement(subsets(4), [Rows(draw.normal(size=(15, 1)), draw.normal(size=(15, 1)))])
    assert one.pearson.row_ci is None
    assert one.halves is None
    assert one.tied is None
    assert one.pearson.candidate_ci is not None  # candidates can be left out all the same


def test_noise_of_shared_rows_does_not_help_across_halves():
    draw = np.random.default_rng(3)
    noise = draw.normal(size=(15, 60))  # both sides get the same rows wrong, and nothing else is there
    one = agreement(subsets(4), [Rows(noise, noise + 0.1 * draw.normal(size=(15, 60)))])
    assert one.pearson.value > 0.9
    assert abs(one.halves) < 0.35


def test_intervals_for_endless_rows_hold_the_truth():
    """With 80 rows whose noise is half the same for both, about nine of ten intervals hold what endless rows would show."""
    mixtures = subsets(4)
    held = 0
    for seed in range(30):
        draw = np.random.default_rng(seed)
        level = draw.normal(size=15)
        other = 0.8 * level + 0.6 * draw.normal(size=15)
        noise = draw.normal(size=(15, 80))
        own = (0.7 * noise + 0.7 * draw.normal(size=(15, 80)) for _ in range(2))
        x, y = (side[:, None] + 3 * rows for side, rows in zip((level, other), own, strict=True))
        low, high = agreement(mixtures, [Rows(x, y)], seed=seed).pearson.row_ci
        held += low <= stats.pearsonr(level, other).statistic <= high
    assert held >= 24


def test_intervals_for_other_candidates_hold_the_truth_where_naive_ones_do_not():
    """Candidates whose quality the surrogate sees through noise of their own; mixtures average it."""
    mixtures = subsets(6)
    members = np.array([[f"d{n}" in mixture.weights for n in range(6)] for mixture in mixtures]) / 1.0
    members /= members.sum(1, keepdims=True)
    draw = np.random.default_rng(0)

    def study():
        quality = draw.normal(size=6)
        return members @ (quality + draw.normal(size=6)), members @ quality

    truth = np.tanh(np.mean([np.arctanh(stats.pearsonr(*study()).statistic) for _ in range(400)]))
    ours = naive = 0
    for _ in range(60):
        x, y = study()
        low, high = jackknife(stats.pearsonr, mixtures, x, y)
        ours += low <= truth <= high
        z, reach = np.arctanh(stats.pearsonr(x, y).statistic), 1.96 / np.sqrt(len(x) - 3)
        naive += np.tanh(z - reach) <= truth <= np.tanh(z + reach)
    assert ours >= 54
    assert naive <= 36
    assert jackknife(stats.pearsonr, subsets(3), *draw.normal(size=(2, 7))) is None  # which say nothing of others


def made(low: float, tied: bool | None, place: int, above: bool | None = True, mixtures: int = 12) -> Agreement:
    rho = Estimate(0.7, (low, 1.0))
    return Agreement(mixtures, rho, rho, rho, 0.5, {}, Estimate(0.0), 0.1, place, tied, above)


@pytest.mark.parametrize(
    ("low", "tied", "above", "place", "expected"),
    [
        (0.2, True, True, 1, "trust"),
        (0.2, True, True, 9, "trust"),
        (0.2, True, False, 1, "prune"),  # rows that tell nothing make no trust
        (0.2, False, True, 4, "prune"),
        (0.2, False, True, 5, "distrust"),
        (-0.1, True, True, 1, "distrust"),
        (0.0, True, True, 1, "distrust"),
        (0.2, None, None, 1, "unknown"),
    ],
)
def test_the_verdict_follows_its_rule(low, tied, above, place, expected):
    one = made(low, tied, place, above)
    assert verdict(one, one).verdict == expected


def test_no_verdict_on_few_mixtures():
    one = made(0.5, True, 1, mixtures=5)
    assert verdict(one, one).verdict == "unknown"
    assert verdict(made(0.5, True, 1), None).verdict == "unknown"


def test_samples_hold_the_top_all_together_singles_and_random_ones():
    names = tuple("abcdefgh")
    space = SearchSpace(names)
    everything = list(space.subsets())
    ranking = everything[100:] + everything[:100]
    found = sample(space, ranking, None, 0)
    assert len(found) == len(set(found)) == fidelity.SAMPLE
    assert set(ranking[:3]) <= set(found)
    assert Mixture.subset(names) in found
    assert sum(len(one) == 1 for one in found) >= 6
    assert sum(1 < len(one) < 8 for one in found) >= 5
    assert found == sample(space, ranking, None, 0)
    assert found != sample(space, ranking, None, 1)
    assert len(sample(space, ranking, 30, 0)) == 30


def test_samples_count_what_the_constraints_leave():
    names = tuple("abcdefghij")
    space = SearchSpace(names, required=frozenset(names[:7]))  # eight subsets may be chosen
    found = sample(space, [], None, 0)
    assert set(space.subsets()) <= set(found)
    assert len(found) == fidelity.ALL_UP_TO
    few = SearchSpace(names[:4])
    assert set(sample(few, [], None, 0)) == set(few.subsets())  # everything where that is little
    everything = SearchSpace(names)
    few = sample(everything, list(everything.subsets()), 4, 0)
    assert len(few) == 4
    assert Mixture.subset(names) in few


def test_samples_of_many_candidates_are_not_all_singles():
    space = SearchSpace(tuple(f"n{number:02d}" for number in range(40)), max_datasets=5)
    ranking = [Mixture.subset(["n07", "n09"]), Mixture.subset(["n07"]), Mixture.subset(["n01", "n09"])]
    found = sample(space, ranking, 16, 0)
    singles = [one for one in found if len(one) == 1]
    assert len(found) == 16
    assert Mixture.subset(["n07"]) in singles
    assert len(singles) <= 9
    assert all(one in space or len(one) == 40 for one in found)


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
    trial = Trial("key", mixture, "trained", "quiz", 2, "complete", Score.of(values, logprobs), 0.1)
    standing = Standing(mixture, {"quiz": trial}, {"quiz": 1.0})
    assert has_logprobs([standing]) is more
    assert (Figures.of(standing).logprob is not None) is more
