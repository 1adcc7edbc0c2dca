"""The search loop: a strategy proposes, the journal or the objectives answer, and the best mixture is chosen."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import logsumexp

from m2m_hf.core.arrays import LazyArray
from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.objective import Objective, TargetInfo
from m2m_hf.core.score import Failure, Score
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Reference, Standing, Trial
from m2m_hf.errors import InputError
from m2m_hf.search.race import FIRST, Sample, judge, rungs
from m2m_hf.search.result import (
    UNLIMITED,
    Budget,
    BudgetSpent,
    SearchResult,
    choose,
    default_budget,
    preference,
    score_of,
    score_of_trial,
)
from m2m_hf.search.strategies import SearchProblem, Strategy, value
from m2m_hf.storage.journal import Journal


def screen(singles: Mapping[str, Sequence[float]], most: int = 1000) -> Callable[[Sequence[Mixture]], list[float]]:
    """An estimate of the log-likelihood of mixtures that costs nothing: that of the ensemble, from what the singles scored.

    Args:
        singles: name -> the log-probability of every row's right answer under that candidate's adapter.
        most: rows that are looked at.
    """
    rows = {name: np.array(logprobs[:most]) for name, logprobs in singles.items()}

    def estimate(mixtures: Sequence[Mixture]) -> list[float]:
        # Completions may be long, and their probabilities too small for a float: sums are taken of logarithms.
        return [
            float(logsumexp([rows[name] + np.log(weight) for name, weight in mixture.items], axis=0).mean())
            for mixture in mixtures
        ]

    return estimate


FINALISTS = 8  # mixtures that a race left as ties and that are scored to the end after all


class Search:
    """The state of one search: what is known of every mixture, and how to come to know more.

    Args:
        objectives: one for every target.
        journal: where trials are remembered.
        write: whether this process writes the journal.
        on_standing: told how every mixture stands and the best so far.
        race: whether mixtures that are asked for together race (`racing.py`), where every target's examples have values.
        budget: what may be spent.
        broadcast: gives every process the main one's time, on which a budget may depend.
        order: that in which mixtures that are asked for together are measured.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        space: SearchSpace,
        journal: Journal,
        write: bool,
        on_standing: Callable[[Standing, Standing | None], None],
        race: bool,
        budget: Budget,
        broadcast: Callable[[Any], Any],
        order: Callable[[Sequence[Mixture]], list[Mixture]],
    ) -> None:
        self._order = order
        self.objectives = objectives
        self.space = space
        self.journal = journal
        self.standings: dict[Mixture, Standing] = {}
        self.measured = 0
        self.evaluations = 0
        self.seconds = 0.0
        self.best: Standing | None = None
        self.control: Standing | None = None  # scored in full; what pruned mixtures are compared with
        total = sum(one.weight for one in objectives)
        self._shares = {one.target: one.weight / total for one in objectives}
        self._steps = self._rungs() if race and may_race(objectives) else []
        self._write = write
        self._on_standing = on_standing
        self._budget = budget
        self._broadcast = broadcast

    def _rungs(self) -> list[dict[str, int]]:
        """Target -> examples seen, for every rung; targets of different size are seen to the same share."""
        largest = max(one.examples for one in self.objectives)
        return [
            {
                one.target: max(math.ceil(one.examples * size / largest), min(FIRST, one.examples))
                for one in self.objectives
            }
            for size in rungs(largest)
        ]

    def fixed(self, mixtures: Sequence[Mixture]) -> None:
        """Has mixtures scored on all examples, whatever the budget."""
        budget, self._budget = self._budget, UNLIMITED
        self._in_full([mixture for mixture in dict.fromkeys(mixtures) if mixture not in self.standings])
        self._budget = budget

    def know(self, mixtures: Sequence[Mixture]) -> list[Standing]:
        """How these mixtures stand; what the journal does not hold is measured.

        Raises:
            BudgetSpent: not all of them could be looked at; those that were stand in `standings`.
        """
        new = [mixture for mixture in dict.fromkeys(mixtures) if mixture not in self.standings]
        allowed = self._order(new[: max(0, int(min(len(new), self._budget.max_trials - len(self.standings))))])
        if len(self._steps) > 1 and len(allowed) + (self.best is not None) > 1:
            self._race(allowed)
        else:
            self._in_full(allowed)
        if len(allowed) < len(new):
            raise BudgetSpent
        return [self.standings[mixture] for mixture in mixtures]

    def slope(self, mixture: Mixture) -> tuple[float, dict[str, float]] | None:
        """The likelihood of the right answers, over all targets by their weights, and its derivatives by name.

        None where no budget is left for it, or where it is not finite.
        """
        total, slopes = 0.0, dict.fromkeys(mixture.names, 0.0)
        for objective in self.objectives:
            key = f"{objective.key(mixture)}/gradient"
            trial = self.journal.get(key)
            if trial is None:
                if self.evaluations >= self._budget.max_example_evaluations or self.seconds >= self._budget.max_seconds:
                    return None
                start = time.monotonic()
                found = objective.gradient(mixture)
                seconds = self._broadcast(time.monotonic() - start)
                trial = trial_of(objective, mixture, found, seconds, objective.examples, key, "gradient")
                trial = self.journal.append(trial, write=self._write)
                self.measured += 1
            self.evaluations += objective.examples
            self.seconds += trial.seconds
            if trial.score is None:
                return None
            share = self._shares[objective.target]
            total += share * objective.likelihood(trial.score)
            for name, derivative in zip(mixture.names, trial.score.gradient, strict=True):
                slopes[name] += share * derivative
        return total, slopes

    def screen(self) -> Callable[[Sequence[Mixture]], list[float]] | None:
        """An estimate of a mixture's log-likelihood from what its candidates scored alone; None where scorers have none."""
        estimates = []
        for objective in self.objectives:
            singles, unit = {}, 1.0
            for name in self.space.names:
                standing = self.standings[Mixture.subset([name])]
                score = standing.trials[objective.target].score
                if score is None or not score.logprobs:
                    return None
                singles[name] = score.logprobs
                unit = objective.likelihood(score) / score.mean_logprob if score.mean_logprob else unit
            estimates.append((self._shares[objective.target] * unit, screen(singles)))
        return lambda mixtures: [
            sum(share * value for (share, _), value in zip(estimates, values, strict=True))
            for values in zip(*(estimate(mixtures) for _, estimate in estimates), strict=True)
        ]

    def _in_full(self, mixtures: Sequence[Mixture]) -> None:
        """Scores mixtures on all examples, several together where that pays."""
        waiting: list[Mixture] = []
        for mixture in mixtures:
            missing = [one for one in self.objectives if self.journal.get(one.key(mixture)) is None]
            waiting.append(mixture)
            if not missing or len(waiting) >= max(one.at_once(one.examples) for one in missing):
                self._finish(waiting)
                waiting = []
        self._finish(waiting)

    def _finish(self, mixtures: Sequence[Mixture]) -> None:
        try:
            for objective in self.objectives:
                self._look(objective, mixtures, objective.examples, {})
        finally:  # what was measured before the budget ended counts
            for mixture in mixtures:
                trials = {one.target: self.journal.get(one.key(mixture)) for one in self.objectives}
                found = {target: trial for target, trial in trials.items() if trial is not None}
                if len(found) == len(self.objectives):
                    self._settle(mixture, found)

    def _look(
        self, objective: Objective, mixtures: Sequence[Mixture], rung: int, before: Mapping[Mixture, Trial]
    ) -> dict[Mixture, Trial]:
        """The trials of mixtures on the first `rung` examples, of which `before` holds those on fewer."""
        seen = next(iter(before.values())).rung if before else 0
        found = {mixture: self._recall(objective, mixture, rung) for mixture in mixtures}
        for mixture, trial in found.items():
            if trial is not None:
                self.evaluations += objective.evaluations(mixture, rung - seen)
                self.seconds += trial.seconds
        missing = [mixture for mixture, trial in found.items() if trial is None]
        while missing:
            left = math.inf if self.seconds < self._budget.max_seconds else 0
            left = min(left, (self._budget.max_example_evaluations - self.evaluations) / max(1, rung - seen))
            if left <= 0:
                raise BudgetSpent
            together = objective.at_once(rung - seen)
            group = missing[: together if left == math.inf else min(together, math.ceil(left))]
            missing = missing[len(group) :]
            made = [self._comparable(trial) for trial in measure(objective, group, rung, before, self._broadcast)]
            for trial in self.journal.extend(made, write=self._write):
                self.measured += 1
                self.evaluations += objective.evaluations(trial.mixture, rung - seen)
                self.seconds += trial.seconds
                found[trial.mixture] = trial
        return {mixture: trial for mixture, trial in found.items() if trial is not None}

    def _comparable(self, trial: Trial) -> Trial:
        """A new trial; failed where its values are not of the same rows as the base model's.

        Raises:
            InputError: it is the base model's, and has no score.
        """
        if trial.mixture == BASE:
            if trial.score is None:
                raise InputError(
                    f"the base model has no score on {trial.target}, so nothing can be compared with it: {trial.reason}"
                )
            return trial
        base = self.standings[BASE].trials.get(trial.target) if BASE in self.standings else None
        ours, theirs = (len(one.score.values) if one and one.score else 0 for one in (trial, base))
        if base is None or trial.score is None or trial.state == "pruned" or ours == theirs:
            return trial
        reason = f"the scorer gave {ours} values, and {theirs} for the base model"
        return replace(trial, state="failed", score=None, reason=reason)

    def _recall(self, objective: Objective, mixture: Mixture, rung: int) -> Trial | None:
        """What the journal knows of the first `rung` examples; they may also be taken out of a score on all of them."""
        if rung == objective.examples:
            return self.journal.get(objective.key(mixture))
        trial = self.journal.get(objective.key(mixture, rung))
        whole = self.journal.get(objective.key(mixture)) if trial is None else None
        if whole is None or whole.score is None:
            return trial or whole
        rows = list(objective.order[:rung])
        values, logprobs = (np.asarray(one) for one in (whole.score.values, whole.score.logprobs))
        score = Score.of(LazyArray.of(values[rows]), LazyArray.of(logprobs[rows]) if len(logprobs) else ())
        return replace(whole, key=objective.key(mixture, rung), rung=rung, state="pruned", score=score, seconds=0.0)

    def _race(self, mixtures: Sequence[Mixture]) -> None:
        """Scores mixtures rung by rung; those that cannot win any more are left where they are."""
        running = list(mixtures)
        seen: dict[str, dict[Mixture, Trial]] = {one.target: {} for one in self.objectives}
        champion = self.best
        ahead: Mixture | None = None
        try:
            for number, sizes in enumerate(self._steps):
                for objective in self.objectives:
                    size, before = sizes[objective.target], seen[objective.target]
                    if not before or next(iter(before.values())).rung < size:
                        seen[objective.target] = self._look(objective, running, size, before)
                trials = {m: {target: found[m] for target, found in seen.items()} for m in running}
                failed = {m for m in running if any(trial.score is None for trial in trials[m].values())}
                last = number == len(self._steps) - 1
                leaving = failed | set(running if last else ())
                for mixture in [m for m in running if m in leaving]:
                    self._settle(mixture, trials[mixture])
                running = [m for m in running if m not in leaving]
                if not running:
                    return
                together = [*running, *([champion.mixture] if champion else [])]
                verdict = judge(
                    [self._sample(one, together, sizes, trials) for one in self.objectives], len(self._steps) - 1
                )
                out = {together[n] for n in verdict.dropped}
                ahead = together[verdict.leader]
                if champion and champion.mixture in out:
                    champion = None
                for mixture in [m for m in running if m in out]:
                    self._settle(mixture, trials[mixture])
                running = [m for m in running if m not in out]
                seen = {target: {m: found[m] for m in running} for target, found in seen.items()}
                if not running:
                    return
                if len(running) == 1 and champion is None:  # nobody is left to compare it with
                    self._complete(running[0], seen)
                    return
        except BudgetSpent:
            for mixture in running:
                if mixture not in self.standings and all(mixture in found for found in seen.values()):
                    if mixture == ahead:  # or the race would have been for nothing
                        budget, self._budget = self._budget, UNLIMITED
                        self._complete(mixture, seen)
                        self._budget = budget
                    else:
                        self._settle(mixture, {target: found[mixture] for target, found in seen.items()})
            raise

    def last_round(self) -> None:
        """Scores on all examples the best few of what was dropped and may be tied with the best: it costs little to know."""
        if self.best is None:
            return
        best = score_of(self.best).value
        near = [
            one
            for one in self.standings.values()
            if one.pruned and one.score and one.mixture in self.space
            and (one.estimate or 0.0) + 1.645 * (one.score.stderr or 0.0) > best
        ]  # fmt: skip
        try:
            for one in sorted(near, key=lambda one: (-(one.estimate or 0.0), one.mixture.items))[:FINALISTS]:
                self._complete(one.mixture, {target: {one.mixture: trial} for target, trial in one.trials.items()})
        finally:
            self._remember()

    def _remember(self) -> None:
        """Takes from the journal what it knows in full of mixtures that races left; only now, or strategies would be told more
        than when the journal was empty, and go another way."""
        for mixture in [mixture for mixture, standing in self.standings.items() if standing.pruned]:
            whole = {one.target: self.journal.get(one.key(mixture)) for one in self.objectives}
            found = {target: trial for target, trial in whole.items() if trial is not None}
            if len(found) == len(self.objectives):
                self._settle(mixture, found)

    def _complete(self, mixture: Mixture, seen: Mapping[str, Mapping[Mixture, Trial]]) -> None:
        """Scores a mixture on all examples that a race has not shown."""
        trials = {}
        for objective in self.objectives:
            before = seen[objective.target][mixture]
            if before.state == "complete":
                trials[objective.target] = before
            else:
                found = self._look(objective, [mixture], objective.examples, {mixture: before})
                trials[objective.target] = found[mixture]
        self._settle(mixture, trials)

    def _sample(
        self,
        objective: Objective,
        mixtures: Sequence[Mixture],
        sizes: Mapping[str, int],
        trials: Mapping[Mixture, Mapping[str, Trial]],
    ) -> Sample:
        """What mixtures scored on the examples of one target that a rung shows; those not in `trials` are known in full."""
        size = sizes[objective.target]
        values = []
        for mixture in mixtures:
            trial = trials[mixture][objective.target] if mixture in trials else self._recall(objective, mixture, size)
            assert trial is not None
            found = np.asarray(score_of_trial(trial).values)
            values.append(found[list(objective.order)] if trial.rung == objective.examples else found)
        return Sample(np.array(values), objective.examples, self._shares[objective.target])

    def _settle(self, mixture: Mixture, trials: Mapping[str, Trial]) -> None:
        """Says how a mixture stands."""
        infos = [TargetInfo(one.target, one.examples, one.weight, one.min_delta, one.order) for one in self.objectives]
        base, control = self.standings.get(BASE), self.control
        reference = Reference(infos, base.trials if base else {}, control.trials if control else {})
        standing = reference.standing(mixture, trials)
        self.standings[mixture] = standing
        better = self.best is None or (standing.score and standing.score.value > score_of(self.best).value)
        if better and standing.may_be_chosen and mixture in self.space:
            self.best = standing
        self._on_standing(standing, self.best)


def may_race(objectives: Sequence[Objective]) -> bool:
    """Whether mixtures can be judged by some examples: each has a value, and no target's `min_delta` rules mixtures out."""
    return all(one.order and one.examples > 1 and one.min_delta is None for one in objectives)


def search(
    strategy: Callable[[SearchProblem], Strategy],
    space: SearchSpace,
    objectives: Sequence[Objective],
    journal: Journal,
    *,
    names: Sequence[str],
    costs: Mapping[str, float],
    one_standard_error: bool = False,
    race: bool = False,
    budget: Budget = UNLIMITED,
    seed: int = 0,
    write: bool = True,
    broadcast: Callable[[Any], Any] = lambda value: value,
    on_standing: Callable[[Standing, Standing | None], None] = lambda standing, best: None,
    order: Callable[[Sequence[Mixture]], list[Mixture]] = list,
) -> SearchResult:
    """Scores the base model, every single candidate, all together, and what the strategy proposes; and chooses.

    A trial that the journal holds is not measured again. One that fails is recorded with its reason and can't be chosen. A
    mixture that makes a target worse than the base model by more than its `min_delta` can't be chosen either.

    Args:
        strategy: what proposes.
        objectives: one for every target; what is maximised is the weighted mean of their scores.
        names: all candidates, also those that may not be in a mixture.
        costs: of every candidate.
        race: let mixtures that are proposed together race (`racing.py`), where every target's examples have values.
        budget: what may be spent beyond what every search begins with.
        seed: of everything random in the strategy.
        write: whether this process writes the journal.
        broadcast: gives every process the main one's time, on which a budget may depend.
        on_standing: told how every mixture stands and the best so far.
        order: that in which mixtures that are proposed together are measured.

    Raises:
        InputError: the base model has no score, or no mixture has; every mixture falls short of a `min_delta`; or the budget
            ended before any that is allowed was scored.
    """
    race = race and not one_standard_error  # that rule wants more mixtures scored in full than those that may win
    state = Search(objectives, space, journal, write, on_standing, race, budget, broadcast, order)
    state.fixed([BASE])
    together = Mixture.subset([name for name in names if name not in objectives[0].failed])
    state.fixed([*(Mixture.subset([name]) for name in names), together])
    state.control = state.standings[together]
    problem = SearchProblem(
        space,
        {mixture: value(standing) for mixture, standing in state.standings.items() if mixture.items},
        seed,
        int(min(budget.max_trials - len(state.standings), default_budget(len(space.names)))),
        state.screen(),
        state.slope if all(one.differentiable for one in objectives) else None,
    )
    proposals = strategy(problem)
    ended = "strategy"
    try:
        proposed = next(proposals)
        while True:
            proposed = proposals.send(state.know(proposed))
    except StopIteration:
        pass
    except BudgetSpent:
        ended = "budget"
    with suppress(BudgetSpent):
        state.last_round()
    scored = [one for one in state.standings.values() if one.complete and one.mixture in space]
    if not scored:
        reasons = sorted({trial.reason or "" for one in state.standings.values() for trial in one.trials.values()})
        if not any(reasons) and ended == "budget":
            raise InputError("the budget ended before any mixture that is allowed was scored: raise it")
        if not any(reasons):
            raise InputError(
                "the strategy found no mixture that is allowed: loosen the constraints or take another one"
            )
        raise InputError(f"no mixture could be scored: {'; '.join(filter(None, reasons))}")
    ranking = sorted((one for one in scored if one.may_be_chosen), key=lambda one: preference(one, costs))
    if not ranking:
        short = sorted({target for one in scored for target in one.short})
        raise InputError(
            f"every mixture makes {' or '.join(short)} worse than the base model by more than min_delta allows; raise min_delta "
            "of that target or leave it out. What was scored is kept"
        )
    best = choose(ranking, one_standard_error)
    return SearchResult(state.standings, best, ranking, state.measured, state.evaluations, state.seconds, ended)


def measure(
    objective: Objective,
    mixtures: Sequence[Mixture],
    rung: int,
    before: Mapping[Mixture, Trial],
    broadcast: Callable[[Any], Any],
) -> list[Trial]:
    """One trial for each of these mixtures on the first `rung` examples; they share the time that it took.

    Args:
        before: what is known of fewer examples, which are not scored again.
        broadcast: gives every process what the main one has.
    """
    whole = rung == objective.examples
    seen = next(iter(before.values())).rung if before else 0
    start = time.monotonic()
    sound = [mixture for mixture in mixtures if not lacking(objective, mixture)]
    found = objective(sound, None if whole and not seen else objective.order[seen:rung]) if sound else []
    found = broadcast(found)  # a metric of the user's may say something else on every process
    scores = dict(zip(sound, found, strict=True))
    seconds = broadcast((time.monotonic() - start) / len(mixtures))
    trials = []
    for mixture in mixtures:
        score = scores[mixture] if mixture in scores else Failure(lacking(objective, mixture))
        if isinstance(score, Score) and (seen or not whole):
            earlier = score_of_trial(before[mixture]) if seen else Score(0.0)
            values, logprobs = (*earlier.values, *score.values), (*earlier.logprobs, *score.logprobs)
            score = Score.of(values, logprobs)
            if whole:
                score = objective.whole(Score.of(in_place(values, objective), in_place(logprobs, objective)))
        key = objective.key(mixture, None if whole else rung)
        trials.append(trial_of(objective, mixture, score, seconds, rung, key, objective.name))
    return trials


def lacking(objective: Objective, mixture: Mixture) -> str:
    """Why a mixture cannot be scored at all; nothing where it can."""
    return "; ".join(
        f"{name} has no adapter: {objective.failed[name]}" for name in mixture.names if name in objective.failed
    )


def trial_of(
    objective: Objective, mixture: Mixture, score: Score | Failure, seconds: float, rung: int, key: str, name: str
) -> Trial:
    """What was found, as a line for the journal."""
    failed = isinstance(score, Failure)
    return Trial(
        key=key,
        mixture=mixture,
        objective=name,
        target=objective.target,
        rung=rung,
        state="failed" if failed else "complete" if rung == objective.examples else "pruned",
        score=None if isinstance(score, Failure) else score,
        seconds=round(seconds, 3),  # as the journal will say
        reason=score.reason.encode("utf-8", "backslashreplace").decode() if isinstance(score, Failure) else None,
    )


def in_place(values: Sequence[float], objective: Objective) -> Sequence[float]:
    """Values in the order of a race put back to that of the examples."""
    return LazyArray.of(np.asarray(values)[np.argsort(objective.order)]) if values else ()
