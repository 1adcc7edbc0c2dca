"""What a run has come to, in figures: `summary.json`, and what a user should be warned of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from m2m_hf.analysis.fidelity import VERDICTS
from m2m_hf.analysis.selection_bias import Certainty, certainty
from m2m_hf.analysis.shapley import Worth, worth
from m2m_hf.core.mixture import Mixture, Score, SearchSpace, Standing, mean_over_targets
from m2m_hf.data.loading import Candidate, Target
from m2m_hf.search.loop import SearchResult, score_of
from m2m_hf.storage.journal import Keys, experts_word


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
        return experts_word(next(iter(self.training.values()), {}))

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


def one_of_the_worse(pruned: Standing, best: Standing) -> bool:
    """Whether a mixture that left a race lies below the best by more than 1.645 standard errors of its own rung's examples."""
    if pruned.estimate is None or best.score is None:
        return True
    return pruned.estimate < best.score.value - 1.645 * (pruned.score.stderr or 0.0 if pruned.score else 0.0)


def joining(result: SearchResult, name: str) -> list[float]:
    """By how much the score changes when `name` joins a mixture, for every mixture that was scored with and without it."""
    changes = []
    for mixture, standing in result.standings.items():
        if mixture.items and name not in mixture.names:
            joined = result.standings.get(Mixture.subset([*mixture.names, name]))
            if joined is not None and joined.score and standing.score and joined.complete and standing.complete:
                changes.append(joined.score.value - standing.score.value)
    return changes


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


def cautions(outcome: Outcome) -> list[tuple[str, str]]:
    """(code, text) of everything that a user should know before believing the result, the gravest first."""
    result, found = outcome.result, []
    choice, base = outcome.choice, result.base
    best = result.best
    sure = outcome.certainty
    how = "fine-tuned, " if outcome.fine_tuned else ""
    if base.score and score_of(choice).value <= base.score.value:
        top = list(outcome.fine_tuned) or result.ranking
        if score_of(top[0]).value <= base.score.value:
            text = f"negative transfer: {how}no mixture that may be chosen scores above the base model"
        else:
            text = "the chosen mixture does not score above the base model"
        found.append(("negative_transfer", text))
    elif sure and "base" in sure.differences and sure.differences["base"][1] <= 0:
        value, low, high = sure.differences["base"]
        told = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
        found.append(
            (
                "not_above_base",
                f"the chosen mixture cannot be told from the base model: {told}, the luck of the best of many taken off",
            )
        )
    for name in outcome.candidates:
        changes = joining(result, name)
        lowered = sum(change < 0 for change in changes)
        if len(changes) > 2 and lowered > len(changes) / 2 and sum(changes) < 0:
            found.append(
                (
                    "harmful",
                    f"harmful: {name} lowers {lowered} of the {len(changes)} mixtures that it joins, by "
                    f"{-sum(changes) / len(changes):.3f} on average",
                )
            )
    for name, record in outcome.training.items():
        if "failed" in record:
            text = f"{name} is in no mixture: the training of its {outcome.experts[:-1]} failed: {record['failed']}"
            found.append(("no_adapter", text))
    if taken := [name for name, record in outcome.training.items() if record.get("unknown")]:
        found.append(
            (
                "trained_elsewhere",
                f"how the {outcome.experts} of {', '.join(taken)} were trained is not known: averages mean something only "
                "if they were all trained alike, from this base model and on these rows",
            )
        )
    for (name, target), rows in outcome.overlap.items():
        if rows:
            found.append(
                (
                    "overlap",
                    f"overlap: {rows} rows of {target} stand in {name} too, which makes it look better than it is",
                )
            )
    if worse := averages_badly(result):
        found.append(
            (
                "averages_badly",
                f"the {outcome.experts} average badly: {worse[0]} of {worse[1]} mixtures are worse than their parts are on "
                f"average, as of {outcome.experts} that were trained for too long or with too high a learning rate; the scores "
                "of mixtures then say little of models trained on them",
            )
        )
    if sure and sure.tied > 1:
        more = ""
        if sure.rows_needed is not None and sure.rows_needed > 1:
            rows = sum(len(trial.score.values) for trial in choice.trials.values() if trial.score)
            more = f"; to tell it from the second best it would take about {rounded(rows * sure.rows_needed)} rows, not {rows:,}"
        found.append(("few_rows", f"the rows cannot tell {sure.tied} mixtures apart, the chosen one among them{more}"))
    elif score_of(choice).stderr is None:
        found.append(
            ("no_stderr", "the scorer gives no standard error, so nothing tells how much of the differences is chance")
        )
    kind = "ensemble" if next(iter(best.trials.values())).objective == "ensemble" else "merged"
    judged = (outcome.fidelity or {}).get("verdict", {}).get(kind)
    if judged and judged["verdict"] in ("distrust", "prune"):
        found.append(
            ("fidelity", f"fidelity of {kind} scores here: {VERDICTS[judged['verdict']]}, since {judged['why']}")
        )
    if outcome.verified and outcome.verified["by_search"] != best.mixture.weights:
        first = Mixture.of(outcome.verified["by_search"])
        found.append(("overruled", f"fine-tuned, {best.mixture} scores higher than {first}, the choice of the search"))
    stratified = (((outcome.verified or {}).get("baselines") or {}).get("stratified") or {}).get("validation")
    over = (stratified or {}).get("over_chosen")
    if over and over["value"] > 1.645 * (over["stderr"] or 0.0):
        found.append(
            (
                "stratified",
                f"fine-tuned on equally many rows of every candidate it scores higher than the chosen, by {over['value']:.3f}",
            )
        )
    for one in (outcome.verified or {}).get("failed", []):
        found.append(("failed", f"{Mixture.of(one['mixture'])} could not be fine-tuned and scored: {one['reason']}"))
    return found


def rounded(value: float) -> str:
    """A number of rows to two significant digits."""
    digits = len(str(int(value))) - 2
    return f"{round(value, -max(digits, 0)):,.0f}"


def averages_badly(result: SearchResult) -> tuple[int, int] | None:
    """(mixtures worse than their parts are on average, mixtures of two or more), where that holds for three quarters of them.

    Compared by the log-probability of the right answers where there is one, which moves where a metric does not. Losses are
    nearly convex along the line between models that share most of their training, so averages of good adapters do better than
    the parts on average (Wortsman et al., Model soups, 2022).
    """
    worse = several = 0
    for mixture, standing in result.standings.items():
        parts = [result.standings.get(Mixture.subset([name])) for name in mixture.names]
        if len(mixture) < 2 or not standing.complete or any(one is None or not one.complete for one in parts):
            continue
        known = [one for one in (standing, *parts) if one is not None]
        likely = all(trial.score and trial.score.logprobs for one in known for trial in one.trials.values())
        values = [one.mean_logprob if likely else score_of(one).value for one in known]
        several += 1
        worse += values[0] < sum(w * v for w, v in zip(mixture.weights.values(), values[1:], strict=True))
    return (worse, several) if several > 2 and worse >= 0.75 * several else None
