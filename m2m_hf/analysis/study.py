"""The correlation study: fine-tunes mixtures and compares their scores with the surrogates and with other ways of choosing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from random import Random
from typing import Any

from m2m_hf.analysis.fidelity import LARGER, verdict
from m2m_hf.analysis.study_statistics import compare, figures, pair, resilience, training_noise
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.objective import Objective
from m2m_hf.core.score import Failure, Score, mean_over_targets, paired
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Reference, Standing, Trial, scores_of
from m2m_hf.errors import InputError
from m2m_hf.objectives.fine_tuned import Counts, FineTunedModels
from m2m_hf.objectives.trained import TrainedObjective
from m2m_hf.scoring.scorers import Scorer
from m2m_hf.search.callbacks import ProgressCallback
from m2m_hf.search.measure import SearchState
from m2m_hf.search.result import SearchResult, score_of
from m2m_hf.storage.journal import Journal
from m2m_hf.training.fine_tune import TrainingFailedError

RANDOM = 3  # mixtures drawn at random to compare with


@dataclass(frozen=True)
class Choice:
    """What some way of choosing comes to.

    Args:
        mixture: with equal weights.
        counts: rows of each candidate that it trains on.
    """

    mixture: Mixture
    counts: Counts


class Study:
    """Fine-tunes mixtures, once each, and compares.

    Args:
        space: of the search.
        surrogates: name (`merged`, `ensemble`) -> its objectives, one for every target.
        trained: the trained objectives, one for every target.
        journal: remembers trials.
        progress: `Terminal.progress`.
        broadcast: see `SearchState`.
        uniform: a merged single is an adapter that was trained like all other models, so that it shows the training noise.
    """

    def __init__(
        self,
        space: SearchSpace,
        surrogates: Mapping[str, Sequence[Objective]],
        trained: Sequence[TrainedObjective],
        journal: Journal,
        *,
        progress: Callable[[str, int], Any],
        broadcast: Callable[[Any], Any],
        uniform: bool = True,
    ) -> None:
        self.space = space
        self.surrogates = surrogates
        self.trained = trained
        self.models: FineTunedModels = trained[0].models
        self.uniform = uniform
        self.worked = False  # True once anything was trained
        self._journal = journal
        self._progress = progress
        self._broadcast = broadcast

    def standings(
        self, objectives: Sequence[Objective], mixtures: Sequence[Mixture], title: str, base: Standing | None = None
    ) -> list[Standing]:
        """How mixtures stand by some objectives; measures what the journal does not hold.

        Args:
            base: the base model's standing, if `min_delta` counts.
        """
        with self._progress(title, len(mixtures)) as bar:
            state = SearchState(
                self.space, objectives, self._journal, [ProgressCallback(bar)], broadcast=self._broadcast
            )
            if base is not None:
                state.reference = replace(state.reference, base=base.trials)
            state.score_in_full(list(dict.fromkeys(mixtures)))
        return [state.standings[mixture] for mixture in mixtures]

    def fine_tune(self, choices: Sequence[Choice]) -> None:
        """Trains the models that are missing; one that diverges becomes a failed trial of the journal."""
        missing = {self.models.folder(one.counts): one for one in choices if not self.models.is_trained(one.counts)}
        todo = [choice for choice in missing.values() if not self._is_known_to_fail(choice)]
        if not todo:
            return
        self.worked = True
        steps = [self.models.steps(choice.counts) for choice in todo]
        with self._progress("fine-tuning mixtures", sum(steps)) as bar:
            starts = accumulate(steps, initial=0)
            for number, (choice, before) in enumerate(zip(todo, starts, strict=False), start=1):
                note = f"{number} of {len(todo)}: {' + '.join(choice.counts)}"
                try:
                    self.models.train(choice.counts, bar, before, note)
                except TrainingFailedError as error:
                    for objective in self.trained:
                        self._remember(objective, choice, Failure(str(error)))

    def _is_known_to_fail(self, choice: Choice) -> bool:
        trials = [self._journal.get(objective.keys.trained(choice.counts)) for objective in self.trained]
        return any(trial is not None and trial.state == "failed" for trial in trials)

    def _remember(self, objective: TrainedObjective, choice: Choice, result: Score | Failure) -> Trial:
        key = objective.keys.trained(choice.counts)
        return self._journal.append(Trial.of(result, choice.mixture, objective.name, objective.target, key))

    def choice(self, mixture: Mixture) -> Choice:
        return Choice(mixture, self.models.counts(mixture))

    def choices(
        self, result: SearchResult, objectives: Sequence[Objective], similar: Sequence[str], random: int, seed: int
    ) -> dict[str, Choice]:
        """What this and other ways of choosing come to, by name.

        Args:
            result: the search. What else must be scored is added to its standings.
            objectives: the search's.
            similar: the candidates, those most similar to the targets first; empty if that is not known.
            random: how many mixtures to draw at random.
            seed: of these draws.
        """
        names = self.space.names
        choices = {"chosen": self.choice(result.best.mixture), "all": self.choice(Mixture.subset(names))}
        singles = [Mixture.subset([name]) for name in names]
        if singles := [mixture for mixture in singles if result.standings[mixture].score]:
            choices["best_single"] = self.choice(best_of(singles, result.standings))
        prefixes = [Mixture.subset(similar[:size]) for size in range(1, len(similar) + 1)]
        prefixes = [mixture for mixture in prefixes if mixture in self.space]
        standings = result.standings
        if unknown := [one for one in prefixes if one not in standings or not standings[one].complete]:
            standings.update(zip(unknown, self.standings(objectives, unknown, "scoring mixtures"), strict=True))
        if prefixes := [mixture for mixture in prefixes if standings[mixture].score]:
            choices["similarity"] = self.choice(best_of(prefixes, standings))
        rows = {name: len(self.models.candidates[name].rows) for name in names}
        choices["stratified"] = Choice(Mixture.subset(rows), dict.fromkeys(sorted(rows), min(rows.values())))
        drawn = [self.choice(mixture) for mixture in self._draw(random, seed)]
        return choices | {f"random_{number}": choice for number, choice in enumerate(drawn, start=1)}

    def _draw(self, count: int, seed: int) -> list[Mixture]:
        """Up to `count` different mixtures, drawn at random."""
        draw = Random(seed)
        mixtures: dict[Mixture, None] = {}
        for _ in range(100 * count):
            mixture = self.space.draw(draw)
            if len(mixtures) < count:
                mixtures.setdefault(mixture)
        return list(mixtures)

    def trained_standing(self, choice: Choice) -> Standing:
        """How the model of a choice stands, also if it is trained on other rows than its mixture usually is."""
        trials = {}
        for objective in self.trained:
            trial = self._journal.get(objective.keys.trained(choice.counts))
            trials[objective.target.name] = trial or self._remember(objective, choice, objective.score(choice.counts))
        return Reference([one.target for one in self.trained]).standing(choice.mixture, trials)

    def trained_standings(self, mixtures: Sequence[Mixture], base: Standing) -> list[Standing]:
        """How models fine-tuned on mixtures stand, `min_delta` included; trains what is missing."""
        self.fine_tune([self.choice(mixture) for mixture in mixtures])
        return self.standings(self.trained, mixtures, "scoring what was fine-tuned", base)

    def run(self, trained: Sequence[Standing], base: Standing) -> dict[str, Any]:
        """Compares fine-tuned mixtures with what the surrogates say of them: the part of `fidelity.json` about the surrogates.

        Mixtures whose training diverges, or that have no score, are left out and named.

        Args:
            trained: how they stand, see `trained_standings`.
            base: the base model's standing.

        Raises:
            InputError: not a single mixture could be fine-tuned and scored.
        """
        asked, failed, true = [one.mixture for one in trained], [], []
        for standing in trained:
            if standing.score is not None:
                true.append(standing)
                continue
            reason = next(trial.reason for trial in standing.trials.values() if trial.score is None)
            failed.append({"mixture": standing.mixture.weights, "reason": reason})
        mixtures = [standing.mixture for standing in true]
        if not mixtures:
            raise InputError(f"not a single mixture could be fine-tuned and scored: {failed[0]['reason']}")
        surrogates = {
            name: self.standings(objectives, mixtures, f"scoring mixtures ({name})")
            for name, objectives in self.surrogates.items()
        }
        lines = []
        for number, mixture in enumerate(mixtures):
            counts = self.models.counts(mixture)
            lines.append({
                "mixture": mixture.weights,
                "rows": sum(counts.values()),
                "steps": self.models.steps(counts),
                "seconds": self.models.record(counts)["seconds"],
                "trained": figures(true[number]),
                **{name: figures(standings[number]) for name, standings in surrogates.items()},
            })  # fmt: skip
        complete = set(islice(self.space.subsets(), len(asked) + 1)) <= set(asked)
        agreements = {name: compare(mixtures, standings, true, complete) for name, standings in surrogates.items()}
        return {
            "all_mixtures": complete,
            "mixtures": lines,
            "failed": failed,
            "agreement": {name: {key: one.to_json() for key, one in of.items()} for name, of in agreements.items()},
            "verdict": {
                name: dict(zip(("verdict", "why"), verdict(of.get("score"), of.get("score" + LARGER)), strict=True))
                for name, of in agreements.items()
            },
            "training_noise": training_noise(surrogates["merged"], true) if self.uniform else None,
            "resilience": {name: resilience(base, standings, true) for name, standings in surrogates.items()},
        }

    def baselines(
        self, choices: Mapping[str, Choice], base: Standing, scorers: Mapping[str, Scorer]
    ) -> dict[str, dict[str, Any]]:
        """What every way of choosing comes to, trained and scored alike, and the base model's scores.

        Scores the sealed test sets, once for every model, since everything is chosen by now.

        Args:
            choices: by name; `chosen` is that of the method.
            base: the base model's standing.
            scorers: target -> scorer of its test rows, of the targets that have any.
        """
        self.fine_tune(list(choices.values()))
        validation = {name: scores_of(self.trained_standing(choice)) for name, choice in choices.items()}
        validation["base"] = scores_of(base)
        tests = self._test_scores(choices, validation, scorers)
        baselines = {}
        for name in validation:
            choice = choices.get(name)
            baselines[name] = {
                "mixture": choice.mixture.weights if choice else {},
                "rows": sum(choice.counts.values()) if choice else 0,
                "steps": self.models.steps(choice.counts) if choice else 0,
                "validation": self._against_chosen(validation[name], validation["chosen"]),
                "test": self._against_chosen(tests[name], tests["chosen"]),
            }
        return baselines

    def _test_scores(
        self, choices: Mapping[str, Choice], validation: Mapping[str, Any], scorers: Mapping[str, Scorer]
    ) -> dict[str, dict[str, Score]]:
        """Name of a choice -> target -> score on sealed test rows, of the choices that have validation scores."""
        tests: dict[str, dict[str, Score]] = {name: {} for name in validation}
        if not scorers:
            return tests
        with self._progress("scoring the sealed test set", len(tests) * len(scorers)) as bar:
            for name, scores in tests.items():
                counts = choices[name].counts if name in choices else {}
                for objective in self.trained:
                    target = objective.target.name
                    if target in scorers and validation[name]:
                        scores[target] = objective.sealed(counts, scorers[target])
                        bar.advance()
        return tests

    def _against_chosen(self, scores: Mapping[str, Score], chosen: Mapping[str, Score]) -> dict[str, Any] | None:
        """A baseline's mean score and its gain over the chosen mixture; None if a target has no score."""
        weights = {one.target.name: one.target.weight for one in self.trained}
        if len(scores) < len(weights):
            return None
        value, stderr = mean_over_targets(scores, weights)
        gain = pair(paired(scores, chosen, weights)) if len(chosen) == len(weights) else None
        return {"score": value, "stderr": stderr, "over_chosen": gain}


def best_of(mixtures: Sequence[Mixture], standings: Mapping[Mixture, Standing]) -> Mixture:
    """The mixture with the highest score; of equal ones, the one with the likelier right answers, or else the first."""
    return max(mixtures, key=lambda one: (score_of(standings[one]).value, standings[one].mean_logprob))
