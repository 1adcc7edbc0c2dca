"""The state of a search: what is known of every mixture, and how to learn more."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from m2m_hf.core.arrays import LazyArray
from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.objective import Differentiable, Objective
from m2m_hf.core.score import Failure, Score
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Reference, Standing, Trial
from m2m_hf.errors import InputError
from m2m_hf.search.callbacks import SearchCallback, SearchControl
from m2m_hf.search.result import UNLIMITED, Budget, SearchEnded, score_of, score_of_trial
from m2m_hf.storage.journal import Journal

Trials = Mapping[str, Trial]  # by target


class SearchState:
    """What is known of every mixture, and how to learn more.

    Args:
        space: the mixtures that may be chosen.
        objectives: one for every target.
        journal: remembers trials.
        callbacks: are told of every trial and standing.
        budget: what may be spent.
        failed: candidate -> why it has no adapter; mixtures with one of these are not measured.
        clock: the time in seconds. With several processes it must be the main one's on all, since a budget depends on it.
        base: the base model's trials, if they are known.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        journal: Journal,
        *,
        callbacks: Sequence[SearchCallback] = (),
        budget: Budget = UNLIMITED,
        failed: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        base: Trials | None = None,
    ) -> None:
        self.space = space
        self.objectives = objectives
        self.budget = budget
        self.control = SearchControl()
        self.stopping = False  # what all callbacks, and so all processes, have agreed on
        self.reference = Reference([one.target for one in objectives], base or {})
        self.standings: dict[Mixture, Standing] = {}
        self.best: Standing | None = None
        self.measured = 0
        self.evaluations = 0
        self.seconds = 0.0
        self._journal = journal
        self._callbacks = callbacks
        self._failed = failed or {}
        self._clock = clock
        self._must_finish = False

    @contextmanager
    def without_limits(self) -> Iterator[None]:
        """Measures whatever is asked for meanwhile, also when the budget is spent or a callback stops the search."""
        before, self._must_finish = self._must_finish, True
        try:
            yield
        finally:
            self._must_finish = before

    def tell(self, event: str, *facts: Any) -> None:
        """Calls this method of every callback."""
        for callback in self._callbacks:
            getattr(callback, event)(*facts, self.control)
        self.stopping = self.control.should_stop

    def set_control(self, mixture: Mixture) -> None:
        """Makes a mixture that is scored in full the one that pruned mixtures are compared with."""
        self.reference = replace(self.reference, control=self.standings[mixture].trials)

    def share(self, objective: Objective) -> float:
        """The target's part in the mean over the targets."""
        return objective.target.weight / sum(one.target.weight for one in self.objectives)

    def score_in_full(self, mixtures: Sequence[Mixture]) -> None:
        """Scores mixtures on all rows, several at once where that fills a batch.

        Raises:
            SearchEnded: before all were scored.
        """
        group: list[Mixture] = []
        for mixture in mixtures:
            missing = [one for one in self.objectives if self._journal.get(one.key(mixture)) is None]
            group.append(mixture)
            if not missing or len(group) >= max(one.batch_size(one.target.examples) for one in missing):
                self._score_group(group)
                group = []
        self._score_group(group)

    def _score_group(self, mixtures: Sequence[Mixture]) -> None:
        try:
            for objective in self.objectives:
                self.score(objective, mixtures, objective.target.examples)
        except SearchEnded:  # what was measured before counts
            self._settle_group(mixtures)
            raise
        self._settle_group(mixtures)

    def _settle_group(self, mixtures: Sequence[Mixture]) -> None:
        for mixture in mixtures:
            self.settle_from_journal(mixture)

    def complete(self, mixture: Mixture, trials: Trials) -> None:
        """Scores a mixture on all rows that its trials in a race have not seen."""
        complete = {}
        for objective in self.objectives:
            target, trial = objective.target, trials[objective.target.name]
            if trial.state != "complete":
                trial = self.score(objective, [mixture], target.examples, {mixture: trial})[mixture]
            complete[target.name] = trial
        self.settle(mixture, complete)

    def settle(self, mixture: Mixture, trials: Trials) -> None:
        """Records how a mixture stands, and tells the callbacks."""
        standing = self.reference.standing(mixture, trials)
        self.standings[mixture] = standing
        if mixture == BASE:
            self.reference = replace(self.reference, base=trials)
        better = self.best is None or (standing.score and standing.score.value > score_of(self.best).value)
        if better and standing.may_be_chosen and mixture in self.space:
            self.best = standing
        self.tell("on_standing", standing, self.best)

    def settle_from_journal(self, mixture: Mixture) -> None:
        """Settles a mixture if the journal holds a trial over all rows of every target."""
        trials = {one.target.name: self._journal.get(one.key(mixture)) for one in self.objectives}
        known = {name: trial for name, trial in trials.items() if trial is not None}
        if len(known) == len(trials):
            self.settle(mixture, known)

    def score(
        self,
        objective: Objective,
        mixtures: Sequence[Mixture],
        rung: int,
        before: Mapping[Mixture, Trial] | None = None,
    ) -> dict[Mixture, Trial]:
        """The trials of mixtures on the first `rung` rows; what the journal does not hold is measured.

        Args:
            before: their trials on the rung before.

        Raises:
            SearchEnded: before all were measured. The journal holds what was.
        """
        before = before or {}
        rows = rung - next((trial.rung for trial in before.values()), 0)
        trials = {mixture: self.recall(objective, mixture, rung) for mixture in mixtures}
        missing = [mixture for mixture, trial in trials.items() if trial is None]
        for trial in trials.values():
            if trial is not None:
                self._count(trial, objective.evaluations(trial.mixture, rows), recalled=True)
        while missing:
            size = self._affordable(objective, rows)
            group, missing = missing[:size], missing[size:]
            for trial in self._measure(objective, group, rung, before):
                self._count(trial, objective.evaluations(trial.mixture, rows))
                trials[trial.mixture] = trial
        return {mixture: trial for mixture, trial in trials.items() if trial is not None}

    def recall(self, objective: Objective, mixture: Mixture, rung: int) -> Trial | None:
        """The journal's trial on the first `rung` rows, if need be a part of one on all rows."""
        target = objective.target
        if rung == target.examples:
            return self._journal.get(objective.key(mixture))
        key = objective.key(mixture, rung)
        trial = self._journal.get(key) or self._journal.get(objective.key(mixture))
        if trial is None or trial.key == key or trial.score is None:
            return trial
        rows = list(target.order[:rung])
        values, logprobs = (np.asarray(numbers) for numbers in (trial.score.values, trial.score.logprobs))
        score = Score.of(LazyArray.of(values[rows]), LazyArray.of(logprobs[rows]) if len(logprobs) else ())
        return replace(trial, key=key, rung=rung, state="pruned", score=score, seconds=0.0)

    def _affordable(self, objective: Objective, rows: int) -> int:
        """How many mixtures to measure next, on so many rows.

        Raises:
            SearchEnded: none.
        """
        if self._must_finish:
            return objective.batch_size(rows)
        if self.stopping:
            raise SearchEnded("callback")
        left = (self.budget.max_example_evaluations - self.evaluations) / max(1, rows)
        if left <= 0 or self.seconds >= self.budget.max_seconds:
            raise SearchEnded("budget")
        size = objective.batch_size(rows)
        return size if left == math.inf else min(size, math.ceil(left))

    def _measure(
        self, objective: Objective, mixtures: Sequence[Mixture], rung: int, before: Mapping[Mixture, Trial]
    ) -> list[Trial]:
        """Measures mixtures together and writes their trials into the journal; they share the time that it takes."""
        target = objective.target
        step = None if rung == target.examples else rung
        reasons = {mixture: self._why_not(mixture) for mixture in mixtures}
        usable = [mixture for mixture, reason in reasons.items() if not reason]
        start = self._clock()
        known = {mixture: score_of_trial(before[mixture]) for mixture in usable if mixture in before}
        scores = dict(zip(usable, objective(usable, step, known) if usable else [], strict=True))
        seconds = (self._clock() - start) / len(mixtures)
        trials = []
        for mixture in mixtures:
            result = scores[mixture] if mixture in scores else Failure(reasons[mixture])
            key = objective.key(mixture, step)
            trials.append(self._check(Trial.of(result, mixture, objective.name, target, key, step, seconds)))
        return self._journal.extend(trials)

    def _why_not(self, mixture: Mixture) -> str:
        """Why a mixture cannot be scored at all; empty if it can."""
        failed = [name for name in mixture.names if name in self._failed]
        return "; ".join(f"{name} has no adapter: {self._failed[name]}" for name in failed)

    def _check(self, trial: Trial) -> Trial:
        """The trial; failed if it has another number of values than the base model.

        Raises:
            InputError: it is the base model's and has no score.
        """
        if trial.mixture == BASE:
            if trial.score is None:
                raise InputError(
                    f"the base model has no score on {trial.target}, so nothing can be compared with it: {trial.reason}"
                )
            return trial
        base = self.reference.base.get(trial.target)
        if base is None or base.score is None or trial.state != "complete" or trial.score is None:
            return trial
        ours, theirs = len(trial.score.values), len(base.score.values)
        if ours == theirs:
            return trial
        reason = f"the scorer returned {ours} values, but {theirs} for the base model"
        return replace(trial, state="failed", score=None, reason=reason)

    def gradient(self, mixture: Mixture) -> tuple[float, dict[str, float]] | None:
        """The weighted log-likelihood of the right answers over all targets, and its derivative by each weight.

        None if nothing more may be measured, or if it is not finite.
        """
        total, slopes = 0.0, dict.fromkeys(mixture.names, 0.0)
        for objective in self.objectives:
            assert isinstance(objective, Differentiable)
            try:
                trial = self._gradient_trial(objective, mixture)
            except SearchEnded:
                return None
            if trial.score is None:
                return None
            total += self.share(objective) * objective.likelihood(trial.score)
            for name, slope in zip(mixture.names, trial.score.gradient, strict=True):
                slopes[name] += self.share(objective) * slope
        return total, slopes

    def _gradient_trial(self, objective: Objective, mixture: Mixture) -> Trial:
        assert isinstance(objective, Differentiable)
        key = f"{objective.key(mixture)}/gradient"
        trial = self._journal.get(key)
        recalled = trial is not None
        if trial is None:
            self._affordable(objective, objective.target.examples)
            start = self._clock()
            result = objective.gradient(mixture)
            seconds = self._clock() - start
            trial = self._journal.append(Trial.of(result, mixture, "gradient", objective.target, key, seconds=seconds))
        self._count(trial, objective.target.examples, recalled)
        return trial

    def _count(self, trial: Trial, evaluations: int, recalled: bool = False) -> None:
        self.measured += not recalled
        self.evaluations += evaluations
        self.seconds += trial.seconds
        self.tell("on_trial", trial, recalled)
