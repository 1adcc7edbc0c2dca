"""What a run has come to, in figures: `summary.json`, and what a user should be warned of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from m2m_hf.analysis.selection_bias import Certainty, certainty
from m2m_hf.analysis.shapley import Worth, worth
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Score, mean_over_targets
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Standing
from m2m_hf.data.rows import Candidate, Target
from m2m_hf.reporting.warnings import cautions
from m2m_hf.search.result import SearchResult, score_of
from m2m_hf.storage.keys import Keys
from m2m_hf.storage.records import experts_noun


@dataclass(frozen=True)
class Outcome:
    """What a run has come to.

    Args:
        result: the search.
        candidates: by name.
        targets: what was searched for, by name.
        examples: target -> part (`validation`, `test`) -> rows.
        training: name -> `training.json` of every adapter.
        final: `final/training.json`, or None while there is no final model of the chosen mixture.
        keys: of every target, by which a reader of the journal knows the lines of this run.
        space: the mixtures that may be chosen.
        study: fingerprint that a correlation study of this run has.
        overlap: (candidate, target) -> rows of the target that stand in the candidate too.
        fidelity: `fidelity.json`, where there is one of this very run.
        verified: what is in the summary of mixtures that were fine-tuned before choosing, where any were.
        fine_tuned: how these stand as fine-tuned, best first.
        compare_seconds: time spent fine-tuning mixtures to compare.
    """

    result: SearchResult
    candidates: Mapping[str, Candidate]
    targets: Mapping[str, Target]
    examples: Mapping[str, Mapping[str, int]]
    training: Mapping[str, Mapping[str, Any]]
    final: Mapping[str, Any] | None
    keys: Mapping[str, Keys]
    space: SearchSpace
    study: str
    overlap: Mapping[tuple[str, str], int] = field(default_factory=dict)
    fidelity: Mapping[str, Any] | None = None
    verified: Mapping[str, Any] | None = None
    fine_tuned: Sequence[Standing] = ()
    compare_seconds: float = 0.0

    @property
    def experts(self) -> str:
        """What the candidates' experts are called."""
        return experts_noun(next(iter(self.training.values()), {}))

    @property
    def usable(self) -> list[str]:
        """The candidates that have an adapter; those whose training failed have none."""
        return [name for name in self.candidates if "failed" not in self.training[name]]

    @cached_property
    def worth(self) -> Worth | None:
        """What every candidate is worth, where enough mixtures were scored."""
        return worth(self.result.standings, self.usable)

    @cached_property
    def best_single(self) -> Standing | None:
        """The best single candidate; of equal ones that with the likelier right answers."""
        singles = [one for name in self.candidates if (one := self.merged([name])).score]
        return max(singles, key=lambda one: (score_of(one).value, one.mean_logprob), default=None)

    @property
    def choice(self) -> Standing:
        """How the chosen mixture stands by the scores that it was chosen by: those of fine-tuned models where it was verified."""
        mixture = self.result.best.mixture
        return next((one for one in self.fine_tuned if one.mixture == mixture), self.result.best)

    @cached_property
    def certainty(self) -> Certainty | None:
        """How sure the choice is, by the scores that it was made by.

        Of a verified one only the luck among the fine-tuned mixtures is known, not that of coming among these.
        """
        ranking = list(self.fine_tuned) or self.result.ranking
        fine_tuned = {one.mixture: one for one in self.fine_tuned}
        references = {"all": self.merged(self.usable), "best_single": self.best_single}
        against = {"base": self.result.base}
        for name, one in references.items():
            if one is not None and (not fine_tuned or one.mixture in fine_tuned):
                against[name] = fine_tuned.get(one.mixture, one)
        return certainty(
            ranking, self.choice, {name: one for name, one in against.items() if one.complete}, self._others()
        )

    def _others(self) -> list[float] | None:
        """Estimated scores of mixtures that might have been chosen and left a race; None where most are not known at all."""
        if self.fine_tuned:
            return []
        standings = self.result.standings.values()
        ensemble = next(iter(self.result.best.trials.values())).objective == "ensemble"
        if ensemble and not self.space.at_most(sum(one.mixture in self.space for one in standings)):
            return None  # only the best thousand were kept
        return [
            one.estimate for one in standings if one.pruned and one.mixture in self.space and one.estimate is not None
        ]

    def merged(self, names: Sequence[str]) -> Standing:
        """How the equal-weight mixture of `names` stands."""
        return self.result.standings[Mixture.subset(names)]

    def final_score(self, who: str, part: str, target: str | None = None) -> Score | None:
        """The final (or base) model's score on `validation` or `test`: one target's, or the weighted mean of all.

        None where there is no final model, or where a target has no such part.
        """
        scores = (self.final or {}).get("scores", {})
        names = [target] if target else list(self.targets)
        found = [scores.get(name, {}).get(who, {}).get(part) for name in names]
        if not all(found):
            return None
        if len(found) == 1:
            return Score(found[0]["score"], found[0]["stderr"])
        weights = {name: self.targets[name].config.weight for name in names}
        shown = {name: Score(one["score"], one["stderr"]) for name, one in zip(names, found, strict=True)}
        return Score(*mean_over_targets(shown, weights))


def standing_json(standing: Standing) -> dict[str, Any] | None:
    """A mixture as `summary.json` shows it, with the scores by target where there are several; None where it failed."""
    if standing.score is None:
        return None
    shown = {"mixture": standing.mixture.weights, "score": standing.score.value, "stderr": standing.score.stderr}
    if len(standing.trials) > 1:
        shown["targets"] = {name: trial.score.value for name, trial in standing.trials.items() if trial.score}
    return shown


def worth_json(found: Worth | None) -> dict[str, Any] | None:
    """What every candidate is worth, as `summary.json` shows it."""
    if found is None:
        return None
    return {
        "exact": found.exact,
        "shapley": {name: {"value": value, "stderr": stderr} for name, (value, stderr) in found.shapley.items()},
        "interactions": [
            {"pair": list(pair), "value": value, "stderr": stderr}
            for pair, (value, stderr) in sorted(found.interactions.items(), key=lambda item: -abs(item[1][0]))
        ],
    }


def summarise(outcome: Outcome) -> dict[str, Any]:
    """`summary.json`; its keys are a contract (ARCHITECTURE.md)."""
    result, final = outcome.result, outcome.final
    singles = [one for name in outcome.candidates if (one := outcome.merged([name])).score]
    best_single = outcome.best_single
    training = outcome.training.values()
    trials = result.trials
    validation, test = outcome.final_score("final", "validation"), outcome.final_score("final", "test")
    return {
        "objective": next(iter(result.best.trials.values())).objective,
        "candidates": list(outcome.candidates),
        "space": {
            "names": list(outcome.space.names),
            "required": sorted(outcome.space.required),
            "min_datasets": outcome.space.min_datasets,
            "max_datasets": outcome.space.max_datasets,
            "costs": dict(outcome.space.costs),
            "max_cost": None if math.isinf(outcome.space.max_cost) else outcome.space.max_cost,
            "continuous": outcome.space.continuous,
        },
        "study": outcome.study,
        "best": standing_json(result.best),
        "base": standing_json(result.base),
        "all": standing_json(outcome.merged(outcome.usable)),
        "best_single": standing_json(best_single) if best_single else None,
        "singles": {one.mixture.names[0]: standing_json(one) for one in singles},
        "top": [standing_json(one) for one in result.ranking[:10]],
        "certainty": outcome.certainty.to_json() if outcome.certainty else None,
        "worth": worth_json(outcome.worth),
        "warnings": [{"code": code, "text": text} for code, text in cautions(outcome)],
        "verified": outcome.verified,
        "pareto_front": [standing_json(one) for one in result.pareto_front],
        "targets": {
            name: {
                "metric": target.config.metric,
                "scorer": target.config.kind,
                "weight": target.config.weight,
                "min_delta": target.config.min_delta,
                "short": sum(name in one.short for one in result.standings.values()),
                "validation_rows": outcome.examples[name].get("validation", 0),
                "test_rows": outcome.examples[name].get("test", 0),
                "fingerprints": {"base": outcome.keys[name].base, "scorer": outcome.keys[name].scorer},
            }
            for name, target in outcome.targets.items()
        },
        "final": None
        if final is None
        else {
            "validation": validation.value if validation else None,
            "test": test.value if test else None,
            **{key: final[key] for key in ("scores", "steps", "tokens", "loss")},
        },
        "counts": {
            "candidates": len(outcome.candidates),
            "trials": len(trials),
            "pruned": sum(trial.state == "pruned" for trial in trials),
            "failed": sum(trial.state == "failed" for trial in trials),
        },
        "costs": {
            "train_seconds": round(sum(record["seconds"] for record in training), 3),
            "search_seconds": round(result.seconds, 3),
            "final_seconds": final["total_seconds"] if final else None,
            "compare_seconds": round(outcome.compare_seconds, 3),
            "example_evaluations": result.evaluations,
            "adapter_steps": sum(record["steps"] for record in training),
        },
    }
