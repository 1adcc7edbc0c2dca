"""Strategies: one contract for all, and what each is for."""

import math
import random

import pytest
import searches
from replay import Landscape, larger_landscape
from searches import NAMES, SPACES, lines

from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.score import Failure, Score
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Standing, Trial
from m2m_hf.errors import InputError
from m2m_hf.search.model_based import STRATEGIES, ScoreModel, choose_strategy, expected_improvement
from m2m_hf.search.result import Budget
from m2m_hf.search.strategies import SearchProblem

SLOPES = {"a": 0.9, "b": 0.7, "c": 0.8, "d": 0.2, "e": -0.3, "f": -0.6, "g": 0.1}
CONTINUOUS = [
    SearchSpace(NAMES, min_datasets=5, continuous=True),
    SearchSpace(NAMES, frozenset("fg"), 2, 4, continuous=True),
]


def concave(mixture: Mixture) -> float:
    """Σ wᵢ gᵢ − Σ wᵢ² / 2: the more candidates the better, up to what the bad ones cost."""
    return sum(weight * SLOPES[name] - weight**2 / 2 for name, weight in mixture.items)


class Smooth(Landscape):
    """A landscape with a gradient."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__(concave)
        self.asked: list[Mixture] = []
        self.stop_after = stop_after

    def answer(self, mixture: Mixture) -> None:
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(mixture)

    def _score(self, mixtures, rows):
        scores = []
        for mixture in mixtures:
            self.answer(mixture)
            scores.append(Score(concave(mixture), 0.0, (concave(mixture),), (concave(mixture),)))
        return scores

    def gradient(self, mixture):
        self.answer(mixture)
        slopes = tuple(SLOPES[name] - weight for name, weight in mixture.items)
        return Score(concave(mixture), 0.0, (concave(mixture),), (concave(mixture),), slopes)

    def likelihood(self, score):
        return score.mean_logprob


def run(strategy, space, path, objective=None, **options):
    return searches.run(objective or Smooth(), path, strategy, space, NAMES, **options)


def standing(mixture: Mixture) -> Standing:
    trial = Trial(str(mixture), mixture, "merged", "t", 1, "complete", Score(concave(mixture)), 0.0)
    return Standing(mixture, {"t": trial}, {"t": 1.0})


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", STRATEGIES)
class TestContract:
    """What holds for every strategy."""

    @pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
    def test_it_keeps_the_rules_proposes_nothing_twice_and_ends(self, name, space):
        proposed: list[Mixture] = []
        known = {Mixture.subset([one]): concave(Mixture.subset([one])) for one in NAMES}

        def gradient(mixture):
            return concave(mixture), {one: SLOPES[one] - weight for one, weight in mixture.items}

        strategy = STRATEGIES[name](SearchProblem(space, known, seed=3, budget=25, gradient=gradient))
        try:
            batch = next(strategy)
            while True:
                assert batch
                proposed += batch
                standings = [standing(one) for one in batch]
                batch = strategy.send(standings)
        except StopIteration:
            pass
        assert len(proposed) == len(set(proposed))
        assert not set(proposed) & set(known)
        assert all(mixture in space for mixture in proposed)
        assert proposed or name == "gradient"

    def test_it_is_deterministic(self, name, tmp_path):
        for number in "12":
            run(STRATEGIES[name], SPACES["all"], tmp_path / number, seed=5, budget=Budget(40))
        assert lines(tmp_path / "1") == lines(tmp_path / "2")

    def test_stopped_after_any_trial_it_goes_on_as_if_nothing_had_been(self, name, tmp_path):
        reference = run(STRATEGIES[name], SPACES["cost"], tmp_path / "r", seed=1, budget=Budget(30))
        for stop in range(0, reference.measured, 9 if name == "bayes" else 4):
            path = tmp_path / f"{stop}"
            with pytest.raises(KeyboardInterrupt):
                run(STRATEGIES[name], SPACES["cost"], path, Smooth(stop), seed=1, budget=Budget(30))
            objective = Smooth()
            result = run(STRATEGIES[name], SPACES["cost"], path, objective, seed=1, budget=Budget(30))
            assert len(objective.asked) == reference.measured - stop
            assert lines(path) == lines(tmp_path / "r")
            assert (result.best.mixture, result.best.score) == (reference.best.mixture, reference.best.score)
            assert result.evaluations == reference.evaluations

    def test_it_survives_failures(self, name, tmp_path):
        class Fails(Smooth):
            def _score(self, mixtures, rows):
                return [Failure("no") if "c" in one.names else Score(concave(one)) for one in mixtures]

        result = run(STRATEGIES[name], SPACES["all"], tmp_path / "t", Fails(), budget=Budget(40))
        assert "c" not in result.best.mixture.names

    def test_it_finds_what_is_good(self, name, tmp_path):
        best = max(map(concave, SPACES["all"].subsets()))
        result = run(STRATEGIES[name], SPACES["all"], tmp_path / "t", budget=Budget(60))
        assert result.best.score.value >= best - (0.1 if name in ("random", "bayes") else 0.02)


@pytest.mark.parametrize(
    ("budget", "trials"),
    [(Budget(max_trials=20), 20), (Budget(max_example_evaluations=30), 30), (Budget(max_seconds=0), 9)],
)
def test_a_budget_ends_a_search_and_a_larger_one_goes_on_from_there(tmp_path, budget, trials):
    result = run(STRATEGIES["exhaustive"], SPACES["all"], tmp_path / "t", budget=budget)
    assert (len(result.standings), result.ended) == (trials, "budget")
    objective = Smooth()
    assert run(STRATEGIES["exhaustive"], SPACES["all"], tmp_path / "t", objective).ended == "strategy"
    assert len(objective.asked) == 128 - trials


def test_a_budget_too_small_for_anything_that_is_allowed(tmp_path):
    with pytest.raises(InputError, match="the budget ended before any mixture that is allowed was scored"):
        run(STRATEGIES["exhaustive"], SPACES["sizes"], tmp_path / "t", budget=Budget(max_trials=9))


def test_continuous_weights(tmp_path):
    space = SearchSpace(NAMES, continuous=True)
    best = max(map(concave, SearchSpace(NAMES).subsets()))
    for name in ("gradient", "bayes"):
        result = run(STRATEGIES[name], space, tmp_path / name, budget=Budget(80))
        assert result.best.score.value > (best if name == "gradient" else best - 0.1)
    found = run(STRATEGIES["gradient"], space, tmp_path / "gradient").best.mixture
    # Where Σ wᵢ gᵢ − Σ wᵢ²/2 is greatest, all weights that are not 0 have the same derivative.
    derivatives = [SLOPES[name] - weight for name, weight in found.items]
    assert max(derivatives) - min(derivatives) < 0.05


def test_the_model_knows_a_quadratic_and_how_sure_it_is():
    space = SearchSpace(NAMES)
    model = ScoreModel(SearchProblem(space))
    every = list(space.subsets())
    seen = random.Random(0).sample(every, 80)
    model.fit({mixture: concave(mixture) for mixture in seen})
    mean, deviation = model.predict(every)
    errors = [abs(value - concave(mixture)) for value, mixture in zip(mean, every, strict=True)]
    assert max(errors) < 0.02
    assert sum(error < 3 * spread + 1e-4 for error, spread in zip(errors, deviation, strict=True)) > 0.95 * len(every)
    assert expected_improvement(1.0, 1e-9, 0.5) == pytest.approx(0.5)
    assert expected_improvement(0.0, 1.0, 0.0) == pytest.approx(1 / math.sqrt(2 * math.pi))


@pytest.mark.parametrize("space", CONTINUOUS, ids=["many", "required"])
def test_weights_keep_the_constraints(tmp_path, space):
    for name in ("gradient", "bayes", "random"):
        result = run(STRATEGIES[name], space, tmp_path / name, budget=Budget(40))
        proposed = [one for one in result.standings if len(one) not in (0, 1, 7)]
        assert proposed, name
        assert all(mixture in space for mixture in proposed)
        assert result.best.mixture in space


def test_a_gradient_that_can_no_longer_be_had_ends_the_climb_and_not_the_search(tmp_path):
    class Breaks(Smooth):
        def gradient(self, mixture):
            return super().gradient(mixture) if len(self.asked) < 14 else Failure("not finite")

    result = run(STRATEGIES["gradient"], SPACES["sizes"], tmp_path / "t", Breaks())
    assert result.ended == "strategy"
    assert result.best.mixture in SPACES["sizes"]


def test_auto_says_why():
    space = SearchSpace(NAMES)
    assert choose_strategy(space, True, max_trials=127 + 9) == ("exhaustive", "max_trials is enough for all mixtures")
    assert choose_strategy(space, True, max_trials=127 + 8)[0] == "surrogate"
    assert choose_strategy(SearchSpace(NAMES[:5]), True)[0] == "exhaustive"
    assert choose_strategy(SearchSpace(NAMES), True)[0] == "surrogate"
    assert choose_strategy(SearchSpace(NAMES), True, max_trials=100)[0] == "surrogate"
    assert choose_strategy(SearchSpace(tuple(f"c{n:02}" for n in range(13))), True)[0] == "beam"
    assert choose_strategy(SearchSpace(NAMES, continuous=True), True)[0] == "gradient"
    assert choose_strategy(SearchSpace(NAMES, continuous=True), False)[0] == "bayes"


def test_a_landscape_has_the_shape_of_what_was_recorded():
    table = {mixture: Score(concave(mixture)) for mixture in SearchSpace(NAMES).subsets()}
    value = larger_landscape(table, SearchSpace(NAMES), 24, seed=1)
    names = [f"c{number:03}" for number in range(24)]
    singles = [value(Mixture.subset([name])) for name in names]
    assert max(singles) - min(singles) > 0.5
    assert value(Mixture.subset(names)) == value(Mixture.subset(reversed(names)))
    assert value(BASE) == 0.0
