"""The loop: everything scored once, resumed without repetition, the right one chosen."""

import itertools
from collections import Counter
from functools import partial

import pytest
import searches

from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.objective import Objective, TargetInfo
from m2m_hf.core.score import Failure, Score
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Standing, Trial
from m2m_hf.errors import InputError
from m2m_hf.search.loop import make_screen
from m2m_hf.search.measure import SearchState
from m2m_hf.search.result import Budget, choose, preference
from m2m_hf.storage import array_store as stored
from m2m_hf.storage.journal import Journal

NAMES = ("a", "b", "c", "d")
SPACE = SearchSpace(NAMES)


class TableObjective(Objective):
    """Scores from a formula; counts what it was asked and can fail at will."""

    name = "table"

    def __init__(self, value=None, target="t", weight=1.0, min_delta=None, batch_size=1) -> None:
        super().__init__(TargetInfo(target, 4, weight, min_delta))
        self.batch_size = lambda rows: batch_size
        self.groups: list[int] = []
        self.asked: list[Mixture] = []
        self._value = value or (lambda m: 0.3 + 0.2 * ("b" in m.names) + 0.1 * ("d" in m.names) - 0.05 * len(m))

    def key(self, mixture: Mixture, rung: int | None = None) -> str:
        return f"{self.target.name} {mixture}"

    def _score(self, mixtures: list[Mixture], rows=None) -> list[Score | Failure]:
        self.groups.append(len(mixtures))
        return [self.one(mixture) for mixture in mixtures]

    def one(self, mixture: Mixture) -> Score | Failure:
        self.asked.append(mixture)
        value = self._value(mixture)
        if value is None:
            return Failure("log-probabilities are not finite")
        return Score(value, 0.01, (value,) * 4, (-1.0,) * 4)


run = partial(searches.run, space=SPACE)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 100])
def test_every_subset_and_the_base_are_scored_once_whatever_the_size_of_a_group(tmp_path, batch_size):
    objective = TableObjective(batch_size=batch_size)
    result = run(objective, tmp_path / "t.jsonl")
    assert len(objective.asked) == len(set(objective.asked)) == 16
    subsets = {Mixture.subset(names) for size in range(5) for names in itertools.combinations(NAMES, size)}
    assert set(objective.asked) == subsets == set(result.standings)
    assert max(objective.groups) == min(batch_size, 10)  # the base; the singles and all; the ten others
    assert result.best.mixture.names == ("b", "d")
    assert result.base.mixture == BASE
    order = [
        (-round(objective.one(one.mixture).value, 9), len(one.mixture), one.mixture.items) for one in result.ranking
    ]
    assert order == sorted(order)
    assert len(order) == 15


def test_a_reason_that_is_no_proper_text_is_written_down(tmp_path):
    """As of an error about a file whose name is not in UTF-8."""

    class Odd(TableObjective):
        def one(self, mixture: Mixture) -> Score | Failure:
            return super().one(mixture) if len(mixture) != 2 else Failure("cannot open 'x\udcff'")

    result = run(Odd(), tmp_path / "t.jsonl")
    assert "cannot open 'x\\udcff'" in {trial.reason for trial in result.trials}
    assert run(Odd(), tmp_path / "t.jsonl").measured == 0


def test_what_is_measured_together_is_written_together(tmp_path, monkeypatch):
    """Or a run that was killed in between would measure the rest in other company, and round otherwise."""
    written = []
    real = stored.append_bytes
    monkeypatch.setattr(
        "m2m_hf.storage.journal.append_bytes", lambda path, content: written.append(content) or real(path, content)
    )
    objective = TableObjective(batch_size=3)
    run(objective, tmp_path / "t.jsonl")
    assert [content.count(b"\n") for content in written] == objective.groups
    assert max(objective.groups) == 3


def test_a_failed_trial_is_recorded_and_cannot_win(tmp_path):
    objective = TableObjective(lambda m: None if "b" in m.names else 0.1 * len(m))
    result = run(objective, tmp_path / "t.jsonl")
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert len(failed) == 8
    assert failed[0].reason == "log-probabilities are not finite"
    assert result.best.mixture.names == ("a", "c", "d")
    assert run(TableObjective(), tmp_path / "t.jsonl").measured == 0  # what failed for its numbers would fail again


def test_without_any_score_or_without_the_base_models_there_is_no_result(tmp_path):
    with pytest.raises(InputError, match="no mixture could be scored: log-probabilities are not finite"):
        run(TableObjective(lambda m: None if m.items else 0.5), tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"the base model has no score on t, .*: log-probabilities are not finite"):
        run(TableObjective(lambda m: 0.5 if m.items else None), tmp_path / "t.jsonl")
    assert run(TableObjective(), tmp_path / "t.jsonl").measured == 16  # it is asked again


def test_mixtures_with_a_candidate_without_an_adapter_are_never_measured(tmp_path):
    objective = TableObjective()
    space = SearchSpace(("a", "c", "d"))
    result = run(objective, tmp_path / "t.jsonl", space=space, names=NAMES, failed={"b": "it diverged"})
    assert not any("b" in mixture.names for mixture in objective.asked)
    single = result.standings[Mixture.subset(["b"])]
    assert [trial.reason for trial in single.trials.values()] == ["b has no adapter: it diverged"]
    assert Mixture.subset(["a", "c", "d"]) in result.standings
    assert Mixture.subset(NAMES) not in result.standings


def test_what_is_proposed_together_is_prepared_together_before_it_is_scored(tmp_path):
    """Not what the journal knows, nor what has a candidate without an adapter."""

    class Prepares(TableObjective):
        def prepare(self, mixtures):
            told.append((len(self.asked), sorted(len(one) for one in mixtures)))

    told: list[tuple[int, list[int]]] = []
    run(Prepares(), tmp_path / "t.jsonl", budget=Budget(max_trials=12))
    assert told == [(0, [0]), (1, [1, 1, 1, 1, 4]), (6, [2] * 6)]  # only for those that the budget allows
    told.clear()
    run(Prepares(), tmp_path / "t.jsonl")
    assert told == [(0, []), (0, []), (0, [3] * 4)]
    told.clear()
    space = SearchSpace(("a", "c", "d"))
    run(Prepares(target="u"), tmp_path / "t.jsonl", space=space, names=NAMES, failed={"b": "it diverged"})
    assert told == [(0, [0]), (1, [1, 1, 1, 3]), (5, [2] * 3)]


def test_values_of_other_rows_than_the_base_models_are_no_score(tmp_path):
    class Odd(TableObjective):
        def one(self, mixture):
            score = super().one(mixture)
            return Score.of([0.9] * 3) if mixture.names == ("a", "b") else score

    result = run(Odd(), tmp_path / "t.jsonl")
    (trial,) = result.standings[Mixture.subset(["a", "b"])].trials.values()
    assert trial.reason == "the scorer returned 3 values, but 4 for the base model"
    assert result.best.mixture.names != ("a", "b")


def test_only_mixtures_of_the_space_may_be_chosen(tmp_path):
    assert len(run(TableObjective(lambda m: -len(m)), tmp_path / "t.jsonl").best.mixture) == 1  # not the base model
    result = run(TableObjective(), tmp_path / "u.jsonl", space=SearchSpace(NAMES, frozenset({"a"})))
    assert result.best.mixture.names == ("a", "b", "d")
    assert Mixture.subset(["c"]) in result.standings  # singles are scored to be shown
    assert all("a" in trial.mixture.names for trial in result.ranking)
    assert result.ranking[0] == result.best


def test_another_candidate_or_target_makes_no_old_trial_worthless(tmp_path):
    run(TableObjective(), tmp_path / "t.jsonl", space=SearchSpace(("a", "b", "c")))
    objective = TableObjective()
    run(objective, tmp_path / "t.jsonl")
    assert len(objective.asked) == 8
    assert all("d" in mixture.names for mixture in objective.asked)
    assert run(two(None, None), tmp_path / "t.jsonl").measured == 16


def make(names: str, value: float, logprob: float = -1.0, stderr: float = 0.05) -> Standing:
    score = Score(value, stderr, (value,), (logprob,))
    mixture = Mixture.subset(list(names))
    return Standing(mixture, {"t": Trial(names, mixture, "merged", "t", 1, "complete", score, 0.0)}, {"t": 1.0})


@pytest.mark.parametrize(
    ("trials", "rule", "chosen"),
    [
        ([make("ab", 0.5), make("a", 0.5), make("abc", 0.5)], False, "a"),
        ([make("ab", 0.52), make("a", 0.5)], False, "ab"),
        ([make("ab", 0.52), make("a", 0.5)], True, "a"),
        ([make("ab", 0.56), make("a", 0.5)], True, "ab"),
        ([make("a", 0.5, -1.0), make("b", 0.5, -2.0)], False, "a"),
        ([make("a", 0.5), make("d", 0.5)], False, "d"),
    ],
    ids=["ties-smaller", "better", "one-stderr", "beyond-one-stderr", "likelier", "cheaper"],
)
def test_choice_among_ties(trials, rule, chosen):
    space = SearchSpace(NAMES, costs={"a": 3.0, "b": 2.0, "c": 2.0, "d": 1.0})
    for order in itertools.permutations(trials):
        ranking = sorted(order, key=lambda trial: preference(trial, space))
        assert choose(ranking, rule).mixture == Mixture.subset(list(chosen))


def two(first, second, **second_options) -> list[TableObjective]:
    return [TableObjective(first, target="t"), TableObjective(second, target="u", **second_options)]


def test_several_targets_are_weighed_and_every_one_is_journaled(tmp_path):
    objectives = two(lambda m: 1.0 * ("a" in m.names), lambda m: 1.0 * ("b" in m.names) - 0.1 * len(m), weight=3.0)
    result = run(objectives, tmp_path / "t.jsonl")
    assert result.best.mixture.names == ("a", "b")  # (1 + 3 * 0.8) / 4, against 3 * 0.9 / 4 for b alone
    assert result.best.score.value == pytest.approx(0.85)
    assert result.best.score.stderr == pytest.approx((0.01**2 + 0.03**2) ** 0.5 / 4)
    journal = Journal(tmp_path / "t.jsonl")
    assert len(journal.trials) == len(result.trials) == 32
    assert {trial.target for trial in journal.trials.values()} == {"t", "u"}


def test_min_delta_keeps_out_what_spoils_a_target(tmp_path):
    def spoiled(mixture):
        return 0.5 - 0.2 * ("b" in mixture.names) - 0.05 * ("d" in mixture.names)

    free = run(two(None, spoiled, weight=0.01), tmp_path / "free.jsonl")
    assert free.best.mixture.names == ("b", "d")
    bound = run(two(None, spoiled, weight=0.01, min_delta=0.1), tmp_path / "t.jsonl")
    assert bound.best.mixture.names == ("d",)
    assert all("b" not in standing.mixture.names for standing in bound.ranking)
    assert bound.standings[Mixture.subset("bd")].short == ("u",)
    assert bound.measured == 32  # they are scored all the same
    with pytest.raises(InputError, match="every mixture makes u worse than the base model by more than min_delta"):
        run(two(None, lambda m: -1.0 * len(m), min_delta=0.1), tmp_path / "none.jsonl")


def test_pareto_front_against_its_definition(tmp_path):
    first = {mixture: sum(map(ord, mixture.names)) * 5 % 7 / 7 for mixture in SPACE.subsets()}
    second = {mixture: sum(map(ord, mixture.names)) * 3 % 5 / 5 for mixture in SPACE.subsets()}
    result = run(two(lambda m: first.get(m, 0.0), lambda m: second.get(m, 0.0)), tmp_path / "t.jsonl")
    expected = {
        one
        for one in first
        if not any(
            first[other] >= first[one]
            and second[other] >= second[one]
            and (first[other], second[other]) != (first[one], second[one])
            for other in first
        )
    }
    front = [standing.mixture for standing in result.pareto_front]
    assert set(front) == expected
    assert len(front) == len(expected)
    assert result.best.mixture in expected


@pytest.mark.parametrize("rows", range(50, 128, 6))
def test_a_budget_ends_a_search_that_goes_on_where_it_did_before(tmp_path, rows):
    """Whatever was measured together counts, also where targets differ in how many mixtures that are."""
    objectives = [TableObjective(target="t", batch_size=5), TableObjective(target="u", batch_size=2)]
    budget = Budget(max_example_evaluations=rows)
    first, again = (run(objectives, tmp_path / "t.jsonl", budget=budget) for _ in range(2))
    assert (first.ended, again.ended, again.measured) == ("budget", "budget", 0)
    assert (first.evaluations, first.standings) == (again.evaluations, again.standings)
    scored = Counter(trial.mixture for trial in Journal(tmp_path / "t.jsonl").trials.values())
    assert set(first.standings) == {mixture for mixture, targets in scored.items() if targets == 2}


def test_the_screen_is_in_the_unit_of_the_likelihood(tmp_path):
    """Or a target with many tokens in a row would outweigh the others."""

    class Scaled(TableObjective):
        def one(self, mixture):
            return Score.of([0.5] * 4, [-1.0 - len(mixture)] * 4)

        def likelihood(self, score):
            return score.mean_logprob / unit

    estimates = []
    for unit in (1, 100):
        state = SearchState(SPACE, [Scaled()], Journal(tmp_path / f"{unit}.jsonl"))
        state.score_in_full([BASE, *(Mixture.subset([name]) for name in NAMES)])
        estimates.append(make_screen(state)(Mixture.subset("ab")))
    assert estimates[0] == pytest.approx(estimates[1] * 100)
