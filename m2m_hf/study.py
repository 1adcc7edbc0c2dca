"""The correlation study: fine-tunes mixtures, and holds the surrogates and other ways of choosing against what they score."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from .certainty import paired, scores_of
from .errors import InputError
from .fidelity import LARGER, Agreement, Rows, agreement, verdict
from .journal import Journal, read_json, write_json
from .mixture import Failure, Mixture, Score, SearchSpace, Standing, mean_over_targets
from .objectives import Objective
from .scoring import Scorer
from .search import Budget, Search, score_of, trial_of
from .trained import Counts, TrainedMixtures, TrainedObjective

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
    ) -> None:
        self.space = space
        self.surrogates = surrogates
        self.trained = trained
        self.models: TrainedMixtures = trained[0].models
        self._journal = journal
        self._write = write
        self._agree = agree
        self._progress = progress

    def standings(self, objectives: Sequence[Objective], mixtures: Sequence[Mixture], title: str) -> list[Standing]:
        """How mixtures stand by some objectives; what the journal does not hold is measured."""
        with self._progress(title, len(mixtures)) as bar:
            state = Search(
                objectives, self.space, self._journal, self._write, lambda *_: bar.advance(), False, Budget(),
                self._agree,
            )  # fmt: skip
            state.fixed(mixtures)
        return [state.standings[mixture] for mixture in mixtures]

    def fine_tune(self, choices: Sequence[Counts]) -> None:
        """Trains the models that are missing.

        Raises:
            InputError: a training diverged.
        """
        missing = {self.models.folder(counts): counts for counts in choices if not self.models.is_trained(counts)}
        if not missing:
            return
        steps = [self.models.steps(counts) for counts in missing.values()]
        with self._progress("fine-tuning mixtures", sum(steps)) as bar:
            starts = accumulate(steps, initial=0)
            for number, (counts, before) in enumerate(zip(missing.values(), starts, strict=False), start=1):
                self.models.train(counts, bar, before, f"{number} of {len(missing)}: {' + '.join(counts)}")

    def counts(self, mixture: Mixture) -> dict[str, int]:
        return self.models.counts(mixture)

    def choice(self, mixture: Mixture) -> Choice:
        return Choice(mixture, self.counts(mixture))

    def stratified(self) -> Choice:
        """All candidates with equally many rows, as many as the smallest has."""
        rows = {name: len(self.models.candidates[name].rows) for name in self.space.names}
        return Choice(Mixture.subset(rows), dict.fromkeys(sorted(rows), min(rows.values())))

    def trained_standing(self, choice: Choice) -> Standing:
        """How a model stands that was trained on rows which are not its mixture's usual ones."""
        trials = {}
        for objective in self.trained:
            key = objective.keys.trained(choice.counts)
            trial = self._journal.get(key)
            if trial is None:
                found = objective.score(choice.counts)
                trial = trial_of(objective, choice.mixture, found, 0.0, objective.examples, key, "trained")
                self._journal.append(trial, write=self._write)
            trials[objective.target] = trial
        return Standing(choice.mixture, trials, {one.target: one.weight for one in self.trained})

    def trained_standings(self, mixtures: Sequence[Mixture], base: Standing) -> list[Standing]:
        """How the models fine-tuned on mixtures stand, and on which targets they fall short of the base model's `min_delta`."""
        reference = scores_of(base)
        least = {
            one.target: reference[one.target].value - one.min_delta for one in self.trained if one.min_delta is not None
        }
        found = []
        for standing in self.standings(self.trained, mixtures, "scoring what was fine-tuned"):
            scores = scores_of(standing)
            short = tuple(target for target, value in least.items() if scores[target].value < value)
            found.append(replace(standing, short=short))
        return found

    def run(self, mixtures: Sequence[Mixture], base: Standing) -> dict[str, Any]:
        """Fine-tunes and scores `mixtures`, and compares; the part of `fidelity.json` that is about the surrogates.

        Args:
            base: how the base model stands.

        Raises:
            InputError: a training diverged, or a fine-tuned model has no score.
        """
        self.fine_tune([self.counts(mixture) for mixture in mixtures])
        true = self.standings(self.trained, mixtures, "scoring what was fine-tuned")
        for standing in true:
            for trial in standing.trials.values():
                if trial.score is None:
                    raise InputError(
                        f"the model fine-tuned on {standing.mixture} has no score on {trial.target}: {trial.reason}"
                    )
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
        complete = self.space.at_most(len(mixtures)) and set(self.space.subsets()) <= set(mixtures)
        compared = {name: compare(mixtures, standings, true, complete) for name, standings in found.items()}
        return {
            "all_mixtures": complete,
            "mixtures": shown,
            "agreement": {name: {key: one.to_json() for key, one in of.items()} for name, of in compared.items()},
            "verdict": {
                name: dict(zip(("verdict", "why"), verdict(of.get("score"), of.get("score" + LARGER)), strict=True))
                for name, of in compared.items()
            },
            "training_noise": training_noise(found.get("merged", []), true),
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
        self.fine_tune([choice.counts for choice in choices.values()])
        stand = {name: scores_of(self.trained_standing(choice)) for name, choice in choices.items()}
        stand["base"] = scores_of(base)
        weights = {one.target: one.weight for one in self.trained}
        tests = self._test_scores({name: choice.counts for name, choice in choices.items()} | {"base": {}}, scorers)
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
                behind = paired(ours, reference, weights)
                line[part] = {"score": value, "stderr": stderr, "over_chosen": pair(behind)}
            shown[name] = line
        return shown

    def _test_scores(self, choices: Mapping[str, Counts], scorers: Mapping[str, Scorer]) -> dict[str, dict[str, Score]]:
        """Of every choice and every target with a sealed test set its score; models that are the same are scored once."""
        found: dict[str, dict[str, Score]] = {name: {} for name in choices}
        if not scorers:
            return found
        with self._progress("scoring the sealed test set", len(choices) * len(scorers)) as bar:
            for name, counts in choices.items():
                for objective in self.trained:
                    if objective.target in scorers:
                        found[name][objective.target] = self._test_score(
                            name, counts, objective, scorers[objective.target]
                        )
                        bar.advance()
        return found

    def _test_score(self, name: str, counts: Counts, objective: TrainedObjective, scorer: Scorer) -> Score:
        """One model's score on a sealed test set, looked at once: it is kept beside the model."""
        path = self.models.folder(counts) / "test.json"
        known = read_json(path) if path.exists() else {}
        if scorer.fingerprint not in known:
            score = objective.score(counts, scorer)
            if isinstance(score, Failure):
                raise InputError(f"{name} has no score on the test set of {objective.target}: {score.reason}")
            known[scorer.fingerprint] = asdict(score)
            if self._write:
                write_json(path, known)
        one = known[scorer.fingerprint]
        return Score(one["value"], one["stderr"], tuple(one["values"]), tuple(one["logprobs"]))


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


def resilience(base: Standing, surrogate: Sequence[Standing], true: Sequence[Standing]) -> dict[str, Any]:
    """How far the surrogate's and the trained models fall below the base model on mixtures that hurt, on the same rows.

    By measure (`score`, and `logprob` where there is one): `hurt`, the mixtures whose trained model lies below the base; the mean
    change of both; how much less the surrogate falls than the trained models (`shielded`), with its standard error over the
    rows; and how many of those mixtures lie below the base by the surrogate too (`noticed`).
    """
    reference = scores_of(base)
    kept = [(one, other) for one, other in zip(surrogate, true, strict=True) if one.score]
    measures = ["score", *(["logprob"] if has_logprobs([base, *surrogate, *true]) else [])]
    shown: dict[str, Any] = {}
    for measure in measures:
        changes = [
            [paired(scores_of(one), reference, base.weights, measure)[0] for one in both] for both in kept
        ]  # (surrogate, trained)
        hurt = [number for number, (_, trained) in enumerate(changes) if trained < 0]
        shown[measure] = {"mixtures": len(kept), "hurt": len(hurt)}
        if hurt:
            rows = by_rows([kept[n][0] for n in hurt], [kept[n][1] for n in hurt], measure)
            means = [one.weight * (one.surrogate - one.trained).mean(0) for one in rows]
            variance = sum(values.var(ddof=1) / len(values) if len(values) > 1 else np.nan for values in means)
            shown[measure] |= {
                "surrogate": float(np.mean([changes[n][0] for n in hurt])),
                "trained": float(np.mean([changes[n][1] for n in hurt])),
                "shielded": pair(
                    (
                        float(sum(values.mean() for values in means)),
                        float(variance**0.5) if variance == variance else None,
                    )
                ),
                "noticed": sum(changes[n][0] < 0 for n in hurt),
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
    """Whether all scores hold the log-probability of the right answers."""
    return all(trial.score and trial.score.logprobs for one in standings for trial in one.trials.values())


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


def nested(order: Sequence[str]) -> Iterator[Mixture]:
    """The first of the names, the first two, …, all."""
    for size in range(1, len(order) + 1):
        yield Mixture.subset(order[:size])


def best_of(mixtures: Sequence[Mixture], standings: Mapping[Mixture, Standing]) -> Mixture:
    """The mixture with the highest score; of equal ones that with the likelier right answers, or else the first."""
    return max(mixtures, key=lambda one: (score_of(standings[one]).value, standings[one].mean_logprob))
