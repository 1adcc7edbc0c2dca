"""Shapley values and interactions, against their definitions."""

import itertools
import math

import numpy as np
import pytest

from m2m_hf.analysis.shapley import shapley_values
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
    found = shapley_values(standings(game), NAMES)
    assert found.exact
    for name in NAMES:
        added = []
        for order in itertools.permutations(NAMES):
            before = order[: order.index(name)]
            added.append(game(Mixture.subset([*before, name])) - game(Mixture.subset(before)))
        assert found.shapley[name].value == pytest.approx(np.mean(added))
    assert sum(one.value for one in found.shapley.values()) == pytest.approx(game(Mixture.subset(NAMES)) - game(BASE))
    pairs = {one.pair: one.value for one in found.interactions}
    assert list(pairs)[:2] == [("c", "d"), ("a", "b")]  # the strongest first
    assert (pairs["a", "b"], pairs["c", "d"], pairs["a", "c"]) == pytest.approx((0.3, -0.4, 0.0))


def test_every_example_has_values_of_its_own_whose_spread_is_the_error():
    found = shapley_values(standings(game, rows=20), NAMES)
    singles = [shapley_values(standings(lambda m, r=row: game(m, r)), NAMES).shapley["a"].value for row in range(20)]
    assert found.shapley["a"].value == pytest.approx(np.mean(singles))
    assert found.shapley["a"].stderr == pytest.approx(np.std(singles, ddof=1) / math.sqrt(20))


def test_estimates_come_near_and_say_how_near():
    some = standings(
        game, keep=lambda m: len(m) in (0, 1, 4) or m.names in {("a", "b"), ("b", "c"), ("a", "d"), ("c", "d")}
    )
    found = shapley_values(some, NAMES)
    assert not found.exact
    truth = shapley_values(standings(game), NAMES)
    assert sum(one.value for one in found.shapley.values()) == pytest.approx(
        sum(one.value for one in truth.shapley.values())
    )
    for name in NAMES:
        assert found.shapley[name].value == pytest.approx(truth.shapley[name].value, abs=0.15)
        assert found.shapley[name].stderr > 0


def test_all_subsets_but_one_estimate_almost_exactly():
    found = shapley_values(standings(game, keep=lambda m: m.names != ("a", "c")), NAMES)
    truth = shapley_values(standings(game), NAMES)
    for name in NAMES:
        assert found.shapley[name].value == pytest.approx(truth.shapley[name].value, abs=0.05)


def test_too_few_mixtures_tell_nothing():
    assert shapley_values(standings(game, keep=lambda m: len(m) in (0, 1, 4)), NAMES) is None
