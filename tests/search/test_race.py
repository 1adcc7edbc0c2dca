"""Races drop what cannot win, and what is left wins as it would have without them."""

import itertools
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import searches
from replay import Replay, tells_apart
from searches import FIVE, lines, table

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.objective import TargetInfo
from m2m_hf.search.callbacks import SearchCallback
from m2m_hf.search.model_based import STRATEGIES
from m2m_hf.search.race import FIRST, Sample, judge, plan_rungs, reasons_against_racing
from m2m_hf.search.result import Budget


class Counting(Replay):
    """Counts the rows that it is asked for, and can stop at will."""

    def __init__(self, *args, stop_after: int | None = None, **options) -> None:
        super().__init__(*args, **options)
        self.rows: dict[Mixture, list[int]] = {}
        self.calls, self.stop_after = 0, stop_after

    def _score(self, mixtures, rows):
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        for mixture in mixtures:
            self.rows.setdefault(mixture, []).extend(range(self.target.examples) if rows is None else rows)
        return super()._score(mixtures, rows)


run = partial(searches.run, race=True)


def has_content(result) -> dict:
    return {mixture: (standing.score, standing.pruned) for mixture, standing in result.standings.items()}


def rungs(examples: int) -> list[int]:
    return [sizes["t"] for sizes in plan_rungs([TargetInfo("t", examples)])]


def test_rungs_begin_at_64_grow_and_end_with_all():
    for examples in (10, 64, 80, 100, 150, 400, 20_000):
        steps = rungs(examples)
        assert steps[-1] == examples
        assert steps == sorted(set(steps))
        assert len(steps) == 1 or steps[0] == FIRST
    assert rungs(80) == [80]
    assert len(rungs(20_000)) < 20


def test_what_is_far_behind_is_dropped_and_the_leader_never():
    draw = np.random.default_rng(0)
    values = draw.normal(size=(4, 64)) * 0.1 + np.array([[0.0], [0.02], [-1.0], [-0.5]])
    leader, dropped = judge([Sample(values, 300)], 4)
    assert leader in (0, 1)
    assert {2, 3} <= set(dropped)
    assert leader not in dropped


def test_what_agrees_on_all_examples_is_a_tie():
    assert judge([Sample(np.ones((3, 64)), 300)], 4)[1] == [1, 2]
    # One more right answer in 64 tells nothing of the other 236.
    values = np.ones((2, 64))
    values[1, 5] = 0
    assert judge([Sample(values, 300)], 4)[1] == []


def test_near_the_end_only_what_all_examples_could_tell_goes_on():
    draw = np.random.default_rng(1)
    values = draw.normal(size=(6, 290))
    assert len(judge([Sample(values, 300)], 4)[1]) == 5  # ten examples more change nothing that a test could tell


@pytest.mark.parametrize("binary", [True, False])
def test_the_winner_is_one_that_all_examples_cannot_tell_from_the_best(tmp_path, binary):
    wrong = saved = 0
    for seed in range(40):
        scores = table(seed, binary=binary)
        objective = Counting(scores, seed=seed)
        result = run(objective, tmp_path / f"{seed}")
        best = max((one for one in scores if one.items), key=lambda one: scores[one].value)
        wrong += tells_apart(scores[best], scores[result.best.mixture])
        saved += 1 - result.evaluations / (32 * 300)
        assert result.best.complete
        assert result.best.score.value == pytest.approx(scores[result.best.mixture].value)
    assert wrong <= 2  # 5 % of 40
    assert saved / 40 > 0.3


def test_no_row_is_scored_twice_and_none_is_dropped_before_64(tmp_path):
    objective = Counting(table(3), seed=3)
    result = run(objective, tmp_path / "t")
    assert all(len(rows) == len(set(rows)) for rows in objective.rows.values())
    assert sum(map(len, objective.rows.values())) == result.evaluations
    trials = lines(tmp_path / "t")
    assert min(trial["rung"] for trial in trials) == FIRST
    assert {trial["state"] for trial in trials} == {"pruned", "complete"}
    by_mixture: dict[str, list[dict]] = {}
    for trial in trials:
        by_mixture.setdefault(str(trial["names"]), []).append(trial)
    for several in by_mixture.values():
        partial = [trial for trial in several if trial["state"] == "pruned"]
        for shorter, longer in itertools.pairwise(partial):
            assert longer["values"][: shorter["rung"]] == shorter["values"]
    whole = next(
        trial for trial in trials if trial["names"] == list(result.best.mixture.names) and trial["rung"] == 300
    )
    assert tuple(whole["values"]) == objective.table[result.best.mixture].values  # in the order of the examples again


def test_callbacks_are_told_of_a_trial_once(tmp_path):
    told = []

    class Watcher(SearchCallback):
        def on_trial(self, trial, recalled, control) -> None:
            told.append((trial.mixture, trial.target, trial.rung))

    objectives = [Counting(table(3, rows), seed=3, target=name) for name, rows in (("small", 70), ("large", 300))]
    result = run(objectives, tmp_path / "t", callbacks=[Watcher()])
    assert len(told) == len(set(told)) == result.measured


@pytest.mark.parametrize(("seed", "spread"), [(6, 0.3), *((seed, 0.05) for seed in range(5))])
def test_a_budget_ends_a_race_with_its_leader_scored_to_the_end(tmp_path, seed, spread):
    objective = Counting(table(seed, spread=spread), seed=seed)
    first_rung = 7 * 300 + 25 * 64  # the base, singles and all together in full
    result = run(objective, tmp_path / "t", budget=Budget(max_example_evaluations=first_rung + 10))
    assert result.ended == "budget"
    assert len(result.standings) == 32
    ahead = [one for one in result.standings.values() if one.complete and 1 < len(one.mixture) < 5]
    assert len(ahead) == 1  # the leader alone of those in the race
    assert spread < 0.3 or ahead == [result.best]
    assert first_rung < result.evaluations <= first_rung + 10 + 32 + 236  # what was in flight, and the leader
    assert all(len(rows) == len(set(rows)) for rows in objective.rows.values())


def test_scores_of_the_dropped_are_put_right_by_what_their_examples_were_like(tmp_path):
    scores = table(6, spread=1.0)
    result = run(Counting(scores, seed=6), tmp_path / "t")
    pruned = [one for one in result.standings.values() if one.pruned]
    assert pruned
    raw = np.mean([(one.score.value - scores[one.mixture].value) ** 2 for one in pruned])
    mended = np.mean([(one.estimate - scores[one.mixture].value) ** 2 for one in pruned])
    assert mended < raw
    assert not any(one.may_be_chosen for one in pruned)


def test_what_may_be_tied_with_the_best_is_scored_to_the_end(tmp_path):
    result = run(Counting(table(4), seed=4), tmp_path / "t")
    pruned = [one for one in result.standings.values() if one.pruned]
    assert pruned
    assert all(one.estimate + 1.645 * one.score.stderr <= result.best.score.value for one in pruned)


def test_several_targets_race_together(tmp_path):
    objectives = [
        Counting(table(7 + number, rows=rows), seed=number, target=f"t{number}")
        for number, rows in enumerate((300, 120))
    ]
    result = run(objectives, tmp_path / "t")
    assert result.best.complete
    assert any(one.pruned for one in result.standings.values())
    assert result.evaluations < 32 * 420
    full = {m: (objectives[0].table[m].value + objectives[1].table[m].value) / 2 for m in FIVE.subsets()}
    assert full[result.best.mixture] >= max(full.values()) - 0.05


@pytest.mark.parametrize("strategy", ["exhaustive", "greedy", "surrogate"])
@pytest.mark.parametrize("left", [0, 1, 2, 3, 8, 0.2, 0.6, 1.0], ids=str)
def test_interrupted_after_any_measurement_it_goes_on_and_repeats_nothing(tmp_path, strategy, left):
    """Also where the last round had begun: what it adds to the journal must not lead the strategy another way."""
    options = {"strategy": STRATEGIES[strategy], "seed": 2, "budget": Budget(24)}
    whole = Counting(table(11), seed=2)
    reference = run(whole, tmp_path / "r", **options)
    left = round(left * whole.calls) if isinstance(left, float) else left
    first = Counting(table(11), seed=2, stop_after=whole.calls - left)
    with nullcontext() if not left else pytest.raises(KeyboardInterrupt):
        run(first, tmp_path / "t", **options)
    again = Counting(table(11), seed=2)
    result = run(again, tmp_path / "t", **options)
    assert again.calls == left
    assert has_content(result) == has_content(reference)
    assert (result.best.mixture, result.evaluations) == (reference.best.mixture, reference.evaluations)


@pytest.mark.parametrize(
    ("rows", "target", "options"),
    [
        (300, {"min_delta": 1.0}, {}),  # a leader that may not be chosen must not drop those that may
        (300, {}, {"one_standard_error": True}),
        (300, {"order": ()}, {}),
        (1, {}, {}),
    ],
)
def test_where_some_rows_cannot_judge_a_mixture_there_is_no_race(tmp_path, rows, target, options):
    objective = Counting(table(12, rows=rows), seed=1)
    objective.target = replace(objective.target, **target)
    assert run(objective, tmp_path / "t", **options).evaluations == 32 * rows
    assert len(reasons_against_racing([objective.target], bool(options))) == 1


def test_what_the_journal_knows_in_full_is_shown_in_full(tmp_path):
    whole = run(Counting(table(13), seed=1), tmp_path / "t", race=False)
    again = Counting(table(13), seed=1)
    result = run(again, tmp_path / "t")
    assert again.calls == 0
    assert has_content(result) == has_content(whole)
    assert result.best.mixture == whole.best.mixture
