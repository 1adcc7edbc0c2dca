"""A finished search in figures: `summary.json` and the table and lines at the end of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .console import duration
from .data import Candidate, Target
from .fidelity import VERDICTS
from .mixture import Mixture, Score, Standing, mean_over_targets
from .search import SearchResult, score_of
from .worth import Worth, worth


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
    """

    result: SearchResult
    candidates: Mapping[str, Candidate]
    targets: Mapping[str, Target]
    examples: Mapping[str, Mapping[str, int]]
    training: Mapping[str, Mapping[str, Any]]
    final: Mapping[str, Any] | None

    @cached_property
    def worth(self) -> Worth | None:
        """What every candidate is worth, where enough mixtures were scored."""
        return worth(self.result.standings, list(self.candidates))

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
    best_single = max(singles, key=lambda one: (score_of(one).value, one.mean_logprob), default=None)
    training = outcome.training.values()
    trials = result.trials
    validation, test = outcome.final_score("final", "validation"), outcome.final_score("final", "test")
    return {
        "best": standing_json(result.best),
        "base": standing_json(result.base),
        "all": standing_json(outcome.merged(list(outcome.candidates))),
        "best_single": standing_json(best_single) if best_single else None,
        "singles": {one.mixture.names[0]: standing_json(one) for one in singles},
        "top": [standing_json(one) for one in result.ranking[:10]],
        "worth": worth_json(outcome.worth),
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
            "example_evaluations": result.evaluations,
            "adapter_steps": sum(record["steps"] for record in training),
        },
    }


def figure(score: Score | None) -> str:
    """`0.842 ± 0.033`; without the latter where it is not known."""
    if score is None:
        return ""
    return f"{score.value:.3f}" + ("" if score.stderr is None else f" ± {score.stderr:.3f}")


def end_table(outcome: Outcome) -> tuple[str, list[str], list[list[str]]]:
    """(title, columns, rows) of the end table: a column for each target, and one for their mean where there are several."""
    targets = list(outcome.targets)
    several = len(targets) > 1
    test = outcome.final_score("final", "test") is not None

    def row(label: str, standing: Standing, adds: str = "", steps: str = "", time: str = "") -> list[str]:
        shown = [figure(standing.score) if standing.score else "failed"]
        if several:
            shown += [figure(standing.trials[name].score) or "failed" for name in targets]
        return [label, *shown, *[""] * (test and not several), adds, steps, time]

    def final_row(who: str, part: str) -> list[str]:
        return [figure(outcome.final_score(who, part, name)) for name in ([None, *targets] if several else [None])]

    rows = [row("base model", outcome.result.base)]
    for name in outcome.candidates:
        one = outcome.training[name]
        value, stderr = outcome.worth.shapley[name] if outcome.worth else (None, None)
        adds = "" if value is None else f"{value:+.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")
        rows.append(row(name, outcome.merged([name]), adds, f"{one['steps']:,}", duration(one["seconds"])))
    rows.append(row(f"all {len(outcome.candidates)}, merged", outcome.merged(list(outcome.candidates))))
    rows.append(row(f"{outcome.result.best.mixture}, merged", outcome.result.best))
    if outcome.final is not None:
        cost = ["", f"{outcome.final['steps']:,}", duration(outcome.final["seconds"])]
        if several:
            rows.append(["final model", *final_row("final", "validation"), *cost])
            if any(final_row("final", "test")):
                rows.append(["base model, sealed test", *final_row("base", "test"), "", "", ""])
                rows.append(["final model, sealed test", *final_row("final", "test"), "", "", ""])
        else:
            rows.append(["final model", *final_row("final", "validation"), *final_row("final", "test")[:test], *cost])
            if test:
                rows[0][2] = final_row("base", "test")[0]
    metrics = {name: target.config.metric or "the task's metric" for name, target in outcome.targets.items()}
    if several:
        title = "weighted mean and every target, validation ± standard error"
        columns = ["", "mean", *(f"{name} ({metrics[name]})" for name in targets)]
    else:
        title = f"{targets[0]}: {metrics[targets[0]]} ± standard error"
        columns = ["", "validation", *["test"] * test]
    return title, [*columns, "worth", "steps", "time"], rows


def remarks(outcome: Outcome, *, steps: int | None, epochs: float, overrides: Mapping[str, Any]) -> list[str]:
    """The lines under the end table: what was chosen, what is harmful, what the figures mean and what they cost.

    Args:
        steps: the final fine-tune's `max_steps`, or None where it goes by epochs.
        epochs: its `num_train_epochs`.
        overrides: what `final:` changes.
    """
    result, final = outcome.result, outcome.final
    summary = summarise(outcome)
    best, costs = result.best.mixture, summary["costs"]
    left_out = [name for name in outcome.candidates if name not in best.names]
    lines = ["", f"chosen: {best}" + (f"; left out: {', '.join(left_out)}" if left_out else "")]
    for name in outcome.candidates:
        changes = joining(result, name)
        lowered = sum(change < 0 for change in changes)
        if len(changes) > 2 and lowered > len(changes) / 2 and sum(changes) < 0:
            lines.append(
                f"harmful: {name} lowers {lowered} of the {len(changes)} mixtures that it joins, "
                f"by {-sum(changes) / len(changes):.3f} on average"
            )
    stderr = score_of(result.best).stderr
    if stderr is None:
        lines.append("the scorer gives no standard error, so nothing tells how much of the differences is chance")
    else:
        tied = sum(score_of(one).value > score_of(result.best).value - stderr for one in result.ranking)
        if tied > 1:
            lines.append(
                f"{tied} mixtures lie within one standard error of the best: more validation rows would tell them apart"
            )
    for name, target in outcome.targets.items():
        worse = sum(name in one.short for one in result.standings.values())
        if worse:
            lines.append(
                f"{worse} mixtures could not be chosen: they make {name} worse than the base model by more than "
                f"{target.config.min_delta:g} (min_delta)"
            )
    if len(outcome.targets) > 1:
        front = result.pareto_front
        lines.append(
            f"{len(front)} mixtures are on the Pareto front of the {len(outcome.targets)} targets: summary.json lists them"
        )
    pruned = [one for one in result.standings.values() if one.pruned]
    if pruned:
        tied = sum(not one_of_the_worse(one, result.best) for one in pruned)
        told = f"{tied} of them may be as good as the chosen one" if tied else "none of them comes near the chosen one"
        lines.append(
            f"not scored on all examples, since they could not win: {len(pruned)}; as far as they were, {told}"
        )
    if result.ended == "budget":
        lines.append("the budget ended the search before the strategy did: a larger one goes on from here")
    if summary["counts"]["failed"]:
        lines.append(
            f"{summary['counts']['failed']} trials failed; their mixtures cannot be chosen; trials.jsonl says why"
        )
    if outcome.worth:
        how = "over all orders" if outcome.worth.exact else "over orders, estimated from the mixtures scored"
        lines.append(
            f"worth: what a candidate adds when all join the base model one by one, on average {how} (Shapley value); the "
            "first to join adds the most"
        )
    lines.append("merged: the exact average of the adapters, not trained")
    uniform = (
        f"for the same {steps} steps"
        if steps
        else f"for the same {epochs:g} epochs, so steps in proportion to its rows"
    )
    lines.append(
        f"final model: {'' if final else 'to be '}fine-tuned on the chosen mixture, "
        + (
            f"as final: says ({', '.join(f'{key}: {value}' for key, value in overrides.items())})"
            if overrides
            else uniform
        )
    )
    lines.append(
        f"cost: adapters {duration(costs['train_seconds'])}, {len(result.standings)} mixtures scored in "
        f"{duration(costs['search_seconds'])}" + (f", final model {duration(costs['final_seconds'])}" if final else "")
    )
    return lines


NAMES = {
    "base": "base model",
    "chosen": "chosen",
    "all": "all candidates",
    "best_single": "best single",
    "similarity": "most similar",
    "stratified": "equally many rows of each",
    "oracle": "best of all fine-tuned",
}


def with_interval(shown: Mapping[str, float | None]) -> str:
    """`0.81 [0.40, 0.95]`; empty where it does not exist."""
    if shown["value"] is None:
        return "not defined"
    ends = "" if shown["low"] is None else f" [{shown['low']:.2f}, {shown['high']:.2f}]"
    return f"{shown['value']:.2f}{ends}"


def fidelity_tables(found: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of what `fidelity.json` holds: the correlations, and the baselines."""
    rows = []
    for name, measures in found["agreement"].items():
        for measure, one in measures.items():
            figures = [with_interval(one[key]) for key in ("pearson", "spearman", "kendall")]
            recall = " ".join(f"{k}: {of['value']:.2f}" for k, of in one["recall"].items())
            regret = f"{one['regret']['value']:.3f} ({one['random_regret']:.3f})"
            rows.append([f"{name}, {measure}", str(one["mixtures"]), *figures, recall, regret])
    title = "predicted against fine-tuned [95 % intervals]; regret in brackets: of a random choice"
    columns = ["", "mixtures", "Pearson", "Spearman", "Kendall", "top-k recall", "regret"]
    tables = [(title, columns, rows)]
    rows = []
    for name, one in found["baselines"].items():
        label = NAMES.get(name, name.replace("_", " "))
        label += f" ({' + '.join(one['mixture'])})" if name not in ("base", "all", "stratified") else ""
        cells = []
        for part in ("validation", "test"):
            of = one[part]
            cells.append(figure(Score(of["score"], of["stderr"])) if of else "")
            behind = of and name != "chosen" and of["over_chosen"]
            cells.append(figure(Score(behind["value"], behind["stderr"])).replace("±", "±") if behind else "")
        rows.append([label, f"{one['rows']:,}", f"{one['steps']:,}", *cells])
    columns = ["", "rows", "steps", "validation", "over chosen", "sealed test", "over chosen"]
    tables.append(("really fine-tuned ± standard error (of the paired difference)", columns, rows))
    return tables


def fidelity_remarks(found: Mapping[str, Any]) -> list[str]:
    """The lines under the tables: the verdicts, and what else was seen."""
    lines = []
    for name, one in found["verdict"].items():
        lines.append(f"{name}: {VERDICTS[one['verdict']]}, since {one['why']}")
    if found["training_noise"] is not None:
        lines.append(
            f"chance in training: two trainings on the same rows in another order differ by {found['training_noise']:.3f} "
            "(root mean square over the singles)"
        )
    for name, measures in found["resilience"].items():
        for measure, one in measures.items():
            if one["hurt"]:
                shielded = figure(Score(one["shielded"]["value"], one["shielded"]["stderr"]))
                lines.append(
                    f"mixtures that hurt, by {measure}: {one['hurt']} of {one['mixtures']}; fine-tuned they fall by "
                    f"{-one['trained']:.3f}, {name} by {-one['surrogate']:.3f} (less by {shielded}); {name} sees "
                    f"{one['noticed']} of them"
                )
    return lines
