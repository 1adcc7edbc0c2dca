"""What fine-tuning on mixtures is expected to give."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from m2m_hf.analysis.beliefs import SCALES, Beliefs, Prior

MEMBERS = np.array([one for one in product((0, 1), repeat=4) if any(one)])
SIZE = np.log2(MEMBERS.sum(1))
SINGLES = np.flatnonzero(SIZE == 0)
ROWS = np.zeros(15)


def scores(seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=15)
    return MEMBERS @ np.array([1.0, 0.4, -0.3, -1.0]) / MEMBERS.sum(1) + 0.1 * noise


def taught(truth, places, said=None, prior=None, unit: float = 1.0) -> Beliefs:
    """What is believed once singles and these are known."""
    said = scores() if said is None else said
    beliefs = Beliefs(MEMBERS, [unit * said], prior)
    for place in SINGLES:
        beliefs.learn(place, unit * truth[place], is_surrogate=True)
    for place in places:
        beliefs.learn(place, unit * truth[place])
    return beliefs


def test_beliefs_are_the_textbooks_whatever_the_order():
    """Rasmussen and Williams (2006), equations 2.23, 2.24 and 2.30, of covariances that are drawn from the prior."""
    prior, said, truth, seen = Prior(noise=0.2), [scores(0), scores(1)], scores(2), [3, 8, 14]
    start = Beliefs(MEMBERS, said, prior)
    unit = start.surrogate.std()
    covariance = start._covariance
    among = covariance[np.ix_(seen, seen)] + 0.2**2 * np.eye(3)
    wrong = (truth[seen] - start.surrogate[seen]) / unit
    mean = start.surrogate + unit * covariance[:, seen] @ np.linalg.inv(among) @ wrong
    left = covariance - covariance[:, seen] @ np.linalg.inv(among) @ covariance[seen]
    before = np.exp(-0.5 * (np.log(SCALES) / prior.factor) ** 2)
    evidence = before * np.array([np.exp(-0.5 * wrong @ np.linalg.inv(s * s * among) @ wrong) / s**3 for s in SCALES])
    unseen = [place for place in range(15) if place not in seen]
    for order in ([3, 8, 14], [14, 3, 8]):
        beliefs = Beliefs(MEMBERS, said, prior)
        for place in order:
            beliefs.learn(place, truth[place])
        np.testing.assert_allclose(beliefs.mean[unseen], mean[unseen])
        np.testing.assert_allclose(beliefs.likely, evidence / evidence.sum())
        scale = (evidence / evidence.sum()) @ np.square(SCALES)
        np.testing.assert_allclose(beliefs.spread[unseen], (unit * np.sqrt(scale * np.diag(left)))[unseen])


def test_a_mixture_that_was_fine_tuned_is_known():
    beliefs = taught(scores(), [])
    beliefs.learn(14, 5.0)
    assert beliefs.mean[14] == 5.0
    assert beliefs.spread[14] == 0
    assert beliefs.gains()[14] == 0
    assert beliefs.best == 14
    assert beliefs.next()[0] not in [*SINGLES, 14]


def test_optimism_by_size_is_learnt_from_what_was_fine_tuned():
    """Larger mixtures score lower than predicted, the more the larger; what was not fine-tuned is believed to do so, too."""
    said = scores()
    truth = said - 0.5 * SIZE
    prior = Prior(level=0.01, by_size=1.0, slope=0.01, members=0.01, rest=0.05, noise=0.01)
    beliefs = taught(truth, [14], prior=prior)
    larger = SIZE > 0
    assert np.abs(beliefs.mean - truth)[larger].max() < 0.2 * np.abs(said - truth)[larger].max()


def test_singles_say_nothing_of_how_wrong_surrogates_are():
    beliefs = taught(scores(), [])
    np.testing.assert_allclose(beliefs.likely, Beliefs(MEMBERS, [scores()]).likely)
    surprised = taught(scores() + 3.0, [14])
    assert surprised.likely.argmax() > taught(scores(), [14]).likely.argmax()
    assert surprised.spread.max() > taught(scores(), [14]).spread.max()


def test_the_unit_of_scores_does_not_matter():
    one, other = (taught(scores(3), [14, 5], unit=unit) for unit in (1, 100))
    np.testing.assert_allclose(100 * one.mean, other.mean)
    np.testing.assert_allclose(100 * one.gains(), other.gains())
    quantiles = [
        [np.quantile(part, level) for level in (0.5, 0.9)] for part in (one.behind(ROWS)[0], other.behind(ROWS)[0])
    ]
    assert 100 * np.array(quantiles[0]) == pytest.approx(quantiles[1], rel=0.2, abs=1.0)


def test_the_next_is_the_one_that_is_expected_to_gain_most():
    """Expected improvement, as drawn: the mean of what a mixture gains over the best one known."""
    beliefs = taught(scores(3), [14])
    place = beliefs.next()[0]
    random, draws = np.random.default_rng(0), 400_000
    scale = np.repeat(SCALES, random.multinomial(draws, beliefs.likely))
    gains = beliefs.gains()
    for one in (place, *np.flatnonzero(SIZE > 0)[:2]):
        spread = np.sqrt(beliefs._left[one, one]) * scale
        drawn = beliefs.mean[one] + spread * random.standard_normal(draws) - beliefs.mean[beliefs.best]
        assert gains[one] == pytest.approx(np.maximum(drawn, 0).mean(), rel=0.05, abs=1e-4)
        noise = beliefs._noise * beliefs._unit * scale * random.standard_normal(draws)
        assert beliefs.beaten_by(one) == pytest.approx((drawn + noise > 0).mean(), abs=0.01)
    assert gains.argmax() == place
    several = beliefs.next(3)
    assert several[0] == place
    assert len({*several}) == 3
    assert len(beliefs.next(99)) == 10  # of the larger ones all but the one that is known


def test_what_may_not_be_chosen_still_tells_of_others():
    beliefs, with_it = taught(scores(3), [8]), taught(scores(3), [8])
    with_it.learn(14, 9.0, may_be_chosen=False)
    assert with_it.best == beliefs.best
    assert with_it.mean[13] > beliefs.mean[13]
    assert with_it.gains()[14] == 0
    with_it.leave_out(13)
    assert not {13, 14} & {*with_it.next(99)}
    assert np.isfinite(with_it.behind(ROWS)[0]).all()


def test_how_far_the_choice_may_be_from_the_best():
    truth, larger = scores(3), [int(place) for place in np.flatnonzero(SIZE > 0)]
    little, much = (taught(truth, larger[:count]) for count in (1, 9))
    for beliefs in (little, much):
        behind, noise = beliefs.behind(ROWS)
        assert (behind >= 0).all()
        assert (noise > 0).all()
    assert much.behind(ROWS)[0].mean() < little.behind(ROWS)[0].mean()
    assert (taught(truth, larger).behind(ROWS)[0] == 0).all()  # all are known
    unsure = taught(truth, larger).behind(np.where(np.arange(15) == much.best, 0.0, 0.5))[0]
    assert np.quantile(unsure, 0.9) > 0.1  # but for the rows


def test_evidence_is_the_likelihood_of_what_was_scored():
    beliefs, places, truth = Beliefs(MEMBERS, [scores()]), [3, 8, 14], scores(2)
    among = beliefs._covariance[np.ix_(places, places)] + Prior().noise ** 2 * np.eye(3)
    wrong = (truth[places] - beliefs.surrogate[places]) / beliefs.surrogate.std()
    densities = [multivariate_normal(cov=s * s * among).pdf(wrong) for s in SCALES]
    assert beliefs.evidence(places, truth[places]) == pytest.approx(np.log(beliefs.likely @ densities))


def test_beliefs_are_calibrated_where_the_prior_is_true():
    """What is said with 90 % is true nine times in ten, with 50 % half of the time."""
    random, prior, true = np.random.default_rng(0), Prior(), {0.5: 0, 0.9: 0}
    cases = dict.fromkeys(true, 0)
    for _ in range(300):
        said = random.normal(size=15)
        start = Beliefs(MEMBERS, [said], prior)
        scale = random.choice(SCALES, p=start.likely) * said.std()
        truth = said + scale * np.linalg.cholesky(start._covariance + 1e-9 * np.eye(15)) @ random.normal(size=15)
        truth[SINGLES] = said[SINGLES]
        beliefs = taught(truth, [], said, prior)
        for place in (beliefs.next()[0], 14):
            beliefs.learn(place, truth[place] + scale * prior.noise * random.normal())
        behind = beliefs.behind(ROWS)[0]
        rest = truth.copy()
        rest[beliefs.best] = beliefs.mean[beliefs.best]
        gap = rest[[place for place in range(15) if place not in beliefs.known or place == beliefs.best]].max()
        for level in true:
            if (most := np.quantile(behind, level)) > 0:  # where it is 0 more is true than said
                cases[level] += 1
                true[level] += gap - beliefs.mean[beliefs.best] <= most
    assert 0.42 < true[0.5] / cases[0.5] < 0.58
    assert 0.86 < true[0.9] / cases[0.9] < 0.94


@pytest.mark.parametrize("count", [1, 3])
def test_scores_that_are_all_alike_are_no_error(count):
    beliefs = Beliefs(MEMBERS[:count], [np.zeros(count)], replace(Prior(), noise=0.1))
    beliefs.learn(0, 1.0)
    assert np.isfinite(beliefs.mean).all()
    assert np.isfinite(beliefs.behind(ROWS[:count])[0]).all()
    assert len(beliefs.next()) == (count > 1)
