"""What is believed of fine-tuned mixtures."""

from itertools import product

import numpy as np
import pytest
from beliefs import Beliefs, Posterior

MEMBERS = np.array([one for one in product((False, True), repeat=4) if any(one)])
SIZE = np.log2(MEMBERS.sum(1))


def scores(seed: int = 0) -> np.ndarray:
    return MEMBERS @ np.array([1.0, 0.4, -0.3, -1.0]) / MEMBERS.sum(1) + 0.1 * np.random.default_rng(seed).normal(
        size=15
    )


def test_what_was_seen_one_by_one_is_what_is_known_at_once():
    """As the textbook's formula has it, in whatever order."""
    said, beliefs = [scores(0), scores(1)], Beliefs(noise=0.2)
    start, seen, variance = Posterior(MEMBERS, said, beliefs), [3, 9, 14], [0.0, 0.01, 0.02]
    truth = scores(2)
    scale = np.mean(said, axis=0).std()
    among = start.covariance[np.ix_(seen, seen)] + np.diag((0.2 * scale) ** 2 + np.array(variance))
    gain = start.covariance[:, seen] @ np.linalg.inv(among)
    mean = start.mean + gain @ (truth[seen] - start.mean[seen])
    covariance = start.covariance - gain @ start.covariance[seen]
    for order in ([0, 1, 2], [2, 0, 1]):
        posterior = Posterior(MEMBERS, said, beliefs)
        for number in order:
            posterior.learn(seen[number], truth[seen[number]], variance[number])
        np.testing.assert_allclose(posterior.mean, mean)
        np.testing.assert_allclose(posterior.covariance, covariance, atol=1e-12)


def test_without_noise_a_fine_tuned_mixture_is_known():
    posterior = Posterior(MEMBERS, [scores()], Beliefs(noise=0.0))
    before = posterior.spread
    posterior.learn(14, 5.0)
    assert posterior.mean[14] == pytest.approx(5.0)
    assert posterior.spread[14] == pytest.approx(0.0, abs=1e-6)
    assert (posterior.spread <= before + 1e-9).all()
    assert posterior.worth()[14] == 0
    assert (np.delete(posterior.worth(), 14) > 0).all()
    assert posterior.best == 14


def test_optimism_by_size_is_learnt_from_singles_and_all():
    """Singles score as predicted, all together lower; so pairs and threes are believed to be lower, too."""
    said = scores()
    truth = said - 0.5 * SIZE
    posterior = Posterior(MEMBERS, [said], Beliefs(members=0.1, rest=0.05, noise=0.01))
    for place in [*np.flatnonzero(SIZE == 0), 14]:
        posterior.learn(place, truth[place])
    larger = SIZE > 0
    assert np.abs(posterior.mean - truth)[larger].max() < 0.2 * np.abs(said - truth)[larger].max()
    assert truth[posterior.best] == pytest.approx(truth.max(), abs=0.05)


def test_the_unit_of_scores_does_not_matter():
    one, other = (Posterior(MEMBERS, [unit * scores()], Beliefs()) for unit in (1, 100))
    for posterior, unit in ((one, 1), (other, 100)):
        posterior.learn(14, -0.2 * unit)
    np.testing.assert_allclose(100 * one.mean, other.mean)
    np.testing.assert_allclose(100 * one.worth(), other.worth())
    assert one.sure(0.1) == pytest.approx(other.sure(10), abs=0.01)


def test_how_sure_the_choice_is():
    posterior = Posterior(MEMBERS, [scores()], Beliefs())
    assert 0 < posterior.sure(0) < posterior.sure(0.2) < posterior.sure(10) == 1
    for place in range(15):
        posterior.learn(place, scores(3)[place])
    assert posterior.sure(0.2) > 0.9


@pytest.mark.parametrize("count", [1, 3])
def test_scores_that_are_all_alike_are_no_error(count):
    posterior = Posterior(MEMBERS[:count], [np.zeros(count)], Beliefs())
    posterior.learn(0, 1.0)
    assert np.isfinite(posterior.mean).all()
    assert 0 <= posterior.sure(0.1) <= 1
