"""Selection bias and the probability of being the best, on made-up scores of which the truth is known."""

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import norm

from m2m_hf.analysis.selection_bias import probability_best, selection_bias, told_apart
from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.score import Score, paired
from m2m_hf.core.trial import Standing, Trial

NAMES = [f"d{number}" for number in range(5)]
MIXTURES = [Mixture.subset(some) for size in range(1, 6) for some in combinations(NAMES, size)]


def standing(mixture: Mixture, *values, weights=(1.0, 1.0)) -> Standing:
    """How a mixture stands that scored these values on the rows of one target or several."""
    trials = {
        f"t{n}": Trial("k", mixture, "merged", f"t{n}", len(rows), "complete", Score.of([float(v) for v in rows]), 0.0)
        for n, rows in enumerate(values)
    }
    return Standing(mixture, trials, {f"t{n}": weights[n] for n in range(len(values))})


def study(draw, spread: float, rows: int = 300) -> tuple[np.ndarray, list[Standing], Standing]:
    """(true scores, how all mixtures stand, best first; how the base stands) on rows that are easy or hard for all alike."""
    true = 0.5 + spread * draw.standard_normal(len(MIXTURES))
    common = 0.6 * draw.standard_normal(rows)

    def answers(level):
        return common + 0.8 * draw.standard_normal(rows) < norm.ppf(level)

    standings = [standing(mixture, answers(level)) for mixture, level in zip(MIXTURES, true, strict=True)]
    base = standing(BASE, answers(0.45))
    return true, sorted(standings, key=lambda one: -one.score.value), base


@pytest.mark.parametrize("spread", [0.0, 0.03])
def test_the_score_is_corrected_for_selection_bias(spread):
    """And over many studies the chosen mixture is the best about as often as it is said to be."""
    raw, corrected, said, happened, held = [], [], [], [], 0
    for seed in range(40):
        true, ranking, base = study(np.random.default_rng(seed), spread)
        best = ranking[0]
        level = true[MIXTURES.index(best.mixture)]
        bias = selection_bias(ranking, best, {"base": base}, seed=seed)
        raw.append(best.score.value - level)
        corrected.append(bias.corrected - level)
        said.append(bias.probability_best)
        happened.append(level == true.max())
        gain = bias.differences["base"]
        held += gain.low <= level - 0.45 <= gain.high
    assert np.mean(raw) > 0.025
    assert abs(np.mean(corrected)) < 0.5 * np.mean(raw)
    assert held >= 34
    if spread:
        assert np.mean(said) == pytest.approx(np.mean(happened), abs=0.15)
    else:  # the best of equals is not said to be the best
        assert np.mean(said) < 0.15


def test_of_a_cut_off_ranking_the_others_count():
    """Only the best of many are compared; how far scores spread is told by all."""
    draw = np.random.default_rng(0)
    said, happened = [], []
    for _ in range(60):
        true = 0.03 * draw.standard_normal(255)
        scores = true + 0.02 * draw.standard_normal(255)
        order = np.argsort(-scores)[:20]
        said.append(probability_best(scores[order], 0.0004 * (np.eye(20) - 1 / 20), scores))
        happened.append(true[order[0]] == true.max())
    assert np.mean(said) == pytest.approx(np.mean(happened), abs=0.12)


def test_a_clear_winner_is_sure_and_equals_are_not():
    draw = np.random.default_rng(0)
    values = draw.normal(size=(3, 400))
    clear = [standing(mixture, row) for mixture, row in zip(MIXTURES, values + np.array([[3], [0], [0]]), strict=False)]
    bias = selection_bias(clear, clear[0], {})
    assert bias.probability_best > 0.99
    assert bias.tied == 1
    assert bias.rows_needed < 1
    assert bias.optimism < 0.1
    same = [standing(mixture, values[0]) for mixture in MIXTURES[:4]]
    bias = selection_bias(same, same[0], {})
    assert bias.probability_best == pytest.approx(0.25)
    assert bias.tied == 4
    assert bias.rows_needed is None
    assert probability_best(np.array([0.3]), np.zeros((1, 1)), np.array([0.3])) == 1.0


def test_so_many_rows_tell_them_apart():
    """With the rows that it asks for, a paired two-sided test at 5 % tells the two apart in about 80 of 100 tries."""
    draw = np.random.default_rng(1)
    pair = [standing(MIXTURES[n], draw.normal(size=500) + shift) for n, shift in enumerate((0.1, 0.0))]
    pair.sort(key=lambda one: -one.score.value)
    bias = selection_bias(pair, pair[0], {})
    gain = pair[0].over(pair[1])
    rows = round(500 * bias.rows_needed)
    told = 0
    for _ in range(400):
        values = gain.value + gain.stderr * 500**0.5 * draw.normal(size=rows)
        told += abs(values.mean()) > 1.96 * values.std(ddof=1) / rows**0.5
    assert told / 400 == pytest.approx(0.8, abs=0.07)


def test_paired_differences_and_several_targets():
    a, b = standing(MIXTURES[0], [1, 1, 0, 1], [0.5, 0.7]), standing(MIXTURES[1], [1, 0, 0, 0], [0.4, 0.6])
    value, stderr = paired(a.scores, b.scores, {"t0": 3.0, "t1": 1.0})
    assert value == pytest.approx(0.75 * 0.5 + 0.25 * 0.1)
    expected = 0.75 * np.std([0, 1, 0, 1], ddof=1) / 2  # of the other target both differ by the same on every row
    assert stderr == pytest.approx(expected)
    assert not told_apart(b, a)


def test_without_values_by_row_nothing_is_said():
    number = Standing(
        MIXTURES[0], {"t": Trial("k", MIXTURES[0], "merged", "t", 0, "complete", Score(0.5), 0.0)}, {"t": 1.0}
    )
    assert selection_bias([number], number, {}) is None
    assert paired({"t": Score(0.5)}, {"t": Score(0.25)}, {"t": 1.0}) == (0.25, None)
