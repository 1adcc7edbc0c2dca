"""The state of a search: what is known of every mixture, and how to learn more."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.objective import Differentiable, Objective, Prepared
from m2m_hf.core.score import Failure, Score
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Reference, Standing, Trial
from m2m_hf.errors import InputError
from m2m_hf.search.callbacks import SearchCallback, SearchControl
from m2m_hf.search.result import UNLIMITED, Budget, SearchEnded, score_of
from m2m_hf.storage.journal import Journal


def unchanged(value: Any) -> Any:
    """What a single process broadcasts."""
    return value


@dataclass
class SearchState:
    """What is known of every mixture, and how to learn more.

    Args:
        space: the mixtures that may be proposed and chosen.
        objectives: one for every target; the search maximises the weighted mean of their scores.
        journal: remembers trials.
        callbacks: are told of every trial and standing, and may stop the search.
        budget: what may be spent after the mixtures that every search begins with.
        failed: candidate -> why it has no adapter.
        broadcast: returns the main process's value on all processes (collective). Budgets depend on its time, and it decides
            whether a callback stops the search.
    """

    space: SearchSpace
    objectives: Sequence[Objective]
    journal: Journal
    callbacks: Sequence[SearchCallback] = ()
    budget: Budget = UNLIMITED
    failed: Mapping[str, str] = field(default_factory=dict)
    broadcast: Callable[[Any], Any] = unchanged

    def __post_init__(self) -> None:
        self.reference = Reference([one.target for one in self.objectives])
        self.trials: dict[Mixture, dict[str, Trial]] = defaultdict(dict)  # mixture -> target -> what saw most rows
        self.standings: dict[Mixture, Standing] = {}
        self.best: Standing | None = None
        self.measured, self.evaluations, self.seconds = 0, 0, 0.0
        self.must_finish = False  # measure also when the budget is spent or a callback stops the search
        self.control = SearchControl()
        self.stopping = False  # what the main process's `control` said when the callbacks were told last

    def tell(self, event: str, *facts: Any) -> None:
        """Calls this method of every callback."""
        for callback in self.callbacks:
            getattr(callback, event)(*facts, self.control)
        self.stopping = self.control.should_stop = self.broadcast(self.control.should_stop)

    def share(self, objective: Objective) -> float:
        """The target's part in the mean over the targets."""
        return objective.target.weight / sum(one.target.weight for one in self.objectives)

    def score_in_full(self, mixtures: Sequence[Mixture]) -> None:
        """Scores mixtures on all rows, several at once where that fills a batch, unless the search ends before."""
        usable = [mixture for mixture in mixtures if self.failed.keys().isdisjoint(mixture.names)]
        for objective in self.objectives:
            if isinstance(objective, Prepared):
                objective.prepare([mixture for mixture in usable if self.journal.get(objective.key(mixture)) is None])
        group: list[Mixture] = []
        for mixture in mixtures:
            group.append(mixture)
            known = all(self.journal.get(one.key(mixture)) for one in self.objectives)
            # Groups are the same when the search goes on, or a budget would end it elsewhere.
            if known or len(group) >= max(one.batch_size(one.target.examples) for one in self.objectives):
                self._score_group(group)
                group = []
        self._score_group(group)

    def _score_group(self, mixtures: Sequence[Mixture]) -> None:
        try:
            for objective in self.objectives:
                self.score(objective, mixtures, objective.target.examples)
        except SearchEnded:  # what was measured before counts
            self.settle(mixtures)
            raise
        self.settle(mixtures)

    def complete(self, mixture: Mixture) -> None:
        """Scores a mixture on all rows that it has not seen in a race."""
        for objective in self.objectives:
            if self.trials[mixture][objective.target.name].state == "pruned":
                self.score(objective, [mixture], objective.target.examples)
        self.settle([mixture])

    def complete_from_journal(self, mixture: Mixture) -> None:
        """As `complete`, if the journal holds all that is missing."""
        trials = {one.target.name: self.journal.get(one.key(mixture)) for one in self.objectives}
        known = {target: trial for target, trial in trials.items() if trial is not None}
        if len(known) == len(trials):
            self.trials[mixture] = known
            self.settle([mixture])

    def settle(self, mixtures: Sequence[Mixture]) -> None:
        """Records how mixtures stand that have a trial on every target, and tells the callbacks."""
        for mixture in mixtures:
            trials = dict(self.trials[mixture])
            if len(trials) < len(self.objectives):
                continue
            standing = self.standings[mixture] = self.reference.standing(mixture, trials)
            if mixture == BASE:
                self.reference = replace(self.reference, base=trials)
            better = self.best is None or (standing.score and standing.score.value > score_of(self.best).value)
            if better and standing.may_be_chosen and mixture in self.space:
                self.best = standing
            self.tell("on_standing", standing, self.best)

    def score(self, objective: Objective, mixtures: Sequence[Mixture], rung: int) -> None:
        """Scores mixtures, which have seen equally many rows, on the first `rung` rows; asks the journal first."""
        target = objective.target.name
        before = [self.trials[mixture][target] for mixture in mixtures if target in self.trials[mixture]]
        if before and before[0].rung >= rung:  # a target that has fewer rows than others was seen as a whole
            return
        rows = rung - (before[0].rung if before else 0)
        missing = []
        for mixture in mixtures:
            trial = self.recall(objective, mixture, rung)
            if trial is None:
                missing.append(mixture)
            else:
                self._keep(trial, objective.evaluations(mixture, rows), recalled=True)
        while missing:
            size = self._affordable(objective, rows)
            for trial in self._measure(objective, missing[:size], rung):
                self._keep(trial, objective.evaluations(trial.mixture, rows))
            missing = missing[size:]

    def recall(self, objective: Objective, mixture: Mixture, rung: int) -> Trial | None:
        """The journal's trial on the first `rung` rows, if need be a part of one on all rows."""
        target = objective.target
        whole = self.journal.get(objective.key(mixture))
        if rung == target.examples:
            return whole
        key = objective.key(mixture, rung)
        part = self.journal.get(key)
        if part is not None or whole is None or whole.score is None:
            return part or whole
        rows = list(target.order[:rung])
        lists = (np.asarray(one)[rows].tolist() if one else [] for one in (whole.score.values, whole.score.logprobs))
        return replace(whole, key=key, rung=rung, state="pruned", score=Score.of(*lists), seconds=0.0)

    def _affordable(self, objective: Objective, rows: int) -> int:
        """How many mixtures to measure next, on so many rows; if none, the search ends."""
        if self.must_finish:
            return objective.batch_size(rows)
        if self.stopping:
            raise SearchEnded("callback")
        left = (self.budget.max_example_evaluations - self.evaluations) / max(1, rows)
        if left <= 0 or self.seconds >= self.budget.max_seconds:
            raise SearchEnded("budget")
        size = objective.batch_size(rows)
        return size if left == math.inf else min(size, math.ceil(left))

    def _measure(self, objective: Objective, mixtures: Sequence[Mixture], rung: int) -> list[Trial]:
        """Measures mixtures together and writes their trials into the journal; they share the time that it takes."""
        target = objective.target
        step = None if rung == target.examples else rung
        failed = {Mixture.subset([name]): Failure(f"{name} has no adapter: {why}") for name, why in self.failed.items()}
        usable = [mixture for mixture in mixtures if mixture not in failed]
        before = {one: score_of(self.trials[one][target.name]) for one in usable if target.name in self.trials[one]}
        start = self._now()
        scores = dict(zip(usable, objective(usable, step, before) if usable else [], strict=True)) | failed
        seconds = (self._now() - start) / len(mixtures)
        trials = [
            Trial.of(scores[mixture], mixture, objective.name, target, objective.key(mixture, step), step, seconds)
            for mixture in mixtures
        ]
        return self.journal.extend([self._check(trial) for trial in trials])

    def _check(self, trial: Trial) -> Trial:
        """The trial; failed if it has another number of values than the base model, which must have a score."""
        if trial.mixture == BASE and trial.score is None:
            raise InputError(
                f"the base model has no score on {trial.target}, so nothing can be compared with it: {trial.reason}"
            )
        base = self.reference.base.get(trial.target)
        if trial.state != "complete" or base is None or base.score is None:
            return trial
        ours, theirs = len(score_of(trial).values), len(base.score.values)
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
            key = f"{objective.key(mixture)}/gradient"
            trial = self.journal.get(key)
            recalled = trial is not None
            if trial is None:
                try:
                    self._affordable(objective, objective.target.examples)
                except SearchEnded:
                    return None
                start = self._now()
                result = objective.gradient(mixture)
                trial = Trial.of(result, mixture, "gradient", objective.target, key, seconds=self._now() - start)
                trial = self.journal.append(trial)
            self._count(trial, objective.target.examples, recalled)
            if trial.score is None:
                return None
            total += self.share(objective) * objective.likelihood(trial.score)
            for name, slope in zip(mixture.names, trial.score.gradient, strict=True):
                slopes[name] += self.share(objective) * slope
        return total, slopes

    def _keep(self, trial: Trial, evaluations: int, recalled: bool = False) -> None:
        self.trials[trial.mixture][trial.target] = trial
        self._count(trial, evaluations, recalled)

    def _count(self, trial: Trial, evaluations: int, recalled: bool) -> None:
        self.measured += not recalled
        self.evaluations += evaluations
        self.seconds += trial.seconds
        self.tell("on_trial", trial, recalled)

    def _now(self) -> float:
        return float(self.broadcast(time.monotonic()))
