"""Shapley values and interactions, against their definitions."""

import itertools
import math

import numpy as np
import pytest

from m2m_hf.analysis.shapley import worth
from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.score import Score
from m2m_hf.core.trial import Standing, Trial

NAMES = ("a", "b", "c", "d")


def standings(value, keep=lambda mixture: True, rows: int = 0) -> dict[Mixture, Standing]:
    found = {}
    for size in range(5):
        for names in itertools.combinations(NAMES, size):
            mixture = Mixture.subset(names)
            if keep(mixture):
                score = Score.of([value(mixture, row) for row in range(rows)]) if rows else Score(value(mixture))
                trial = Trial(str(mixture), mixture, "merged", "t", rows, "complete", score, 0.0)
                found[mixture] = Standing(mixture, {"t": trial}, {"t": 1.0})
    return found


def game(mixture: Mixture, row: int = 0) -> float:
    gifts = {"a": 0.5, "b": 0.2, "c": -0.1, "d": 0.0}
    both = 0.3 * ({"a", "b"} <= set(mixture.names)) - 0.4 * ({"c", "d"} <= set(mixture.names))
    return 0.1 + sum(gifts[name] for name in mixture.names) + both + 0.01 * row * len(mixture)


def test_exact_values_are_the_mean_over_all_orders():
    found = worth(standings(game), NAMES)
    assert found.exact
    for name in NAMES:
        added = []
        for order in itertools.permutations(NAMES):
            before = order[: order.index(name)]
            added.append(game(Mixture.subset([*before, name])) - game(Mixture.subset(before)))
        assert found.shapley[name][0] == pytest.approx(np.mean(added))
    assert sum(value for value, _ in found.shapley.values()) == pytest.approx(game(Mixture.subset(NAMES)) - game(BASE))
    assert found.interactions["a", "b"][0] == pytest.approx(0.3)
    assert found.interactions["c", "d"][0] == pytest.approx(-0.4)
    assert found.interactions["a", "c"][0] == pytest.approx(0.0)


def test_every_example_has_values_of_its_own_whose_spread_is_the_error():
    found = worth(standings(game, rows=20), NAMES)
    singles = [worth(standings(lambda m, r=row: game(m, r)), NAMES).shapley["a"][0] for row in range(20)]
    value, stderr = found.shapley["a"]
    assert value == pytest.approx(np.mean(singles))
    assert stderr == pytest.approx(np.std(singles, ddof=1) / math.sqrt(20))


def test_estimates_come_near_and_say_how_near():
    some = standings(
        game, keep=lambda m: len(m) in (0, 1, 4) or m.names in {("a", "b"), ("b", "c"), ("a", "d"), ("c", "d")}
    )
    found = worth(some, NAMES)
    assert not found.exact
    truth = worth(standings(game), NAMES)
    assert sum(v for v, _ in found.shapley.values()) == pytest.approx(sum(v for v, _ in truth.shapley.values()))
    for name in NAMES:
        assert found.shapley[name][0] == pytest.approx(truth.shapley[name][0], abs=0.15)
        assert found.shapley[name][1] > 0


def test_all_subsets_but_one_estimate_almost_exactly():
    found = worth(standings(game, keep=lambda m: m.names != ("a", "c")), NAMES)
    truth = worth(standings(game), NAMES)
    for name in NAMES:
        assert found.shapley[name][0] == pytest.approx(truth.shapley[name][0], abs=0.05)


def test_too_few_mixtures_tell_nothing():
    assert worth(standings(game, keep=lambda m: len(m) in (0, 1, 4)), NAMES) is None
