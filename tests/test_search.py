"""The loop: everything scored once, resumed without repetition, the right one chosen."""

import itertools

import pytest

from m2m_hf.journal import Journal
from m2m_hf.mixture import BASE, Mixture, Score, SearchSpace, Trial
from m2m_hf.search import choose, preference, search
from m2m_hf.strategies import exhaustive

NAMES = ("a", "b", "c", "d")
SPACE = SearchSpace(NAMES)
COSTS = dict.fromkeys(NAMES, 1.0)


class TableObjective:
    """Scores from a formula; counts what it was asked and can fail or stop at will."""

    name, target, examples = "table", "t", 4

    def __init__(self, value=None, stop_after: int | None = None) -> None:
        self.asked: list[Mixture] = []
        self._value = value or (lambda m: 0.3 + 0.2 * ("b" in m.names) + 0.1 * ("d" in m.names) - 0.05 * len(m))
        self._stop_after = stop_after

    def key(self, mixture: Mixture) -> str:
        return str(mixture)

    def __call__(self, mixture: Mixture) -> Score:
        if len(self.asked) == self._stop_after:
            raise KeyboardInterrupt
        self.asked.append(mixture)
        value = self._value(mixture)
        if value is None:
            raise FloatingPointError("log-probabilities are not finite")
        return Score(value, 0.01, (value,) * 4, (-1.0,) * 4)


def run(objective, path, **options):
    space = options.pop("space", SPACE)
    return search(exhaustive(space), space, objective, Journal(path), costs=COSTS, **options)


def test_every_subset_and_the_base_are_scored_once(tmp_path):
    objective = TableObjective()
    result = run(objective, tmp_path / "t.jsonl")
    assert len(objective.asked) == len(set(objective.asked)) == 16
    subsets = {Mixture.subset(names) for size in range(5) for names in itertools.combinations(NAMES, size)}
    assert set(objective.asked) == subsets == set(result.trials)
    assert result.best.mixture.names == ("b", "d")
    assert result.base.mixture == BASE
    scores = [trial.score.value for trial in result.ranking]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("stop", range(0, 17, 3))
def test_interrupted_anywhere_it_goes_on_and_repeats_nothing(tmp_path, stop):
    reference = run(TableObjective(), tmp_path / "reference.jsonl")
    first = TableObjective(stop_after=stop)
    if stop < 16:
        with pytest.raises(KeyboardInterrupt):
            run(first, tmp_path / "t.jsonl")
    second = TableObjective()
    result = run(second, tmp_path / "t.jsonl")
    assert result.measured == len(second.asked) == 16 - len(first.asked)
    assert not set(first.asked) & set(second.asked)
    assert [t.mixture for t in result.ranking] == [t.mixture for t in reference.ranking]
    assert [t.score for t in result.ranking] == [t.score for t in reference.ranking]
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 16


def test_a_failed_trial_is_recorded_and_cannot_win(tmp_path):
    objective = TableObjective(lambda m: None if "b" in m.names else 0.1 * len(m))
    result = run(objective, tmp_path / "t.jsonl")
    failed = [trial for trial in result.trials.values() if trial.state == "failed"]
    assert len(failed) == 8
    assert failed[0].reason == "log-probabilities are not finite"
    assert result.best.mixture.names == ("a", "c", "d")
    assert run(TableObjective(), tmp_path / "t.jsonl").measured == 0  # what failed for its numbers would fail again


def test_nothing_could_be_scored(tmp_path):
    with pytest.raises(RuntimeError, match="no mixture could be scored: log-probabilities are not finite"):
        run(TableObjective(lambda m: None), tmp_path / "t.jsonl")


def test_the_base_cannot_be_chosen(tmp_path):
    result = run(TableObjective(lambda m: -len(m)), tmp_path / "t.jsonl")
    assert len(result.best.mixture) == 1


def test_required_candidates(tmp_path):
    space = SearchSpace(NAMES, frozenset({"a"}))
    result = run(TableObjective(), tmp_path / "t.jsonl", space=space)
    assert result.best.mixture.names == ("a", "b", "d")
    assert Mixture.subset(["c"]) in result.trials  # singles are scored to be shown
    assert all("a" in trial.mixture.names for trial in result.ranking)
    assert result.ranking[0] == result.best


def test_another_candidate_makes_no_old_trial_worthless(tmp_path):
    run(TableObjective(), tmp_path / "t.jsonl", space=SearchSpace(("a", "b", "c")))
    objective = TableObjective()
    run(objective, tmp_path / "t.jsonl")
    assert len(objective.asked) == 8
    assert all("d" in mixture.names for mixture in objective.asked)


def make(names: str, value: float, logprob: float = -1.0, stderr: float = 0.05) -> Trial:
    score = Score(value, stderr, (value,), (logprob,))
    return Trial(names, Mixture.subset(list(names)), "merged", "t", 1, "complete", score, 0.0)


@pytest.mark.parametrize(
    ("trials", "rule", "chosen"),
    [
        ([make("ab", 0.5), make("a", 0.5), make("abc", 0.5)], False, "a"),
        ([make("ab", 0.52), make("a", 0.5)], False, "ab"),
        ([make("ab", 0.52), make("a", 0.5)], True, "a"),
        ([make("ab", 0.56), make("a", 0.5)], True, "ab"),
        ([make("a", 0.5, -2.0), make("b", 0.5, -1.0)], False, "b"),
        ([make("a", 0.5), make("d", 0.5)], False, "d"),
    ],
    ids=["ties-smaller", "better", "one-stderr", "beyond-one-stderr", "likelier", "cheaper"],
)
def test_choice_among_ties(trials, rule, chosen):
    costs = {"a": 3.0, "b": 2.0, "c": 2.0, "d": 1.0}
    for order in itertools.permutations(trials):
        ranking = sorted(order, key=lambda trial: preference(trial, costs))
        assert choose(ranking, rule).mixture == Mixture.subset(list(chosen))
