"""The correlation study: fine-tunes mixtures, and holds the surrogates and other ways of choosing against what they score."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from random import Random
from typing import Any

import numpy as np

from m2m_hf.analysis.fidelity import LARGER, Agreement, Rows, agreement, verdict
from m2m_hf.analysis.selection_bias import paired, scores_of
from m2m_hf.core.mixture import Failure, Mixture, Score, SearchSpace, Standing, mean_over_targets
from m2m_hf.errors import InputError
from m2m_hf.objectives.merged import Objective
from m2m_hf.objectives.trained import Counts, TrainedMixtures, TrainedObjective
from m2m_hf.scoring.scorers import Scorer
from m2m_hf.search.loop import Budget, Search, SearchResult, score_of, trial_of
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
        agree: gives every process what the main one has.
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
        agree: Callable[[Any], Any],
        progress: Callable[[str, int], Any],
        uniform: bool = True,
    ) -> None:
        self.uniform = uniform
        self.space = space
        self.surrogates = surrogates
        self.trained = trained
        self.models: TrainedMixtures = trained[0].models
        self._journal = journal
        self._write = write
        self._agree = agree
        self._progress = progress
        self.worked = False  # whether anything was trained

    def standings(self, objectives: Sequence[Objective], mixtures: Sequence[Mixture], title: str) -> list[Standing]:
        """How mixtures stand by some objectives; what the journal does not hold is measured."""
        with self._progress(title, len(mixtures)) as bar:
            state = Search(
                objectives, self.space, self._journal, self._write, lambda *_: bar.advance(), False, Budget(),
                self._agree, list,
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
                            tests[name][objective.target] = objective.sealed(of, scorer, self._write, self._agree)
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


def pair(found: tuple[float, float | None]) -> dict[str, float | None]:
    """A value with its standard error, as JSON shows it."""
    return {"value": found[0], "stderr": found[1]}


def training_noise(merged: Sequence[Standing], true: Sequence[Standing]) -> float | None:
    """How far two trainings on the same rows in another order lie apart: the standard deviation of their scores' difference.

    Of a single candidate the merged model is its adapter, which was trained on the same rows as the model fine-tuned on
    that candidate. None where no single was fine-tuned.
    """
    apart = [
        one.score.value - other.score.value
        for one, other in zip(merged, true, strict=False)
        if len(one.mixture) == 1 and one.score and other.score
    ]
    return float(np.sqrt(np.mean(np.square(apart)))) if apart else None


def resilience(
    base: Standing, surrogate: Sequence[Standing], true: Sequence[Standing], seed: int = 0
) -> dict[str, Any]:
    """How far the surrogate's and the trained models fall below the base model on mixtures that hurt.

    Mixtures that hurt are picked on one half of the rows and measured on the other, and the other way round, or they would be
    picked for their bad luck too. By measure (`score`, and `logprob` where there is one): `hurt`, mixtures whose trained model
    lies below the base on all rows, and `noticed`, those of them that do by the surrogate too; and over the halves the mean
    change of both, and how much less the surrogate falls (`shielded`) with its standard error over the rows. The latter three are
    missing where no mixture hurts on a half, or there are no values by row.
    """
    kept = [(one, other) for one, other in zip(surrogate, true, strict=True) if one.score]
    shown: dict[str, Any] = {}
    for measure in ("score", *(["logprob"] if has_logprobs([base, *surrogate, *true]) else [])):
        rows = by_rows([one for one, _ in kept], [one for _, one in kept], measure)
        level = [one.trained[0] for one in by_rows([base], [base], measure)]
        above = [
            (one.weight, one.surrogate - own, one.trained - own) for one, own in zip(rows, level, strict=True)
        ]  # of every target its weight, and what mixtures score above the base, row by row
        means = [sum(weight * side.mean(1) for weight, *sides in above for side in [sides[k]]) for k in (0, 1)]
        hurt = means[1] < 0
        shown[measure] = {
            "mixtures": len(kept), "hurt": int(hurt.sum()), "noticed": int((means[0][hurt] < 0).sum()),
            "surrogate": None, "trained": None, "shielded": None,
        }  # fmt: skip
        if any(one.shape[1] < 4 for _, one, _ in above):
            continue
        draw = np.random.default_rng(seed)
        orders = [draw.permutation(one.shape[1]) for _, one, _ in above]
        found = []
        for first in (True, False):
            picked = measured = 0.0
            variance = 0.0
            halves = [np.array_split(order, 2)[:: 1 if first else -1] for order in orders]
            picked = (
                sum(w * trained[:, half[0]].mean(1) for (w, _, trained), half in zip(above, halves, strict=True)) < 0
            )
            if not picked.any():
                continue
            changes = []
            for (weight, predicted, trained), (_, half) in zip(above, halves, strict=True):
                sides = [side[picked][:, half].mean(0) for side in (predicted, trained)]
                changes.append([weight * side.mean() for side in sides])
                variance += float((weight * (sides[0] - sides[1])).var(ddof=1) / len(half))
            measured = np.sum(changes, 0)
            found.append((*measured, variance))
        if found:
            fell = np.mean(found, 0)
            shown[measure] |= {
                "surrogate": float(fell[0]),
                "trained": float(fell[1]),
                "shielded": pair((float(fell[0] - fell[1]), float(np.sqrt(fell[2] / len(found))))),
            }
    return shown


def figures(standing: Standing) -> dict[str, Any]:
    """A standing as `fidelity.json` shows it."""
    score = standing.score
    shown: dict[str, Any] = {
        "score": score.value if score else None,
        "stderr": score.stderr if score else None,
        "logprob": standing.mean_logprob / sum(standing.weights.values()) if has_logprobs([standing]) else None,
    }
    if len(standing.trials) > 1:
        shown["targets"] = {name: trial.score.value if trial.score else None for name, trial in standing.trials.items()}
    return shown


def has_logprobs(standings: Sequence[Standing]) -> bool:
    """Whether all scores hold the log-probability of the right answers, and as more than the score itself in another unit."""
    scores = [trial.score for one in standings for trial in one.trials.values()]
    return all(score and score.logprobs for score in scores) and not all(
        proportional(score) for score in scores if score
    )


def proportional(score: Score) -> bool:
    """Whether the values by row are the log-probabilities, but for a positive factor: see `LossScorer`."""
    values, logprobs = np.array(score.values), np.array(score.logprobs)
    if len(values) != len(logprobs) or values.sum() * logprobs.sum() <= 0:
        return False
    return np.allclose(values * logprobs.sum(), logprobs * values.sum(), rtol=1e-3)


def by_rows(surrogate: Sequence[Standing], true: Sequence[Standing], measure: str) -> list[Rows]:
    """What mixtures scored, row by row, of every target."""
    weights = true[0].weights
    found = []
    for target, weight in weights.items():
        sides = []
        for standings in (surrogate, true):
            scores = [one.trials[target].score for one in standings]
            values = [
                (score.logprobs if measure == "logprob" else score.values or (score.value,))
                for score in scores
                if score
            ]
            sides.append(np.array(values, dtype=float))
        found.append(Rows(sides[0], sides[1], weight / sum(weights.values())))
    return found


def compare(
    mixtures: Sequence[Mixture], surrogate: Sequence[Standing], true: Sequence[Standing], complete: bool
) -> dict[str, Agreement]:
    """Agreement by measure, over all mixtures and over those of two or more candidates; of several targets also each alone.

    Mixtures that the surrogate could not score are left out, and so are comparisons of fewer than three.

    Args:
        complete: whether `mixtures` are all that there are.
    """
    kept = [number for number in range(len(mixtures)) if surrogate[number].score is not None]
    parts = {"": kept, LARGER: [number for number in kept if len(mixtures[number]) > 1]}
    compared = {}
    for suffix, numbers in parts.items():
        if len(numbers) < 3:
            continue
        chosen = [mixtures[number] for number in numbers]
        ours, theirs = [surrogate[number] for number in numbers], [true[number] for number in numbers]
        compared["score" + suffix] = agreement(chosen, by_rows(ours, theirs, "score"), complete)
        if has_logprobs([*ours, *theirs]):
            compared["logprob" + suffix] = agreement(chosen, by_rows(ours, theirs, "logprob"), complete)
        if len(true[0].weights) > 1:
            for target, rows in zip(true[0].weights, by_rows(ours, theirs, "score"), strict=True):
                compared[f"score of {target}{suffix}"] = agreement(chosen, [replace(rows, weight=1.0)], complete)
    return compared


def best_of(mixtures: Sequence[Mixture], standings: Mapping[Mixture, Standing]) -> Mixture:
    """The mixture with the highest score; of equal ones that with the likelier right answers, or else the first."""
    return max(mixtures, key=lambda one: (score_of(standings[one]).value, standings[one].mean_logprob))
