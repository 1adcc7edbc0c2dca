"""A finished search in figures: `summary.json` and the table and lines at the end of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .console import duration
from .data import Candidate, Target
from .mixture import Mixture, Trial
from .search import SearchResult, score_of


@dataclass(frozen=True)
class Outcome:
    """What a run has come to.

    Args:
        result: the search.
        candidates: by name.
        target: what was searched for.
        training: name -> `training.json` of every adapter.
        final: `final/training.json`, or None while there is no final model of the chosen mixture.
    """

    result: SearchResult
    candidates: Mapping[str, Candidate]
    target: Target
    training: Mapping[str, Mapping[str, Any]]
    final: Mapping[str, Any] | None

    def merged(self, names: Sequence[str]) -> Trial:
        """The trial of the equal-weight mixture of `names`."""
        return self.result.trials[Mixture.subset(names)]


def trial_json(trial: Trial) -> dict[str, Any] | None:
    """A trial as `summary.json` shows it; None where it failed."""
    if trial.score is None:
        return None
    return {"mixture": trial.mixture.weights, "score": trial.score.value, "stderr": trial.score.stderr}


def joining(result: SearchResult, name: str) -> list[float]:
    """By how much the score changes when `name` joins a mixture, for every mixture that was scored with and without it."""
    changes = []
    for mixture, trial in result.trials.items():
        if mixture.items and name not in mixture.names:
            joined = result.trials.get(Mixture.subset([*mixture.names, name]))
            if joined is not None and joined.score and trial.score:
                changes.append(joined.score.value - trial.score.value)
    return changes


def summarise(outcome: Outcome) -> dict[str, Any]:
    """`summary.json`; its keys are a contract (ARCHITECTURE.md)."""
    result, target, final = outcome.result, outcome.target, outcome.final
    ranking = result.ranking
    singles = [trial for name in outcome.candidates if (trial := outcome.merged([name])).score]
    best_single = max(singles, key=lambda trial: (score_of(trial).value, score_of(trial).mean_logprob), default=None)
    trials = list(result.trials.values())
    training = outcome.training.values()
    return {
        "best": trial_json(result.best),
        "base": trial_json(result.base),
        "all": trial_json(outcome.merged(list(outcome.candidates))),
        "best_single": trial_json(best_single) if best_single else None,
        "singles": {trial.mixture.names[0]: trial_json(trial) for trial in singles},
        "top": [trial_json(trial) for trial in ranking[:10]],
        "targets": {
            target.name: {
                "metric": target.config.metric,
                "scorer": target.config.scorer,
                "validation_rows": len(target.rows),
                "test_rows": len(target.test_rows),
            }
        },
        "final": None
        if final is None
        else {
            "validation": final["scores"]["final"]["validation"]["score"],
            "test": final["scores"]["final"].get("test", {}).get("score"),
            **{key: final[key] for key in ("scores", "steps", "tokens", "loss")},
        },
        "counts": {
            "candidates": len(outcome.candidates),
            "trials": len(trials),
            "pruned": 0,
            "failed": sum(trial.state == "failed" for trial in trials),
        },
        "costs": {
            "train_seconds": round(sum(record["seconds"] for record in training), 3),
            "search_seconds": round(sum(trial.seconds for trial in trials), 3),
            "final_seconds": final["total_seconds"] if final else None,
            "example_evaluations": sum(trial.rung for trial in trials if trial.score),
            "adapter_steps": sum(record["steps"] for record in training),
        },
    }


def figure(score: float, stderr: float) -> str:
    """`0.842 ± 0.033`."""
    return f"{score:.3f} ± {stderr:.3f}"


def end_table(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of the table at the end of a run."""

    def row(label: str, trial: Trial, joins: str = "", steps: str = "", time: str = "") -> list[str]:
        score = trial.score
        return [label, figure(score.value, score.stderr) if score else "failed", "", joins, steps, time]

    rows = [row("base model", outcome.result.base)]
    for name in outcome.candidates:
        one = outcome.training[name]
        changes = joining(outcome.result, name)
        joins = f"{sum(changes) / len(changes):+.3f}" if changes else ""
        rows.append(row(name, outcome.merged([name]), joins, f"{one['steps']:,}", duration(one["seconds"])))
    rows.append(row(f"all {len(outcome.candidates)}, merged", outcome.merged(list(outcome.candidates))))
    rows.append(row(f"{outcome.result.best.mixture}, merged", outcome.result.best))
    if outcome.final is not None:
        scores = outcome.final["scores"]
        steps, seconds = outcome.final["steps"], outcome.final["seconds"]
        rows.append(["final model", figure(**scores["final"]["validation"]), "", "", f"{steps:,}", duration(seconds)])
        for who, shown in (("base", rows[0]), ("final", rows[-1])):
            if "test" in scores[who]:
                shown[2] = figure(**scores[who]["test"])
    return ["", "validation", "test", "joining", "steps", "time"], rows


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
        if changes and lowered > len(changes) / 2 and sum(changes) < 0:
            lines.append(
                f"harmful: {name} lowers {lowered} of the {len(changes)} mixtures that it joins, "
                f"by {-sum(changes) / len(changes):.3f} on average"
            )
    close = score_of(result.best).value - score_of(result.best).stderr
    tied = sum(score_of(trial).value > close for trial in result.ranking)
    if tied > 1:
        lines.append(
            f"{tied} mixtures lie within one standard error of the best: more validation rows would tell them apart"
        )
    if summary["counts"]["failed"]:
        lines.append(f"{summary['counts']['failed']} mixtures failed and cannot be chosen; trials.jsonl says why")
    lines.append("merged: the exact average of the adapters, not trained; joining: mean change when it joins a mixture")
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
        f"cost: adapters {duration(costs['train_seconds'])}, {summary['counts']['trials']} mixtures scored in "
        f"{duration(costs['search_seconds'])}" + (f", final model {duration(costs['final_seconds'])}" if final else "")
    )
    return lines
