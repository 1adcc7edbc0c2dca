"""Callbacks are told of everything in order, and may stop a search at any trial without losing anything."""

import pytest
import searches
from replay import Landscape, Replay
from searches import FIVE, lines, table

from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.score import Score
from m2m_hf.core.space import SearchSpace
from m2m_hf.errors import InputError
from m2m_hf.search.callbacks import ProgressCallback, SearchCallback
from m2m_hf.search.model_based import STRATEGIES

TABLE = table(1, rows=160)


class Log(SearchCallback):
    """Keeps what it is told, and stops after so many trials."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.events, self.trials, self.stop_after = [], [], stop_after

    def on_search_begin(self, space, planned, control):
        self.events.append(("begin", space, planned))

    def on_trial(self, trial, recalled, control):
        self.events.append(("trial", trial.mixture, recalled))
        self.trials.append(trial)
        control.should_stop |= len(self.trials) == self.stop_after

    def on_standing(self, standing, best, control):
        self.events.append(("standing", standing.mixture, best and best.mixture))

    def on_search_end(self, result, control):
        self.events.append(("end", result.best.mixture, result.ended))


def run(path, *callbacks, strategy="exhaustive", objective=None, **options):
    return searches.run(objective or Replay(TABLE), path, STRATEGIES[strategy], callbacks=callbacks, **options)


def test_callbacks_are_told_of_everything_in_order(tmp_path):
    log = Log()
    result = run(tmp_path / "t", log)
    assert log.events[0] == ("begin", FIVE, 32)
    assert log.events[-1] == ("end", result.best.mixture, "strategy")
    assert log.events[1:3] == [("trial", BASE, False), ("standing", BASE, None)]
    told = [mixture for kind, mixture, _ in log.events if kind == "trial"]
    assert told == [Mixture(tuple(zip(one["names"], one["weights"], strict=True))) for one in lines(tmp_path / "t")]
    assert [event[1] for event in log.events if event[0] == "standing"] == list(result.standings)
    again = Log()
    run(tmp_path / "t", again)
    assert all(recalled for kind, _, recalled in again.events if kind == "trial")
    assert [event[:2] for event in again.events] == [event[:2] for event in log.events]


def test_callbacks_are_told_of_the_rungs_of_a_race(tmp_path):
    log = Log()
    run(tmp_path / "t", log, race=True)
    assert {trial.state for trial in log.trials} == {"pruned", "complete"}
    assert [trial.rung for trial in log.trials] == [one["rung"] for one in lines(tmp_path / "t")]


@pytest.mark.parametrize("race", [False, True])
def test_the_progress_bar_counts_every_mixture_once(tmp_path, race):
    class Bar:
        def update(self, done, note):
            updates.append((done, note))

    updates = []
    result = run(tmp_path / "t", ProgressCallback(Bar()), race=race, objective=Replay(TABLE, seed=2))
    counts = [done for done, _ in updates]
    assert counts == sorted(counts)
    assert set(counts) == set(range(1, len(result.standings) + 1))
    assert updates[-1][1] == f"best so far {result.best.score.value:.4f} {result.best.mixture}"


def test_a_stop_between_events_takes_effect_with_the_next_one(tmp_path):
    """With several processes all must have heard of it before one of them ends the search."""

    class Elsewhere(Log):
        def on_search_begin(self, space, planned, control):
            self.control = control

    class Stops(Replay):
        def _score(self, mixtures, rows):
            log.control.should_stop = len(log.trials) >= 9  # as a signal handler might
            return super()._score(mixtures, rows)

    log = Elsewhere()
    result = run(tmp_path / "t", log, objective=Stops(TABLE))
    assert result.ended == "callback"
    assert len(log.trials) == 10


def test_the_last_mixture_may_stop_a_search_that_is_done(tmp_path):
    whole = run(tmp_path / "t")
    assert run(tmp_path / "t", Log(len(whole.standings))).ended == "strategy"


@pytest.mark.parametrize("strategy", ["exhaustive", "greedy", "surrogate", "random"])
def test_stopped_at_any_trial_and_resumed_nothing_is_lost_or_different(tmp_path, strategy):
    reference = run(tmp_path / "r", strategy=strategy, seed=3)
    whole = lines(tmp_path / "r")
    for stop in (1, 3, *range(7, reference.measured, 4)):
        path = tmp_path / f"{stop}"
        stopped = run(path, Log(stop), strategy=strategy, seed=3)
        assert stopped.ended == "callback"
        assert lines(path) == whole[: max(stop, 7)]  # the base, singles and all together are scored in any case
        assert stopped.best.mixture in stopped.standings
        resumed = run(path, strategy=strategy, seed=3)
        assert resumed.measured == reference.measured - max(stop, 7)
        assert lines(path) == whole
        assert (resumed.standings, resumed.best, resumed.ended) == (reference.standings, reference.best, "strategy")


def test_a_stopped_race_scores_its_leader_and_goes_on_from_there(tmp_path):
    objective = Replay(TABLE, seed=2)
    reference = run(tmp_path / "r", race=True, objective=objective)
    spent = objective.spent
    for stop in range(8, reference.measured, 3):
        path = tmp_path / f"{stop}"
        objective = Replay(TABLE, seed=2)
        stopped = run(path, Log(stop), race=True, objective=objective)
        assert stopped.ended == "callback"
        assert stopped.best.complete
        resumed = run(path, race=True, objective=objective)
        assert resumed.best == reference.best
        assert resumed.evaluations == reference.evaluations
        assert objective.spent <= spent + 160  # no row twice; the leader at the stop is one that may be dropped later
        for mixture, standing in resumed.standings.items():
            expected = reference.standings[mixture]
            assert standing.score == expected.score or (expected.pruned and standing.score == TABLE[mixture])


def test_a_search_stopped_before_any_allowed_mixture_says_so(tmp_path):
    space = SearchSpace(FIVE.names, min_datasets=2, max_datasets=3)
    with pytest.raises(InputError, match="a callback stopped the search before any mixture that is allowed was scored"):
        run(tmp_path / "t", Log(1), space=space)


def test_a_stopped_gradient_strategy_measures_no_more_gradients(tmp_path):
    class Slope(Landscape):
        def gradient(self, mixture):
            return Score(0.5, 0.0, (0.5,), (-1.0,), tuple(weight / 10 for _, weight in mixture.items))

        def likelihood(self, score):
            return score.mean_logprob

    log = Log(8)
    result = run(tmp_path / "t", log, strategy="gradient", objective=Slope(len))
    assert result.ended == "callback"
    assert [trial.objective for trial in log.trials[7:]] == ["gradient"]
