"""How a mixture stands, by its trials."""

import pytest

from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.objective import TargetInfo
from m2m_hf.core.score import Failure, Score
from m2m_hf.core.trial import Reference, Trial

TARGETS = [TargetInfo("t", 4, 1.0, 0.1, (3, 2, 1, 0)), TargetInfo("u", 2, 3.0, None, (0, 1))]
ALL, PRUNED = Mixture.subset("ab"), Mixture.subset("a")


def trials(mixture: Mixture, *values) -> dict[str, Trial]:
    """One trial for every target, on as many rows as there are values."""
    results = [one if isinstance(one, Failure) else Score.of(one) for one in values]
    return {
        target.name: Trial.of(result, mixture, "merged", target, "key", len(of) if isinstance(of, tuple) else None)
        for target, result, of in zip(TARGETS, results, values, strict=True)
    }


def test_a_pruned_score_is_corrected_by_what_the_control_gains_on_all_rows():
    control = trials(ALL, (1.0, 1.0, 0.0, 0.0), (0.0, 1.0))
    standing = Reference(TARGETS, control=control).standing(PRUNED, trials(PRUNED, (0.5, 0.5), (1.0,)))
    assert standing.pruned
    assert not standing.may_be_chosen
    assert standing.offset == pytest.approx((1 * (0.5 - 0.0) + 3 * (0.5 - 0.0)) / 4)
    assert standing.estimate == pytest.approx((0.5 + 3 * 1.0) / 4 + 0.5)
    assert Reference(TARGETS).standing(PRUNED, trials(PRUNED, (0.5, 0.5), (1.0,))).offset == 0


@pytest.mark.parametrize(("level", "short"), [(0.5, ()), (0.4, ()), (0.39, ("t",))])
def test_only_what_is_worse_than_the_base_by_more_than_min_delta_falls_short(level, short):
    base = trials(BASE, (0.5,) * 4, (1.0, 1.0))
    standing = Reference(TARGETS, base).standing(PRUNED, trials(PRUNED, (level,) * 4, (0.0, 0.0)))
    assert standing.short == short
    assert standing.may_be_chosen == (not short)
    assert Reference(TARGETS).standing(PRUNED, standing.trials).short == ()  # nothing to compare with


def test_a_failed_target_leaves_no_score():
    standing = Reference(TARGETS).standing(PRUNED, trials(PRUNED, Failure("no \udcff"), (0.0, 1.0)))
    assert (standing.score, standing.estimate, standing.complete) == (None, None, False)
    assert standing.trials["t"].reason == "no \\udcff"
