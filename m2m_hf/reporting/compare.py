"""`m2m compare`: two runs side by side, from their files alone: what was asked differently, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy.stats import spearmanr

from m2m_hf.console import duration
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import paired
from m2m_hf.core.trial import Standing
from m2m_hf.reporting.record import Record

MOST = 10  # lines of a list


@dataclass(frozen=True)
class Comparison:
    """What `m2m compare` tells.

    Args:
        differences: field of the configuration, and what it is in either run.
        outcome: what, and what it is in either run.
        remarks: lines below.
    """

    differences: list[list[str]]
    outcome: list[list[str]]
    remarks: list[str]


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    if isinstance(value, Mapping) and value:
        found: dict[str, Any] = {}
        for key, one in value.items():
            found |= flat(one, f"{name}.{key}" if name else str(key))
        return found
    return {name: value}


def figure(one: Mapping[str, Any] | None) -> str:
    if not one or one.get("score") is None:
        return ""
    return f"{one['score']:.3f}" + ("" if one.get("stderr") is None else f" ± {one['stderr']:.3f}")


def compare(one: Record, other: Record) -> Comparison:
    """Two finished searches.

    Scores are compared only where both were measured on the same rows with the same scorer, as the fingerprints tell; mixtures
    by the names of their candidates.
    """
    ours, theirs = flat(dict(one.config)), flat(dict(other.config))
    alike = ("output_dir", *same(one, other))  # the same, whatever it is called
    fields = [key for key in dict.fromkeys((*ours, *theirs)) if ours.get(key) != theirs.get(key) and key not in alike]
    differences = [[key, *(str(of.get(key, "")) for of in (ours, theirs))] for key in fields]
    runs = (one, other)
    rows = [
        ["chosen", *(str(run.best) for run in runs)],
        *([name, *(figure(run.summary[key]) for run in runs)] for name, key in (
            ("its score, merged", "best"), ("base model", "base"), ("all together", "all"), ("best single", "best_single"))),
    ]  # fmt: skip
    for part in ("validation", "test"):
        found = [(run.summary["final"] or {}).get(part) for run in runs]
        if any(value is not None for value in found):
            rows.append([f"final model, {part}", *("" if value is None else f"{value:.3f}" for value in found)])
    for name, key in (("trials", "trials"), ("failed", "failed")):
        rows.append([name, *(f"{run.summary['counts'][key]:,}" for run in runs)])
    for name, key in (
        ("training the adapters", "train_seconds"),
        ("scoring", "search_seconds"),
        ("final model", "final_seconds"),
    ):
        rows.append([f"time: {name}", *(duration(run.summary["costs"][key] or 0) for run in runs)])
    return Comparison(differences, rows, remarks(one, other))


def same(one: Record, other: Record) -> list[str]:
    """Fields whose content is the same in both, as the fingerprints tell, although it may lie in another place."""
    found = []
    for name in set(one.training) & set(other.training):
        if one.training[name]["data"] == other.training[name]["data"]:
            found.append(f"candidates.{name}.data_files")
        if one.training[name]["uniform"]["base_model"] == other.training[name]["uniform"]["base_model"]:
            found.append("model_name_or_path")
    for name in set(one.summary["targets"]) & set(other.summary["targets"]):
        if scorers(one)[name] == scorers(other)[name]:
            found.append(f"targets.{name}.data.data_files")
    return found


def scorers(run: Record) -> dict[str, str]:
    """Target -> fingerprint of its rows, scorer and metric."""
    return {name: of["fingerprints"]["scorer"] for name, of in run.summary["targets"].items()}


def remarks(one: Record, other: Record) -> list[str]:
    """How far both agree on the mixtures that both have scored."""
    prints = [scorers(run) for run in (one, other)]
    if prints[0] != prints[1]:
        apart = sorted(name for name in {*prints[0], *prints[1]} if prints[0].get(name) != prints[1].get(name))
        return [f"scores are not comparable: the rows or the metric of {', '.join(apart)} are not the same in both"]
    kinds = [
        (
            run.summary["objective"],
            run.config.get("merge_method"),
            {name: of["weight"] for name, of in run.summary["targets"].items()},
        )
        for run in (one, other)
    ]
    if kinds[0] != kinds[1]:
        return ["scores are not comparable: objective, merge_method or the targets' weights are not the same in both"]
    found = [{standing.mixture: standing for standing in run.scored} for run in (one, other)]
    both = [mixture for mixture in found[0] if mixture in found[1]]
    lines = [f"{len(both)} mixtures were scored on all rows in both"]
    if len(both) > 2:
        scores = [[Record.score(of[mixture]).value for mixture in both] for of in found]
        if all(len(set(of)) > 1 for of in scores):
            lines[0] += f"; rank correlation {spearmanr(*scores).statistic:.2f} (Spearman)"
        moved = sorted(zip(both, *scores, strict=True), key=lambda row: -abs(row[1] - row[2]))
        mixture, first, second = moved[0]
        if first != second:
            lines.append(f"furthest apart: {mixture}, {first:.3f} in the first and {second:.3f} in the second")
    for name, of, best, who in (("first", found[0], other.best, "second"), ("second", found[1], one.best, "first")):
        if one.best != other.best and best in of and (one.best if name == "first" else other.best) in of:
            lines.append(difference(of, one.best if name == "first" else other.best, best, name, who))
    if one.best == other.best:
        lines.append("both chose the same mixture")
    return lines


def difference(found: Mapping[Mixture, Standing], ours: Mixture, theirs: Mixture, name: str, who: str) -> str:
    """How much better one run's choice is than the other's, by that run's scores."""
    scores = [
        {target: trial.score for target, trial in found[mixture].trials.items() if trial.score is not None}
        for mixture in (ours, theirs)
    ]
    value, stderr = paired(scores[0], scores[1], found[ours].weights)
    shown = f"{value:+.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")
    return f"by the scores of the {name} its choice is {shown} over the {who}'s, on the same rows"
