"""The correlation study: fine-tunes mixtures and compares their scores with the surrogates and with other ways of choosing."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from m2m_hf.analysis.fidelity import LARGER, filled, verdict
from m2m_hf.analysis.study_report import (
    Baseline,
    BaselineScore,
    FailedMixture,
    Figures,
    StudiedMixture,
    StudyReport,
    compare,
    resilience,
    training_noise,
)
from m2m_hf.core.jsonable import Measurement
from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.objective import Objective
from m2m_hf.core.score import Score, mean_over_targets, paired
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Standing, Trial
from m2m_hf.errors import InputError
from m2m_hf.objectives.trained import Counts, FineTunedModels, TrainedObjective
from m2m_hf.scoring.scorers import Scorer
from m2m_hf.search.callbacks import ProgressCallback
from m2m_hf.search.measure import SearchState
from m2m_hf.search.result import SearchResult, best_scored
from m2m_hf.storage.journal import Journal

RANDOM = 3  # mixtures drawn at random to compare with


@dataclass(frozen=True)
class Choice:
    """What some way of choosing comes to: a mixture of equal weights, and the rows of each candidate that it trains on."""

    mixture: Mixture
    counts: Counts


@dataclass
class Study:
    """Fine-tunes mixtures, once each, and compares.

    Args:
        surrogates: name (`merged`, `ensemble`) -> its objectives, one for every target.
        trained: the trained objectives, one for every target.
        progress: `Terminal.progress`.
        broadcast: see `SearchState`.
        uniform: a merged single is an adapter that was trained like all other models, so that it shows the training noise.
    """

    space: SearchSpace
    surrogates: Mapping[str, Sequence[Objective]]
    trained: Sequence[TrainedObjective]
    journal: Journal
    progress: Callable[[str, int], Any]
    broadcast: Callable[[Any], Any]
    uniform: bool

    @property
    def models(self) -> FineTunedModels:
        return self.trained[0].models

    @property
    def stale(self) -> Collection[str]:
        """The candidates whose experts are of other rows than what is fine-tuned."""
        return self.trained[0].keys.stale

    def standings(
        self, objectives: Sequence[Objective], mixtures: Sequence[Mixture], title: str, base: Standing | None = None
    ) -> list[Standing]:
        """How mixtures stand by some objectives; measures what the journal does not hold. With a `base`, `min_delta` counts."""
        with self.progress(title, len(mixtures)) as bar:
            state = SearchState(self.space, objectives, self.journal, [ProgressCallback(bar)], broadcast=self.broadcast)
            if base is not None:
                state.reference = replace(state.reference, base=base.trials)
            state.score_in_full(list(dict.fromkeys(mixtures)))
        return [state.standings[mixture] for mixture in mixtures]

    def trained_standings(self, mixtures: Sequence[Mixture], base: Standing) -> list[Standing]:
        """How models fine-tuned on mixtures stand, `min_delta` included; trains what is missing."""
        self.models.train_all([self.models.counts(mixture) for mixture in mixtures])
        return self.standings(self.trained, mixtures, "scoring what was fine-tuned", base)

    def choice(self, mixture: Mixture) -> Choice:
        return Choice(mixture, self.models.counts(mixture))

    def choices(
        self, result: SearchResult, objectives: Sequence[Objective], similar: Sequence[str], random: int, seed: int
    ) -> dict[str, Choice]:
        """What this and other ways of choosing come to, by name.

        What must be scored for that, by the search's objectives, is added to the result's standings.

        Args:
            similar: the candidates, those most similar to the targets first; empty if that is not known.
            random: how many mixtures to draw at random.
        """
        names, standings = self.space.names, result.standings
        mixtures = {"chosen": result.best.mixture, "all": Mixture.subset(names)}
        if single := best_scored(standings[Mixture.subset([name])] for name in names):
            mixtures["best_single"] = single.mixture
        prefixes = [Mixture.subset(similar[:size]) for size in range(1, len(similar) + 1)]
        prefixes = [mixture for mixture in prefixes if mixture in self.space]
        if unknown := [one for one in prefixes if one not in standings or not standings[one].complete]:
            standings.update(zip(unknown, self.standings(objectives, unknown, "scoring mixtures"), strict=True))
        if prefix := best_scored(standings[mixture] for mixture in prefixes):
            mixtures["similarity"] = prefix.mixture
        choices = {name: self.choice(mixture) for name, mixture in mixtures.items()}
        rows = {name: len(self.models.candidates[name].rows) for name in names}
        choices["stratified"] = Choice(Mixture.subset(rows), dict.fromkeys(sorted(rows), min(rows.values())))
        for number, mixture in enumerate(filled(self.space, [], random, seed), start=1):
            choices[f"random_{number}"] = self.choice(mixture)
        return choices

    def report(self, trained: Sequence[Standing], base: Standing, fingerprint: str, uniform: str) -> StudyReport:
        """Compares fine-tuned mixtures, of `trained_standings`, with what the surrogates say of them; no baselines yet.

        Mixtures whose training diverges, or that have no score, are left out and named.
        """
        true = [one for one in trained if one.score is not None]
        failed = [FailedMixture(one.mixture, reason_of(one)) for one in trained if one.score is None]
        if not true:
            raise InputError(f"not a single mixture could be fine-tuned and scored: {failed[0].reason}")
        mixtures, asked = [one.mixture for one in true], {one.mixture for one in trained}
        surrogates = {
            name: self.standings(objectives, mixtures, f"scoring mixtures ({name})")
            for name, objectives in self.surrogates.items()
        }
        for name, standings in surrogates.items():
            if all(one.score is None for one in standings):
                raise InputError(
                    f"not a single fine-tuned mixture could be scored by the {name} objective: {reason_of(standings[0])}"
                )
        complete = set(islice(self.space.subsets(), len(asked) + 1)) <= asked
        agreements = {name: compare(standings, true, complete) for name, standings in surrogates.items()}
        return StudyReport(
            fingerprint,
            uniform,
            complete,
            tuple(self._studied(*standings) for standings in zip(true, *surrogates.values(), strict=True)),
            tuple(failed),
            agreements,
            {name: verdict(of.get("score"), of.get("score" + LARGER)) for name, of in agreements.items()},
            training_noise(surrogates["merged"], true, self.stale) if self.uniform else None,
            {name: resilience(base, standings, true) for name, standings in surrogates.items()},
            stale=tuple(self.stale),
        )

    def _studied(self, trained: Standing, *surrogates: Standing) -> StudiedMixture:
        counts = self.models.counts(trained.mixture)
        steps, seconds = self.models.steps(counts), self.models.record(counts)["seconds"]
        figures = map(Figures.of, (trained, *surrogates))
        return StudiedMixture(trained.mixture, sum(counts.values()), steps, seconds, *figures)

    def baselines(
        self, choices: Mapping[str, Choice], base: Standing, scorers: Mapping[str, Scorer]
    ) -> dict[str, Baseline]:
        """What every way of choosing comes to, trained and scored alike, and the base model's scores.

        `scorers` (by target) score the sealed test sets, once for every model, since everything is chosen by now.
        """
        self.models.train_all([choice.counts for choice in choices.values()])
        validation = {name: self._scores(choice) for name, choice in choices.items()} | {"base": base.scores}
        choices = {**choices, "base": Choice(BASE, {})}
        tests = self._test_scores(choices, validation, scorers)
        return {
            name: Baseline(
                choice.mixture,
                sum(choice.counts.values()),
                self.models.steps(choice.counts) if choice.counts else 0,
                self._against_chosen(validation[name], validation["chosen"]),
                self._against_chosen(tests[name], tests["chosen"]),
            )
            for name, choice in choices.items()
        }

    def _scores(self, choice: Choice) -> dict[str, Score]:
        """Target -> score of the model of a choice, which may be trained on other rows than its mixture usually is."""
        scores = {}
        for objective in self.trained:
            key = objective.keys.trained(choice.counts)
            trial = self.journal.get(key)
            if trial is None:
                score = objective.score(choice.counts)
                trial = self.journal.append(Trial.of(score, choice.mixture, objective.name, objective.target, key))
            if trial.score is not None:
                scores[objective.target.name] = trial.score
        return scores

    def _test_scores(
        self, choices: Mapping[str, Choice], validation: Mapping[str, Any], scorers: Mapping[str, Scorer]
    ) -> dict[str, dict[str, Score]]:
        """Name of a choice -> target -> score on sealed test rows, of the choices that have validation scores."""
        tests: dict[str, dict[str, Score]] = {name: {} for name in choices}
        if not scorers:
            return tests
        with self.progress("scoring the sealed test set", len(tests) * len(scorers)) as bar:
            for name, choice in choices.items():
                for objective in self.trained:
                    target = objective.target.name
                    if target in scorers and validation[name]:
                        tests[name][target] = objective.sealed(choice.counts, scorers[target])
                        bar.advance()
        return tests

    def _against_chosen(self, scores: Mapping[str, Score], chosen: Mapping[str, Score]) -> BaselineScore | None:
        """A baseline's mean score and its gain over the chosen mixture; None if a target has no score."""
        weights = {one.target.name: one.target.weight for one in self.trained}
        if len(scores) < len(weights):
            return None
        gain = Measurement(*paired(scores, chosen, weights)) if len(chosen) == len(weights) else None
        return BaselineScore(*mean_over_targets(scores, weights), gain)


def reason_of(standing: Standing) -> str:
    """Why a mixture has no score."""
    return next(trial.reason or "" for trial in standing.trials.values() if trial.score is None)
