"""The correlation study: fine-tunes mixtures, and holds the surrogates and other ways of choosing against what they score."""

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
from m2m_hf.core.trial import Standing, scores_of
from m2m_hf.errors import InputError
from m2m_hf.objectives.fine_tuned import Counts, FineTunedModels
from m2m_hf.objectives.trained import TrainedObjective
from m2m_hf.scoring.scorers import Scorer
from m2m_hf.search.loop import Search, trial_of
from m2m_hf.search.result import Budget, SearchResult, score_of
from m2m_hf.storage.journal import Journal
from m2m_hf.training.fine_tune import TrainingFailedError

RANDOM = 3  # mixtures drawn at random to compare with


@dataclass(frozen=True)
class Choice:
    """A mixture that some way of choosing comes to.

    Args:
        mixture: with equal weights.
        counts: rows of each candidate that it trains on.
    """

    mixture: Mixture
    counts: Counts


class Study:
    """Trains mixtures once each and compares.

    Args:
        space: of the search.
        surrogates: name (`merged`, `ensemble`) -> its objectives, one for every target.
        trained: the trained objectives, one for every target.
        journal: where trials are remembered.
        write: whether this process writes it.
        broadcast: gives every process what the main one has.
        progress: `Terminal.progress`.
        uniform: whether merged singles are adapters that were trained as everything else: the average of a bank without mixed
            training.
    """

    def __init__(
        self,
        space: SearchSpace,
        surrogates: Mapping[str, Sequence[Objective]],
        trained: Sequence[TrainedObjective],
        journal: Journal,
        *,
        write: bool,
        broadcast: Callable[[Any], Any],
        progress: Callable[[str, int], Any],
        uniform: bool = True,
    ) -> None:
        self.uniform = uniform
        self.space = space
        self.surrogates = surrogates
        self.trained = trained
        self.models: FineTunedModels = trained[0].models
        self._journal = journal
        self._write = write
        self._broadcast = broadcast
        self._progress = progress
        self.worked = False  # whether anything was trained

    def standings(self, objectives: Sequence[Objective], mixtures: Sequence[Mixture], title: str) -> list[Standing]:
        """How mixtures stand by some objectives; what the journal does not hold is measured."""
        with self._progress(title, len(mixtures)) as bar:
            state = Search(
                objectives, self.space, self._journal, self._write, lambda *_: bar.advance(), False, Budget(),
                self._broadcast, list,
            )  # fmt: skip
            state.fixed(mixtures)
        return [state.standings[mixture] for mixture in mixtures]

    def fine_tune(self, choices: Sequence[Choice]) -> None:
        """Trains the models that are missing; one that diverges is a failed trial of the journal."""
        missing = {self.models.folder(one.counts): one for one in choices if not self.models.is_trained(one.counts)}
        for folder, one in list(missing.items()):
            trials = [self._journal.get(objective.keys.trained(one.counts)) for objective in self.trained]
            if any(trial and trial.state == "failed" for trial in trials):
                del missing[folder]
        if not missing:
            return
        self.worked = True
        steps = [self.models.steps(one.counts) for one in missing.values()]
        with self._progress("fine-tuning mixtures", sum(steps)) as bar:
            starts = accumulate(steps, initial=0)
            for number, (one, before) in enumerate(zip(missing.values(), starts, strict=False), start=1):
                try:
                    self.models.train(one.counts, bar, before, f"{number} of {len(missing)}: {' + '.join(one.counts)}")
                except TrainingFailedError as error:
                    for objective in self.trained:
                        key = objective.keys.trained(one.counts)
                        failed = Failure(str(error))
                        trial = trial_of(objective, one.mixture, failed, 0.0, objective.examples, key, "trained")
                        self._journal.append(trial, write=self._write)

    def counts(self, mixture: Mixture) -> dict[str, int]:
        return self.models.counts(mixture)

    def choice(self, mixture: Mixture) -> Choice:
        return Choice(mixture, self.counts(mixture))

    def choices(
        self, result: SearchResult, objectives: Sequence[Objective], similar: Sequence[str], random: int, seed: int
    ) -> dict[str, Choice]:
        """What this and other ways of choosing come to, by name.

        Args:
            result: the search; its standings come to hold what had to be scored.
            objectives: the search's.
            similar: the candidates, those most similar to the targets first; empty where that cannot be told.
            random: mixtures to draw at random.
            seed: of these.
        """
        names = self.space.names
        choices = {"chosen": self.choice(result.best.mixture), "all": self.choice(Mixture.subset(names))}
        singles = [Mixture.subset([name]) for name in names]
        if singles := [one for one in singles if result.standings[one].score]:
            choices["best_single"] = self.choice(best_of(singles, result.standings))
        steps = [Mixture.subset(similar[:size]) for size in range(1, len(similar) + 1)]
        steps = [one for one in steps if one in self.space]
        unknown = [one for one in steps if one not in result.standings or not result.standings[one].complete]
        more = self.standings(objectives, unknown, "scoring mixtures") if unknown else []
        result.standings.update(zip(unknown, more, strict=True))
        if steps := [one for one in steps if result.standings[one].score]:
            choices["similarity"] = self.choice(best_of(steps, result.standings))
        rows = {name: len(self.models.candidates[name].rows) for name in names}
        choices["stratified"] = Choice(Mixture.subset(rows), dict.fromkeys(sorted(rows), min(rows.values())))
        draw = Random(seed)
        drawn: list[Mixture] = []
        for _ in range(100 * random):
            mixture = self.space.draw(draw)
            if len(drawn) < random and mixture not in drawn:
                drawn.append(mixture)
        return choices | {f"random_{number}": self.choice(one) for number, one in enumerate(drawn, start=1)}

    def trained_standing(self, choice: Choice) -> Standing:
        """How a model stands that was trained on rows which are not its mixture's usual ones."""
        trials = {}
        for objective in self.trained:
            key = objective.keys.trained(choice.counts)
            trial = self._journal.get(key)
            if trial is None:
                found = objective.score(choice.counts)
                trial = trial_of(objective, choice.mixture, found, 0.0, objective.examples, key, "trained")
                trial = self._journal.append(trial, write=self._write)
            trials[objective.target] = trial
        return Standing(choice.mixture, trials, {one.target: one.weight for one in self.trained})

    def trained_standings(self, mixtures: Sequence[Mixture], base: Standing) -> list[Standing]:
        """How models fine-tuned on mixtures stand, trained now where they are missing.

        `short` names the targets on which they fall short of the base model's `min_delta`.
        """
        self.fine_tune([self.choice(mixture) for mixture in mixtures])
        reference = scores_of(base)
        least = {
            one.target: reference[one.target].value - one.min_delta for one in self.trained if one.min_delta is not None
        }
        found = []
        for standing in self.standings(self.trained, mixtures, "scoring what was fine-tuned"):
            scores = scores_of(standing)
            short = tuple(name for name, value in least.items() if name in scores and scores[name].value < value)
            found.append(replace(standing, short=short))
        return found

    def run(self, mixtures: Sequence[Mixture], base: Standing) -> dict[str, Any]:
        """Fine-tunes and scores `mixtures`, and compares; the part of `fidelity.json` that is about the surrogates.

        Args:
            base: how the base model stands.

        Mixtures whose training diverges, or that have no score, are left out and named.

        Raises:
            InputError: not one could be fine-tuned and scored.
        """
        asked, true, failed = mixtures, self.trained_standings(mixtures, base), []
        for standing in true:
            if standing.score is None:
                reason = next(trial.reason for trial in standing.trials.values() if trial.score is None)
                failed.append({"mixture": standing.mixture.weights, "reason": reason})
        true = [one for one in true if one.score is not None]
        mixtures = [one.mixture for one in true]
        if not mixtures:
            raise InputError(f"not one mixture could be fine-tuned and scored: {failed[0]['reason']}")
        found = {
            name: self.standings(objectives, mixtures, f"scoring mixtures ({name})")
            for name, objectives in self.surrogates.items()
        }
        shown = []
        for number, mixture in enumerate(mixtures):
            counts = self.counts(mixture)
            line: dict[str, Any] = {
                "mixture": mixture.weights,
                "rows": sum(counts.values()),
                "steps": self.models.steps(counts),
                "seconds": self.models.record(counts)["seconds"],
                "trained": figures(true[number]),
            }
            line |= {name: figures(standings[number]) for name, standings in found.items()}
            shown.append(line)
        complete = set(islice(self.space.subsets(), len(asked) + 1)) <= set(asked)
        compared = {name: compare(mixtures, standings, true, complete) for name, standings in found.items()}
        return {
            "all_mixtures": complete,
            "mixtures": shown,
            "failed": failed,
            "agreement": {name: {key: one.to_json() for key, one in of.items()} for name, of in compared.items()},
            "verdict": {
                name: dict(zip(("verdict", "why"), verdict(of.get("score"), of.get("score" + LARGER)), strict=True))
                for name, of in compared.items()
            },
            "training_noise": training_noise(found["merged"], true) if self.uniform else None,
            "resilience": {name: resilience(base, standings, true) for name, standings in found.items()},
        }

    def baselines(
        self, choices: Mapping[str, Choice], base: Standing, scorers: Mapping[str, Scorer]
    ) -> dict[str, dict[str, Any]]:
        """What every way of choosing comes to, trained and scored alike; the base model's scores beside them.

        The sealed test sets are scored here, once for every model, when everything is chosen.

        Args:
            choices: by name, that of the method under `chosen`.
            base: how the base model stands.
            scorers: target -> scorer of its test rows, where it has any.
        """
        self.fine_tune(list(choices.values()))
        stand = {name: scores_of(self.trained_standing(choice)) for name, choice in choices.items()}
        stand["base"] = scores_of(base)
        weights = {one.target: one.weight for one in self.trained}
        counts = {name: choice.counts for name, choice in choices.items()} | {"base": {}}
        tests: dict[str, dict[str, Score]] = {name: {} for name in counts}
        if scorers:
            with self._progress("scoring the sealed test set", len(counts) * len(scorers)) as bar:
                for name, of in counts.items():
                    for objective in self.trained:
                        if objective.target in scorers and stand[name]:
                            scorer = scorers[objective.target]
                            tests[name][objective.target] = objective.sealed(of, scorer, self._write, self._broadcast)
                            bar.advance()
        shown = {}
        for name, scores in stand.items():
            choice = choices.get(name)
            line: dict[str, Any] = {
                "mixture": choice.mixture.weights if choice else {},
                "rows": sum(choice.counts.values()) if choice else 0,
                "steps": self.models.steps(choice.counts) if choice else 0,
            }
            for part, ours, reference in (
                ("validation", scores, stand["chosen"]),
                ("test", tests[name], tests["chosen"]),
            ):
                if not ours or len(ours) < len(weights):
                    line[part] = None
                    continue
                value, stderr = mean_over_targets(ours, weights)
                over = pair(paired(ours, reference, weights)) if len(reference) == len(weights) else None
                line[part] = {"score": value, "stderr": stderr, "over_chosen": over}
            shown[name] = line
        return shown


def best_of(mixtures: Sequence[Mixture], standings: Mapping[Mixture, Standing]) -> Mixture:
    """The mixture with the highest score; of equal ones that with the likelier right answers, or else the first."""
    return max(mixtures, key=lambda one: (score_of(standings[one]).value, standings[one].mean_logprob))
